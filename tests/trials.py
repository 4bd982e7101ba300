"""Trials that ran in this process, on the stand-in."""

from typing import Any, TypeAlias

from tune_steel.fit import Fit
from tune_steel.seeds import derive, replica_seeds
from tune_steel.space import Space
from tune_steel.splits import Development, SealedTest
from tune_steel.study import TrialRecord
from tune_steel.trainable import report_row

Rows: TypeAlias = tuple[Development, SealedTest]

# What learns from the training rows before the first step, too.
_WAVES = {"embedding": "pbld", "embedding_width": 3, "frequency_scale": 0.2}
_BINS = {"embedding": "piecewise_tree", "embedding_width": 3, "bins": 4}
LEARNING: tuple[dict[str, Any], ...] = (
    {"family": "nca", "blocks": 1, "width": 16, **_WAVES},
    {"family": "mlp", "depth": 1, "width_1": 8, **_BINS},
)


def trial(space: Space, development: Development, number: int = 0, **params: Any) -> TrialRecord:
    """A trial that ran to its end."""
    values = {**space.defaults(), **params}
    config = space.config(values)
    seed = derive("t", number)
    record = TrialRecord(number, number, seed, values, config, state="COMPLETE")
    seeds = replica_seeds(record.seed, len(development.folds))
    fit = Fit(record.config, development, development.folds, seeds)
    record.epochs = [{**report_row(r), "node": "here"} for r in fit.epochs(12)]
    return record
