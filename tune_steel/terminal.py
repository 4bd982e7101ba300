"""Lines for people. A terminal or pipe that has gone away never costs a result."""

import sys
from typing import TextIO


def say(text: str) -> None:
    """Prints one line on stderr; a library's message inside it may have had more."""
    write(sys.stderr, f"tune_steel: {' '.join(text.split())}\n")


def show(text: str) -> None:
    """Prints on stdout."""
    write(sys.stdout, text)


def write(stream: TextIO, text: str) -> None:
    """Writes and flushes; does nothing where the reader is gone, as after `... | head`."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        pass
