"""Tasks: which rows of a table, which classes, which feature columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from tune_steel.data import FAULT_NAMES, FEATURES, FLAGS, Table
from tune_steel.errors import DataError, OptionError
from tune_steel.features import Ints, as_text, shorten

STEEL_TASKS = ("binary", "multiclass", "faults7")
_MOST_CLASSES = 100


@dataclass(frozen=True)
class Task:
    """A table with a target: which rows, which classes, which feature columns.

    Attributes:
        name: `binary`, `multiclass`, `faults7`, or the table's name.
        classes: Class names; `y` holds indices into it. Of two classes, the second is positive.
        features: Raw feature columns of `frame`.
        frame: The features of the task's rows.
        y: Class index of each row of `frame`, int64 [n].
        rows: Index of each row in the original table, int64 [n].
        split: Default shares of train, validation and test.
    """

    name: str
    classes: tuple[str, ...]
    features: tuple[str, ...]
    frame: pd.DataFrame
    y: Ints
    rows: Ints
    split: tuple[float, float, float] = (0.70, 0.15, 0.15)


def steel_task(table: Table, name: str) -> Task:
    """One of the three tasks of the Steel Plates Faults table.

    The fault flags V28..V33 are the label and never a feature.
    """
    frame = table.frame
    fault = frame[list(FLAGS)].to_numpy().argmax(axis=1)
    named = frame["Class"].to_numpy() == 1
    split = (0.70, 0.15, 0.15)
    keep = np.ones(len(frame), dtype=bool)
    if name == "binary":
        classes: tuple[str, ...] = ("named_fault", "Other_Faults")
        y = (~named).astype(np.int64)
        split = (0.90, 0.05, 0.05)
    elif name == "multiclass":
        classes, y, keep = FAULT_NAMES, fault, named
    elif name == "faults7":
        classes = (*FAULT_NAMES, "Other_Faults")
        y = np.where(named, fault, len(FAULT_NAMES))
    else:
        raise OptionError(f"--task {name}: unknown; allowed: {', '.join(STEEL_TASKS)}")
    rows = np.flatnonzero(keep).astype(np.int64)
    features = frame.loc[keep, list(FEATURES)].reset_index(drop=True)
    return Task(name, classes, FEATURES, features, y[keep].astype(np.int64), rows, split)


def own_task(table: Table, target: str | None) -> Task:
    """The task of a table of one's own: every other column is a feature.

    Raises:
        DataError: The target is missing, has gaps, one class or too many values.
    """
    frame = table.frame
    target = target or table.target
    if target is None:
        raise OptionError("this table does not name its target; add --target COLUMN")
    if target not in frame.columns:
        raise DataError(
            f"--target {target}: no such column in {table.name}; "
            f"its columns: {shorten([str(c) for c in frame.columns])}"
        )
    if target == "Class" and set(FLAGS) <= set(frame.columns) and _fault_flags(frame):
        raise DataError(
            f"{table.name} is the Steel Plates Faults table, where V28..V33 are the label; "
            f"use --task {'|'.join(STEEL_TASKS)}, or drop those six"
        )
    labels = frame[target]
    gaps = int(labels.isna().sum())
    if gaps:
        raise DataError(
            f"target {target}: {gaps} rows have no label; remove them or fill them in (words like "
            "NA, None and null in a CSV mean none too: call such a class otherwise)"
        )
    values = labels.to_numpy()
    if pd.api.types.is_float_dtype(labels.dtype) and (values != np.round(values)).any():
        raise DataError(f"target {target}: fractional numbers; a classifier needs classes")
    try:
        unique, y = np.unique(values, return_inverse=True)
    except TypeError:  # numbers and strings mixed
        unique, y = np.unique(values.astype(str), return_inverse=True)
    if len(unique) < 2:
        raise DataError(f"target {target}: only one class ({unique[0]}); at least two are needed")
    if len(unique) > _MOST_CLASSES:
        raise DataError(
            f"target {target}: {len(unique)} different values; allowed are 2 to {_MOST_CLASSES} "
            "classes, so is this the right column?"
        )
    features = frame.drop(columns=target).reset_index(drop=True)
    features.columns = features.columns.astype(str)
    return Task(
        table.name,
        tuple(as_text(v) for v in unique),
        tuple(features.columns),
        features,
        y.astype(np.int64),
        np.arange(len(frame), dtype=np.int64),
    )


def _fault_flags(frame: pd.DataFrame) -> bool:
    """Whether V28..V33 flag one fault at most: columns of many other tables have such names."""
    flags = frame[list(FLAGS)].apply(pd.to_numeric, errors="coerce")
    return bool(flags.isin([0, 1]).all(axis=None) and (flags.sum(axis=1) <= 1).all())
