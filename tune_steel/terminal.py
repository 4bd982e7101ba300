"""Lines for people. A terminal or pipe that has gone away never costs a result."""

import os
import sys
from pathlib import Path
from typing import TextIO


def say(text: str) -> None:
    """Prints one line on stderr; a library's message inside it may have had more."""
    write(sys.stderr, f"tune_steel: {' '.join(text.split())}\n")


def show(text: str) -> None:
    """Prints on stdout."""
    write(sys.stdout, text)


def replace_closed_streams() -> None:
    """Gives the standard streams that the process was started without to the null device.

    Ray does not start without stderr. The next file to be opened, such as a table, would get its
    number, and with it what libraries print there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def write(stream: TextIO, text: str) -> None:
    """Writes and flushes; gives the stream up where the reader is gone or its disk is full.

    What its encoding does not have becomes a question mark.
    """
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
