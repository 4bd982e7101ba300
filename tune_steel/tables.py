"""The tables of a run: fixed Parquet schemas, a description with every column, atomic writes.

The description of a column is in the Parquet file too, as the field's metadata `doc`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tune_steel.scores import SCORES, score_names

Row = Mapping[str, Any]


def _field(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    return pa.field(name, kind, metadata={"doc": doc})


_RUN = [
    _field("run", pa.string(), "Name of the run, that is, of its folder."),
    _field("task", pa.string(), "Name of the task or of the user's table."),
    _field(
        "data_source",
        pa.string(),
        "file, cache, openml or stand-in; scores on the stand-in say nothing about real data.",
    ),
]


_MODELS = (
    "ensemble (the final model), bagged (the best trial's fold models), tuned (the best trial on "
    "all development rows), default (the default config, likewise) or boosting."
)


def _scores(classes: int, when: str) -> list[pa.Field]:
    return [
        _field(f"val_{name}", pa.float64(), f"Validation {SCORES[name]}; {when}")
        for name in score_names(classes)
    ]


def epochs_schema(classes: int) -> pa.Schema:
    """`epochs.parquet`: a row for each trial and epoch; scores are means over the folds."""
    return pa.schema(
        [
            *_RUN,
            _field("trial", pa.int32(), "Trial number in the study, from 0."),
            _field("epoch", pa.int32(), "Epoch, from 1."),
            _field("train_loss", pa.float64(), "Training loss with the config's class weights."),
            *_scores(classes, "mean over the folds."),
            _field("fold_val_loss", pa.list_(pa.float64()), "val_loss of each fold."),
            _field("best_val_loss", pa.float64(), "Lowest val_loss of the trial so far."),
            _field("best_epoch", pa.int32(), "The epoch that best_val_loss comes from."),
            _field("learning_rate", pa.float64(), "Learning rate in this epoch."),
            _field("seconds", pa.float64(), "Wall time of the epoch, in seconds."),
        ]
    )


def trials_schema(classes: int, params: Mapping[str, pa.DataType]) -> pa.Schema:
    """`trials.parquet`: a row for each trial.

    Args:
        classes: Number of classes of the task.
        params: Arrow type of each searched parameter, by dotted key.
    """
    return pa.schema(
        [
            *_RUN,
            _field("trial", pa.int32(), "Trial number in the study, from 0."),
            _field(
                "state",
                pa.string(),
                "COMPLETE (ran to its end), PRUNED (stopped by the scheduler), FAIL (raised); "
                "INTERRUPTED (the search ended first) and LOST (its worker died): the config is "
                "tried again in another trial.",
            ),
            _field(
                "slot",
                pa.int32(),
                "How many configs were sampled before; a config that is tried again keeps it, and "
                "with it the seed. 0 is the space's default.",
            ),
            _field("retry_of", pa.int32(), "The trial whose config this one tries again."),
            _field("seed", pa.int64(), "Seed of the trial, derived from the run's."),
            _field("epochs", pa.int32(), "Epochs that were trained."),
            _field("best_epoch", pa.int32(), "Epoch with the lowest val_loss."),
            *_scores(classes, "at the best epoch, mean over the folds."),
            _field("fold_val_loss", pa.list_(pa.float64()), "val_loss of each fold there."),
            _field("seconds", pa.float64(), "Wall time in the worker, in seconds."),
            _field("node", pa.string(), "Address of the node that ran the trial."),
            _field("error", pa.string(), "What a failed trial raised."),
            _field("config", pa.string(), "The trial's whole config, as JSON."),
            *(
                _field(key, kind, "Searched parameter; null where its condition does not hold.")
                for key, kind in params.items()
            ),
        ]
    )


def predictions_schema(classes: int) -> pa.Schema:
    """`predictions.parquet`: a row for each model, seed and predicted row."""
    return pa.schema(
        [
            *_RUN,
            _field("model", pa.string(), _MODELS),
            _field(
                "split",
                pa.string(),
                "test, or out-of-fold: by the models of the other folds. Those of the ensemble "
                "and of bagged are cross-fitted (weights and calibrations are those of the other "
                "folds too, unless there is only one), those of tuned are the search's own at the "
                "best epoch.",
            ),
            _field("seed", pa.int32(), "Number of the seed; null is the mean of the seeds."),
            _field("fold", pa.int32(), "Fold whose model predicts; null for test rows."),
            _field("row", pa.int64(), "Index of the row in the original table, from 0."),
            _field("y", pa.int32(), "Class index."),
            _field("label", pa.string(), "Class name."),
            *(_field(f"p{i}", pa.float64(), f"Probability of class {i}.") for i in range(classes)),
        ]
    )


def scores_schema() -> pa.Schema:
    """`scores.parquet`: a row for each model, split and score."""
    return pa.schema(
        [
            *_RUN,
            _field("model", pa.string(), _MODELS),
            _field(
                "split",
                pa.string(),
                "test, or validation: mean over the folds, of which the scores of ensemble and "
                "bagged are cross-fitted where there are several.",
            ),
            _field("rows", pa.int32(), "Rows that were scored."),
            _field("score", pa.string(), "Name of the score."),
            _field("value", pa.float64(), "Score of the averaged prediction."),
            _field(
                "low",
                pa.float64(),
                "Lower end of its 95 % bootstrap interval; null where no draw of the rows changes "
                "the score, as where no row is wrong.",
            ),
            _field("high", pa.float64(), "Upper end of it."),
            _field(
                "ensemble_minus",
                pa.float64(),
                "The ensemble's test score minus this one; null for the ensemble.",
            ),
            _field(
                "ensemble_minus_low",
                pa.float64(),
                "Lower end of its 95 % bootstrap interval, both scored on the same draws of rows.",
            ),
            _field("ensemble_minus_high", pa.float64(), "Upper end of it."),
            _field("seeds", pa.int32(), "Seeds that were averaged."),
            _field("seed_mean", pa.float64(), "Mean of the single seeds' scores."),
            _field("seed_sd", pa.float64(), "Their standard deviation; null for one seed."),
        ]
    )


def write_table(path: Path, rows: Iterable[Row], schema: pa.Schema) -> None:
    """Writes rows as Parquet, whole or not at all.

    Args:
        path: Where to; replaced when there is one.
        rows: Mappings; what a row lacks is null, what the schema lacks is an error.
        schema: Fixes names, order and types.
    """
    rows = list(rows)
    unknown = {key for row in rows for key in row} - set(schema.names)
    if unknown:
        raise ValueError(f"{path.name} has no column {', '.join(sorted(unknown))}")
    table = pa.Table.from_pylist(rows, schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_blocks(
    path: Path, blocks: Iterable[Mapping[str, Any]], schema: pa.Schema, **fixed: str
) -> None:
    """Writes blocks of columns as Parquet, one in memory at a time, whole or not at all.

    Args:
        path: Where to; replaced when there is one.
        blocks: Column name to an array, or to one value for all rows of the block; each block
            has at least one array.
        schema: Fixes names, order and types; a column that a block lacks is null.
        fixed: Columns that are the same in every block.
    """

    def columns(block: Mapping[str, Any]) -> pa.Table:
        given = {**fixed, **block}
        rows = next(len(value) for value in block.values() if isinstance(value, np.ndarray))
        whole = {}
        for name, kind in zip(schema.names, schema.types, strict=True):
            value = given.get(name)
            array = isinstance(value, np.ndarray)
            whole[name] = value if array else pa.repeat(pa.scalar(value, kind), rows)
        return pa.table(whole).cast(schema)

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for block in blocks:
            writer.write_table(columns(block))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes its place when all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:  # or a power cut could leave an empty file there
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parameter_type(values: Sequence[object], *, fractions: bool) -> pa.DataType:
    """Arrow type of a searched parameter.

    Args:
        values: Its choices, or the ends of its range.
        fractions: Whether it is a range of floats, whose ends may be written as integers.
    """
    if all(isinstance(v, bool) for v in values):
        return pa.bool_()
    if all(isinstance(v, str) for v in values):
        return pa.string()
    return (
        pa.int64() if not fractions and all(isinstance(v, int) for v in values) else pa.float64()
    )
