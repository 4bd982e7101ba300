"""ASHA: which trials stop at which epoch."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

METRIC = "best_val_loss"
"""What ASHA, the sampler and the final choice read: the lowest validation loss so far."""


class ReferenceKeepingASHA(ASHAScheduler):
    """Ray's ASHA, except that trial 0, the space's default, always runs to its end.

    Its full curve is what the winner is compared with; it counts in the rungs like any other.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stops a trial that is not among the best 1 / reduction factor at its rung."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if trial.config["number"] == 0 and result["training_iteration"] < self._max_t:
            return TrialScheduler.CONTINUE
        return action


def make_scheduler(max_epochs: int, grace_period: int, reduction_factor: int) -> ASHAScheduler:
    """ASHA on the running best validation loss."""
    return ReferenceKeepingASHA(
        metric=METRIC,
        mode="min",
        max_t=max_epochs,
        grace_period=grace_period,
        reduction_factor=reduction_factor,
    )


def rungs(max_epochs: int, grace_period: int, reduction_factor: int) -> tuple[int, ...]:
    """Epochs after which ASHA may stop a trial, lowest first."""
    out = [grace_period]
    while out[-1] * reduction_factor < max_epochs:
        out.append(out[-1] * reduction_factor)
    return tuple(out)
