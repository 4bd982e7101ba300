"""When a search ends: samples, time, epochs, no progress, too many failures, or a signal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tune_steel.study import TrialRecord


@dataclass(frozen=True)
class Budget:
    """What a search may use; whichever comes first ends it.

    Attributes:
        samples: Trials that may end.
        seconds: Wall time of the search.
        epochs: Training epochs of all trials together.
        stalled: Trials that may end one after the other without a lower loss.
        give_up_after: Trials that may fail one after the other.
    """

    samples: int
    seconds: float | None = None
    epochs: int | None = None
    stalled: int | None = None
    give_up_after: int = 10


class Stop:
    """Whether and why a search ends.

    Attributes:
        reason: Why no trial is begun any more; None while the search goes on.
        now: Whether running trials are ended too.
        failed: Whether the reason is an error.
        signal: The signal that ended it, if one did.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._started: float | None = None
        self.reason: str | None = None
        self.now = False
        self.failed = False
        self.signal: str | None = None
        self._writing = False
        self._interrupted = False

    def end(self, reason: str, *, now: bool, failed: bool = False) -> None:
        """Ends the search; of several reasons the first one is kept."""
        self.now = self.now or now
        self.failed = self.failed or failed
        self.reason = self.reason or reason

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What happens inside is not torn by `interrupt`, which comes after it."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt, as soon as nothing is being written."""
        if not self._writing:
            raise KeyboardInterrupt
        self._interrupted = True

    def check_time(self) -> None:
        """To be called every now and then; the first call starts the clock."""
        now = time.monotonic()
        self._started = self._started or now
        most = self._budget.seconds
        if most is not None and now - self._started >= most:
            self.end(f"its time budget of {most:g} s is used up", now=True)

    def check_epochs(self, epochs: int) -> None:
        """To be called after every epoch with this process's epochs of all trials so far."""
        most = self._budget.epochs
        if most is not None and epochs >= most:
            self.end(f"its budget of {most} epochs is used up", now=True)

    def check_trials(self, ended: Sequence[TrialRecord], earlier: int) -> None:
        """To be called after every trial.

        Args:
            ended: Those that have ended, in the order they did.
            earlier: How many of them an earlier process ran; their failures are forgiven, and
                that they found nothing better.
        """
        budget = self._budget
        failures = _last_in_a_row(ended[earlier:])
        if len(failures) >= budget.give_up_after:
            self.end(
                f"{len(failures)} trials in a row failed, the last one with {failures[0].error}",
                now=True,
                failed=True,
            )
        if budget.stalled is not None:
            before, here = (
                [r.epochs[-1]["best_val_loss"] for r in part if r.state in ("COMPLETE", "PRUNED")]
                for part in (ended[:earlier], ended[earlier:])
            )
            best = min(before + here, default=math.inf)
            since = len(here) if best in before or not here else len(here) - 1 - here.index(best)
            if since >= budget.stalled:
                self.end(f"{budget.stalled} trials in a row found nothing better", now=False)


def _last_in_a_row(ended: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The failures since the last trial with a score, the last one first.

    A LOST one is none: a cluster's node that is taken away loses many at once. A config that is
    lost again and again fails.
    """
    failures: list[TrialRecord] = []
    for record in reversed(ended):
        if record.state == "FAIL":
            failures.append(record)
        elif record.state != "LOST":
            break
    return failures
