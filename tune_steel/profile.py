"""Where the time of a run goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Part = Literal["search", "sampling", "reporting", "retraining", "test", "tables"]


@dataclass
class Times:
    """Seconds of one process of a run, counted where they are spent.

    Attributes:
        slots: Trials at once.
        start: From the start of the process to that of the search.
        first_epoch: From the start of the process to that of its first epoch; None before.
        search: The search.
        training: Of its slots, in training epochs.
        scoring: Of its slots, in scoring them.
        preparing: Of its slots, inside trials beside that: imports, preprocessing, first weights.
        waiting: Of its slots, until the driver had answered to a report.
        sampling: Of the driver, in asking the study for configs.
        reporting: Of the driver, in telling it of epochs and ends.
        retraining: Training members and rivals again, and fitting the ensemble.
        test: Boosting, and the look at the test rows.
        tables: Writing tables and model.
    """

    slots: int = 0
    start: float = 0.0
    first_epoch: float | None = None
    search: float = 0.0
    training: float = 0.0
    scoring: float = 0.0
    preparing: float = 0.0
    waiting: float = 0.0
    sampling: float = 0.0
    reporting: float = 0.0
    retraining: float = 0.0
    test: float = 0.0
    tables: float = 0.0

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Adds the wall time of what happens inside to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - began)

    def add_epoch(self, result: Mapping[str, Any]) -> None:
        """Adds what a worker reported with an epoch; a simulated one reports no times."""
        if self.first_epoch is None:
            self.first_epoch = process_age() - result.get("seconds", 0.0)
        scoring = result.get("scoring_seconds", 0.0)
        self.scoring += scoring
        self.training += result.get("seconds", 0.0) - scoring
        self.preparing += result.get("preparing_seconds", 0.0)
        self.waiting += result.get("waiting_seconds", 0.0)


def breakdown(times: Times) -> dict[str, Any]:
    """The parts of a run's wall time, of its slots and of its driver, in seconds.

    Args:
        times: What was counted.

    Returns:
        `wall`, the steps of the job; `first_epoch`, when it began; `slots`, which add up to
        `slot_seconds`, the search times its slots, where `between` is what lies between two
        trials, the start of the workers and trials that died; `driver`, what the driver did
        during the search.
    """
    slot_seconds = times.slots * times.search
    inside = {
        "training": times.training,
        "scoring": times.scoring,
        "preparing": times.preparing,
        "waiting": times.waiting,
    }
    return {
        "wall": {
            "start": times.start,
            "search": times.search,
            "retraining": times.retraining,
            "test": times.test,
            "tables": times.tables,
        },
        "first_epoch": times.first_epoch,
        "slot_seconds": slot_seconds,
        "slots": inside | {"between": max(slot_seconds - sum(inside.values()), 0.0)},
        "driver": {"sampling": times.sampling, "reporting": times.reporting},
    }


def profile_table(profile: Mapping[str, Any]) -> Table:
    """What `breakdown` gave, with the share of the slots' or the search's time."""
    title = "Where the time went"
    table = Table(title=Text(title), title_justify="left", min_width=len(title))
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in profile["wall"].items():
        table.add_row(name, f"{seconds:.1f}", "")
        if name == "start" and profile["first_epoch"] is not None:
            table.add_row("", "", f"first epoch at {profile['first_epoch']:.1f} s")
    for group, of, whole in (
        ("slots", "of the slots", profile["slot_seconds"]),
        ("driver", "of the search", profile["wall"]["search"]),
    ):
        table.add_section()
        for name, seconds in profile[group].items():
            share = f"{100 * seconds / whole:.1f} % {of}" if whole else ""
            table.add_row(name, f"{seconds:.1f}", share)
    return table


def process_age() -> float:
    """Seconds since this process began."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, starttime, since the boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began
