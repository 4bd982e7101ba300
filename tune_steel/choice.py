"""Which trials of a finished search go on: the best one, and the members of the ensemble."""

from __future__ import annotations

from collections.abc import Sequence

from tune_steel.options import Options
from tune_steel.scheduler import rungs
from tune_steel.study import METRIC, SCORED, TrialRecord


def candidates(records: list[TrialRecord], options: Options) -> list[TrialRecord]:
    """The trials that had a full chance, the one with the lowest validation loss first.

    They ran to their end, or were stopped by ASHA at its top rung. Where none did, because the
    search was cut short, those that the scheduler stopped earlier stand in.
    """
    top = options.max_epochs
    if options.scheduler == "asha":
        top = rungs(options.max_epochs, options.grace_period, options.reduction_factor)[-1]
    scored = [r for r in records if r.state in SCORED]
    full = [r for r in scored if r.state == "COMPLETE" or len(r.epochs) >= top]
    return sorted(full or scored, key=lambda record: record.epochs[-1][METRIC])


def choose(records: list[TrialRecord], options: Options) -> TrialRecord | None:
    """The best candidate."""
    return next(iter(candidates(records, options)), None)


def default_trial(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial of the space's default config."""
    return next((r for r in reversed(records) if r.slot == 0 and r.state in SCORED), None)


def members(ranked: list[TrialRecord], most: int) -> list[TrialRecord]:
    """The best trials, of at least two families of networks where two are among the candidates.

    Networks of different families err on different rows, which is what an ensemble lives on; the
    last place goes to the best trial of another family where all places went to one.

    Args:
        ranked: The candidates, best first.
        most: How many trials at most.
    """
    taken, rest = ranked[:most], ranked[most:]
    families = {record.config.model.family for record in taken}
    if len(families) == 1 and most > 1:
        others = [r for r in rest if r.config.model.family not in families]
        if others:
            taken = [*taken[: most - 1], others[0]]
    return taken
