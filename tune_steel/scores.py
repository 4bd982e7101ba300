"""The scores, by name, and their bootstrap intervals, of class probabilities in NumPy.

`metrics.py` computes the same scores each epoch through torchmetrics; a test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tune_steel.features import Floats, Ints

SCORES = {
    "loss": "cross-entropy weighted with the task's fixed class weights (inverse frequency)",
    "log_loss": "cross-entropy without class weights",
    "accuracy": "share of rows whose class is right",
    "macro_accuracy": "mean recall of the classes (balanced accuracy)",
    "macro_precision": "mean precision of the classes",
    "macro_f1": "mean F1 of the classes",
    "auroc": "area under the ROC curve, one class against the rest, mean of the classes",
    "positive_precision": "precision of the second class (two classes only)",
    "negative_precision": "precision of the first class (two classes only)",
}
"""What each score is, in the order of every table. Lower is better for the two losses."""

RESAMPLES = 2000
_LEAST_PROBABILITY = 1e-300  # only an exact 0 is lifted
_CELLS_A_CHUNK = 4_000_000
_SAME = 1e-12


def score_names(classes: int) -> tuple[str, ...]:
    """The scores of a task with that many classes."""
    names = tuple(SCORES)
    return names if classes == 2 else names[:-2]


@dataclass(frozen=True)
class Interval:
    """A score, or a difference of scores, and its 95 % interval.

    Attributes:
        value: Of the rows as they are.
        low: None where no draw of the rows changes the value, as where no row is wrong: such rows
            do not tell how far it would move.
        high: As low.
    """

    value: float
    low: float | None
    high: float | None

    def said(self, sign: str = "") -> str:
        """In words, with `+` before what is above 0 where that is the sign."""
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.3f} [-]"
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def decide(p: Floats, threshold: float | None = None) -> Ints:
    """The predicted class of each row [n].

    Args:
        p: Probabilities [n, C].
        threshold: Two classes: the probability above which a row counts as of the second class;
            None takes the most probable class.
    """
    predicted = p.argmax(axis=1) if threshold is None else p[:, 1] > threshold
    return predicted.astype(np.int64)


def score(
    p: Floats, y: Ints, reference_weights: Floats, threshold: float | None = None
) -> dict[str, float]:
    """Scores of class probabilities.

    Args:
        p: Probabilities [n, C].
        y: Class indices [n].
        reference_weights: The task's class weights [C].
        threshold: As in `decide`.
    """
    predicted = decide(p, threshold)
    once = _weighted(p, predicted, y, reference_weights, np.ones((1, len(y))))
    return {name: float(values[0]) for name, values in once.items()}


def resample(
    p: Floats,
    y: Ints,
    reference_weights: Floats,
    seed: int,
    resamples: int = RESAMPLES,
    threshold: float | None = None,
) -> dict[str, Floats]:
    """Scores of rows that are drawn anew, each [S].

    Rows are drawn with replacement within each class, because the splits are stratified: the
    class counts are not random. With the same seed the draws are the same whatever p is, so that
    the scores of two models can be subtracted.

    Args:
        p: Probabilities [n, C].
        y: Class indices [n].
        reference_weights: The task's class weights [C].
        seed: Seed of the draws.
        resamples: How many, S.
        threshold: As in `decide`.
    """
    rng = np.random.default_rng(seed)
    predicted = decide(p, threshold)
    members = [np.flatnonzero(y == c) for c in range(p.shape[1])]
    drawn: dict[str, list[Floats]] = {name: [] for name in score_names(p.shape[1])}
    chunk = max(_CELLS_A_CHUNK // len(y), 1)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = np.zeros((size, len(y)))
        for rows in members:
            if len(rows):
                even = np.full(len(rows), 1 / len(rows))
                counts[:, rows] = rng.multinomial(len(rows), even, size=size)
        for name, values in _weighted(p, predicted, y, reference_weights, counts).items():
            drawn[name].append(values)
    return {name: np.concatenate(values) for name, values in drawn.items()}


def interval(value: float, drawn: Floats) -> Interval:
    """The 95 % percentile bootstrap interval.

    It says how far the value would move with other rows of the same kind; it does not cover
    another training set.

    Args:
        value: Of the rows as they are.
        drawn: Of rows that were drawn anew [S].
    """
    if np.nanmax(drawn) - np.nanmin(drawn) < _SAME:
        return Interval(value, None, None)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def confusion(p: Floats, y: Ints, threshold: float | None = None) -> Ints:
    """Confusion matrix [true class, predicted class]; the threshold is that of `decide`."""
    classes = p.shape[1]
    cells = np.bincount(y * classes + decide(p, threshold), minlength=classes * classes)
    return cells.reshape(classes, classes)


def confusion_interval(table: Ints) -> tuple[Ints, Ints]:
    """95 % interval of each cell of a confusion matrix, for as many rows of its true class.

    Exact (Clopper & Pearson, 1934), so that no errors among eight rows are not none for certain;
    rounded outwards to whole rows.

    Args:
        table: Counts [true class, predicted class].

    Returns:
        Low and high counts, each of the table's shape.
    """
    from scipy.special import betaincinv  # workers import this room and have no use for it

    rows = table.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        low = np.where(table > 0, betaincinv(table, rows - table + 1, 0.025), 0.0)
        high = np.where(table < rows, betaincinv(table + 1, rows - table, 0.975), 1.0)
    return (
        np.floor(rows * low).astype(table.dtype),
        np.ceil(rows * high).astype(table.dtype),
    )


def _weighted(
    p: Floats, decided: Ints, y: Ints, weights: Floats, counts: Floats
) -> dict[str, Floats]:
    """Scores [S] of rows that are counted `counts` [S, n] times."""
    classes = p.shape[1]
    predicted = np.eye(classes)[decided]
    truth = np.eye(classes)[y]
    nll = -np.log(np.clip(p[np.arange(len(y)), y], _LEAST_PROBABILITY, None))
    hits = counts @ (predicted * truth)
    support = counts @ truth
    claimed = counts @ predicted
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / support
        precision = np.where(claimed > 0, hits / claimed, 0.0)
        f1 = 2 * hits / (support + claimed)
    # A class that is neither there nor predicted counts in no macro average (as in torchmetrics).
    absent = support + claimed == 0
    out = {
        "loss": counts @ (weights[y] * nll) / (counts @ weights[y]),
        "log_loss": counts @ nll / counts.sum(axis=1),
        "accuracy": hits.sum(axis=1) / counts.sum(axis=1),
        "macro_accuracy": np.nanmean(recall, axis=1),
        "macro_precision": _mean(precision, absent),
        "macro_f1": _mean(f1, absent),
        "auroc": _auroc(p, truth, counts),
    }
    if classes == 2:
        out["positive_precision"] = precision[:, 1]
        out["negative_precision"] = precision[:, 0]
    return out


def _mean(values: Floats, absent: NDArray[np.bool_]) -> Floats:
    mean: Floats = np.where(absent, 0.0, values).sum(axis=1) / (~absent).sum(axis=1)
    return mean


def _auroc(p: Floats, truth: Floats, counts: Floats) -> Floats:
    """Macro one-versus-rest AUROC [S]; ties count half (Mann-Whitney U)."""
    classes = range(p.shape[1]) if p.shape[1] > 2 else range(1, 2)
    areas = []
    for c in classes:
        order = np.argsort(p[:, c], kind="stable")
        _, starts = np.unique(p[order, c], return_index=True)
        positive = np.add.reduceat(counts[:, order] * truth[order, c], starts, axis=1)
        negative = np.add.reduceat(counts[:, order] * (1 - truth[order, c]), starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        wins = (positive * (below + negative / 2)).sum(axis=1)
        with np.errstate(invalid="ignore"):
            areas.append(wins / (positive.sum(axis=1) * negative.sum(axis=1)))
    mean: Floats = np.nanmean(np.stack(areas), axis=0)
    return mean
