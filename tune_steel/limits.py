"""What keeps one trial from taking its worker, its node or the search with it."""

from __future__ import annotations

import ctypes
import faulthandler
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def release_memory() -> None:
    """Gives the kernel what earlier trials of this process freed; the heap would keep it.

    By itself glibc trims the heap's end only, and only above a threshold; other C libraries cannot
    be told.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_memory(budget: int | None) -> None:
    """Lets this process allocate so many more bytes than it holds now; None lifts the limit.

    A worker is used for many trials, so the limit is set anew for each. An allocation above it
    raises in the trial (RLIMIT_DATA: memory on the heap and private maps, not shared data).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if budget is None else _data_bytes() + budget
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData")


def watched(steps: Iterator[T], seconds: float) -> Iterator[T]:
    """Steps of an iterator; ends the process when one of them takes longer than some seconds.

    The watch is a thread in C, so it also ends a process that hangs with Python's lock held. To
    the search the worker is then one that died. What is done with a step is not watched.
    """
    while True:
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            step = next(steps)
        except StopIteration:
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        yield step
