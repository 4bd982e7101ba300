"""One plain progress line, on stderr."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import math
import sys
import time
from collections import Counter
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from tune_steel.searcher import StudySearcher
from tune_steel.study import ENDED
from tune_steel.terminal import write


class ProgressLine(Callback):
    """Says how far the search is: in place on a terminal, else a line now and then."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else 15.0
        self._next = self._started + self._every

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called by Tune at every turn of its loop, at most 0.1 s apart."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._draw(end="" if self._terminal else "\n")

    def close(self) -> None:
        """Writes the last line."""
        self._draw(end="\n")

    def _draw(self, end: str) -> None:
        """Writes the line; an exception in a callback would end the search."""
        try:
            self._write(end)
        except Exception:
            self._next = math.inf

    def _write(self, end: str) -> None:
        states = Counter(record.state for record in self._searcher.records)
        best = min(
            (record for record in self._searcher.records if record.epochs),
            key=lambda record: record.epochs[-1]["best_val_loss"],
            default=None,
        )
        ended = sum(states[state] for state in ENDED)
        seconds = int(time.monotonic() - self._started)
        parts = [
            f"trials {ended}/{self._searcher.samples}",
            f"complete {states['COMPLETE']}",
            f"pruned {states['PRUNED']}",
            f"failed {states['FAIL']}",
            f"running {states['RUNNING']}",
        ]
        if states["LOST"]:
            parts.insert(-1, f"lost {states['LOST']}")
        if best is not None:
            parts.append(
                f"lowest val_loss {best.epochs[-1]['best_val_loss']:.4f} (#{best.number})"
            )
        parts.append(f"{seconds // 60}:{seconds % 60:02d}")
        line = "  ".join(parts)
        # Erase to the end of the line, because the new one may be shorter.
        write(sys.stderr, (f"\r{line}\x1b[K" if self._terminal else line) + end)
