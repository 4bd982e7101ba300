"""Which trials stop at which epoch: ASHA, the median rule, or none."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from tune_steel.study import METRIC, TrialRecord

SchedulerName: TypeAlias = Literal["asha", "median", "none"]


class KeepsReference(TrialScheduler):
    """The space's default, slot 0, always runs to its end; it counts like any other trial.

    Its full curve is what the winner is compared with.

    Attributes:
        max_epochs: The most epochs of a trial.
        decisive: Epochs after which it may stop a trial.
    """

    max_epochs: int
    decisive: frozenset[int]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides after an epoch whether the trial goes on."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if trial.config["slot"] == 0 and result["training_iteration"] < self.max_epochs:
            return TrialScheduler.CONTINUE
        return action

    def refill(self, records: Iterable[TrialRecord]) -> None:
        """Lets earlier trials count, as if this scheduler had seen them."""


class Everything(KeepsReference, FIFOScheduler):
    """Every trial runs to its end."""


class Asha(KeepsReference, ASHAScheduler):
    """Ray's ASHA; Tune's own restore forgets its rungs."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Takes a failed trial out of the rungs; where its worker died, it comes again."""
        for _, recorded in self._brackets[0]._rungs:
            recorded.pop(trial.trial_id, None)

    def refill(self, records: Iterable[TrialRecord]) -> None:
        """Puts earlier trials into the rungs that they reached."""
        for record in records:
            for milestone, recorded in self._brackets[0]._rungs:
                if len(record.epochs) >= milestone:
                    # ASHA maximises.
                    loss = record.epochs[int(milestone) - 1][METRIC]
                    recorded[f"earlier-{record.number}"] = -loss


class Median(KeepsReference, MedianStoppingRule):
    """Ray's median rule (Golovin et al. 2017, Google Vizier, section 3.1.2)."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stops a trial whose lowest loss is above the median of the others' running means."""
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.CONTINUE:
            self._stopped_trials.discard(trial)  # the reference, which goes on all the same
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        """Tune brings the last result here once more; Ray's rule would count it twice."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        # Ray's rule pauses where others wait, but a paused function begins anew.
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Takes a failed trial out of the medians; where its worker died, it comes again."""
        self._results.pop(trial, None)

    def refill(self, records: Iterable[TrialRecord]) -> None:
        """Adds earlier trials to those that medians are taken of."""
        for record in records:
            if record.epochs:
                self._results[f"earlier-{record.number}"] = [
                    {"training_iteration": row["epoch"], METRIC: row[METRIC]}
                    for row in record.epochs
                ]


def make_scheduler(
    name: SchedulerName, max_epochs: int, grace_period: int, reduction_factor: int
) -> KeepsReference:
    """A scheduler on the running best validation loss.

    Args:
        name: `asha`, `median` or `none`.
        max_epochs: The most epochs of a trial.
        grace_period: Epochs before a trial may be stopped.
        reduction_factor: Of ASHA.
    """
    scheduler: KeepsReference
    if name == "asha":
        scheduler = Asha(
            metric=METRIC,
            mode="min",
            max_t=max_epochs,
            grace_period=grace_period,
            reduction_factor=reduction_factor,
        )
        scheduler.decisive = frozenset(rungs(max_epochs, grace_period, reduction_factor))
    elif name == "median":
        scheduler = Median(
            time_attr="training_iteration",
            metric=METRIC,
            mode="min",
            grace_period=grace_period,
        )
        scheduler.decisive = frozenset(range(grace_period, max_epochs))
    else:
        scheduler = Everything()  # type: ignore[no-untyped-call]
        scheduler.decisive = frozenset()
    scheduler.max_epochs = max_epochs
    return scheduler


def rungs(max_epochs: int, grace_period: int, reduction_factor: int) -> tuple[int, ...]:
    """Epochs after which ASHA may stop a trial, lowest first."""
    out = [grace_period]
    while out[-1] * reduction_factor < max_epochs:
        out.append(out[-1] * reduction_factor)
    return tuple(out)
