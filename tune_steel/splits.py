"""Frozen splits and folds, the development rows that workers get, the sealed test rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from tune_steel.errors import DataError, OptionError
from tune_steel.features import Features, Floats, Ints, Schema, learn_schema
from tune_steel.seeds import derive
from tune_steel.tasks import Task


@dataclass(frozen=True)
class Splits:
    """Frozen by data, task, seed and shares; positions are into the task's rows.

    Attributes:
        train: Positions of the training rows, sorted.
        val: Positions of the validation rows of the plain split, sorted; folds make no use of
            them, and where they cannot be cut there are none.
        test: Positions of the test rows, sorted.
        folds: Train and validation positions of each replica; one pair is the plain split.
    """

    train: Ints
    val: Ints
    test: Ints
    folds: tuple[tuple[Ints, Ints], ...]

    @property
    def development(self) -> Ints:
        """Positions of all rows that the search may see, sorted."""
        return np.sort(np.concatenate([self.train, self.val]))


def split_hash(rows: Ints) -> str:
    """SHA-256 of row indices, hexadecimal."""
    return hashlib.sha256(np.sort(rows).astype("<i8").tobytes()).hexdigest()


def check_split(split: Sequence[float]) -> None:
    """Raises OptionError unless three positive shares sum to 1."""
    if len(split) != 3 or not min(split) > 0 or not abs(sum(split) - 1) <= 1e-6:
        raise OptionError(
            f"--split {' '.join(f'{s:g}' for s in split)}: three shares above 0 that sum to 1 "
            f"(train, validation, test); these sum to {sum(split):g}"
        )


def freeze(task: Task, *, seed: int, split: Sequence[float], folds: int) -> Splits:
    """Cuts the task's rows, stratified: test first, so that `folds` never changes it.

    Raises:
        DataError: A class has too few rows for the splits.
    """
    # Takes a second to import; workers, which get the splits, do not cut them.
    from sklearn.model_selection import train_test_split

    check_split(split)
    _, val_share, test_share = split
    everything = np.arange(len(task.y))
    try:
        development, test = train_test_split(
            everything,
            test_size=max(round(test_share * len(everything)), 1),
            stratify=task.y,
            random_state=derive(seed, "test split"),
        )
    except ValueError as error:
        raise _too_rare(task, "splits") from error
    return cut(
        task,
        development,
        test,
        seed=seed,
        validation=max(round(val_share * len(everything)), 1),
        folds=folds,
    )


def cut(
    task: Task, development: Ints, test: Ints, *, seed: int, validation: int, folds: int
) -> Splits:
    """Cuts development rows into training and validation rows and folds, stratified.

    Args:
        task: The task.
        development: Positions of the rows that a search may see.
        test: Positions of those that it may not.
        seed: Seed of the run.
        validation: How many rows the plain split validates on.
        folds: How many replicas; 1 is the plain split.

    Raises:
        DataError: A class has too few rows for the splits.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    try:
        train, val = train_test_split(
            development,
            test_size=validation,
            stratify=task.y[development],
            random_state=derive(seed, "validation split"),
        )
    except ValueError as error:
        if folds == 1:
            raise _too_rare(task, "splits") from error
        train, val = development, development[:0]  # folds validate on other rows anyway
    for rows in (train, val, test) if folds == 1 else (development, test):
        if (np.bincount(task.y[rows], minlength=len(task.classes)) == 0).any():
            raise _too_rare(task, "splits")
    train, val, test = (np.sort(rows).astype(np.int64) for rows in (train, val, test))
    if folds == 1:
        return Splits(train, val, test, ((train, val),))
    development = np.sort(np.concatenate([train, val]))
    if np.bincount(task.y[development]).min() < folds:
        raise _too_rare(task, f"{folds} folds")
    cuts = StratifiedKFold(folds, shuffle=True, random_state=derive(seed, "folds")).split(
        development, task.y[development]
    )
    pairs = tuple(
        (development[a].astype(np.int64), development[b].astype(np.int64)) for a, b in cuts
    )
    return Splits(train, val, test, pairs)


def _too_rare(task: Task, what: str) -> DataError:
    counts = np.bincount(task.y, minlength=len(task.classes))
    rarest = int(counts.argmin())
    return DataError(
        f"class {task.classes[rarest]!r} has {counts[rarest]} rows, too few for the {what}: every "
        "split and fold needs at least one; merge or remove the class, change --split, or take "
        "fewer folds"
    )


@dataclass(frozen=True)
class Development:
    """All that a trial may see: the development rows, cut into replicas.

    Attributes:
        features: Features of the development rows [n].
        y: Their classes, int64 [n].
        rows: Their indices in the original table, int64 [n].
        folds: For each replica the positions (into these rows) it trains on and validates on.
        classes: Class names.
        reference_weights: The task's class weights, inverse frequency in the development
            rows, float64 [C]; the validation loss of every trial uses them.
        schema: What the columns are.
    """

    features: Features
    y: Ints
    rows: Ints
    folds: tuple[tuple[Ints, Ints], ...]
    classes: tuple[str, ...]
    reference_weights: Floats
    schema: Schema


@dataclass
class SealedTest:
    """The test rows. `open` works once; only `evaluate` calls it.

    Attributes:
        rows: Indices of the test rows in the original table, int64 [n].
    """

    rows: Ints
    _features: Features = field(repr=False)
    _y: Ints = field(repr=False)
    _opened: bool = False

    def open(self) -> tuple[Features, Ints]:
        """Features and classes of the test rows.

        Raises:
            RuntimeError: They have been opened before.
        """
        if self._opened:
            raise RuntimeError("the test rows have been opened before; they are opened once")
        self._opened = True
        return self._features, self._y

    def __reduce__(self) -> NoReturn:
        raise TypeError("the test rows do not travel: workers never see them")


def prepare(task: Task, splits: Splits) -> tuple[Development, SealedTest, list[str]]:
    """Encodes the development rows and seals the test rows.

    Returns:
        The development rows, the sealed test rows, and lines about dropped columns.
    """
    positions = splits.development
    frame = task.frame.iloc[positions]
    schema, notes = learn_schema(frame, task.features)
    y = task.y[positions]
    counts = np.bincount(y, minlength=len(task.classes))
    development = Development(
        features=schema.encode(frame),
        y=y,
        rows=task.rows[positions],
        folds=tuple(
            (np.searchsorted(positions, train), np.searchsorted(positions, val))
            for train, val in splits.folds
        ),
        classes=task.classes,
        reference_weights=len(y) / (len(task.classes) * counts.astype(np.float64)),
        schema=schema,
    )
    test = task.frame.iloc[splits.test]
    return (
        development,
        SealedTest(task.rows[splits.test], schema.encode(test), task.y[splits.test]),
        notes,
    )
