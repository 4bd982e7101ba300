"""Runs a command and watches wall time, CPU time and memory of its processes; on what machine."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tune_steel.provenance import processor

_MARK = "TUNE_STEEL_BENCHMARK"
_EVERY = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """What it runs on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} CPUs, "
        f"{memory:.0f} GiB, Python {platform.python_version()}"
    )


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        started: When it began, in Unix seconds.
        seconds: Wall time until it ended.
        cpu_seconds: CPU time of all its processes; the last half second of each is not seen.
        peak_mb: The most memory at once, shared pages divided among those who share them (PSS).
        code: Its exit code.
        output: The end of what it printed.
    """

    started: float
    seconds: float
    cpu_seconds: float
    peak_mb: float
    code: int
    output: str


class _Watch(threading.Thread):
    """Finds the processes by a mark in their environment: daemons leave the process tree."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark = f"{_MARK}={mark}".encode()
        self._known: dict[int, bool] = {}
        self._cpu: dict[int, float] = {}
        self._ended = threading.Event()
        self.peak = 0.0

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def run(self) -> None:
        while not self._ended.wait(_EVERY):
            self.look()

    def end(self) -> None:
        self._ended.set()
        self.join()

    def processes(self) -> list[int]:
        """The living ones."""
        there = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
        self._known = {pid: known for pid, known in self._known.items() if pid in there}
        for pid in there - set(self._known):
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                if environment:  # it is empty between fork and exec
                    self._known[pid] = self._mark in environment.split(b"\0")
        return [pid for pid, mine in self._known.items() if mine]

    def look(self) -> None:
        total = 0
        for pid in self.processes():
            with suppress(OSError, ValueError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self._cpu[pid] = (int(fields[11]) + int(fields[12])) / _TICKS
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        self.peak = max(self.peak, total / 1000)


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Usage:
    """Runs a command in a folder to its end, and ends what it leaves behind."""
    mark = uuid.uuid4().hex
    watch = _Watch(mark)
    log = folder / "output.txt"
    started, began = time.time(), time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, _MARK: mark},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch.start()
        try:
            code = process.wait()
        finally:
            seconds = time.perf_counter() - began
            watch.end()
            for pid in watch.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return Usage(started, seconds, watch.cpu_seconds, watch.peak, code, end)
