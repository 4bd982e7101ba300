"""Lines for people. A terminal or pipe that has gone away never costs a result."""

import os
import sys
from typing import TextIO


def say(text: str) -> None:
    """Prints one line on stderr; a library's message inside it may have had more."""
    write(sys.stderr, f"tune_steel: {' '.join(text.split())}\n")


def show(text: str) -> None:
    """Prints on stdout."""
    write(sys.stdout, text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may be looking; a process can be started without a stream."""
    return stream is not None and stream.isatty()


def write(stream: TextIO | None, text: str) -> None:
    """Writes and flushes; gives the stream up where the reader is gone or its disk is full.

    What its encoding does not have becomes a question mark.
    """
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
