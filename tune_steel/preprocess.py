"""Feature transforms, one per replica, each fitted on that replica's training rows only.

Per replica: gaps in numeric columns are filled with the median, numeric columns are scaled,
columns with gaps get a flag, categories become one-hot. The state is plain arrays with a leading
replica axis, so that it is stored beside the weights and needs no pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tune_steel.features import Features, Floats, Ints, Schema

_MOST_QUANTILES = 1000
_FARTHEST = 1e4  # in scales from the center; in a table of fewer than 1e8 rows none is as far
_SMALLEST = 1e-140
_TAIL = 1e-7  # scikit-learn's QuantileTransformer clips there: +-5.2 standard deviations


@dataclass(frozen=True)
class Preprocessing:
    """Fitted transforms of R replicas.

    Attributes:
        scaling: `standard`, `robust` or `quantile`.
        schema: What the columns are.
        median: What fills gaps, [R, P].
        state: The scaling's arrays, each with a leading replica axis.
    """

    scaling: str
    schema: Schema
    median: Floats
    state: dict[str, Floats]

    @property
    def width(self) -> int:
        """The number D of features that the network sees."""
        return _width(self.schema)

    def transform(self, features: Features) -> NDArray[np.float32]:
        """Transforms rows by every replica's own fit: float32 [R, n, D]."""
        out = np.zeros((len(self.median), len(features), self.width), dtype=np.float32)
        for replica, median in enumerate(self.median):
            state = {name: array[replica] for name, array in self.state.items()}
            self._fill(out[replica], features, median, state)
        return out

    def _fill(
        self,
        out: NDArray[np.float32],
        features: Features,
        median: Floats,
        state: dict[str, Floats],
    ) -> None:
        gaps = np.isnan(features.numeric)
        complete = np.where(gaps, median, features.numeric)
        column = complete.shape[1]
        out[:, :column] = _SCALE[self.scaling](complete, state)
        flags = gaps[:, list(self.schema.flagged)]
        out[:, column : column + flags.shape[1]] = flags
        column += flags.shape[1]
        for i, (_, values) in enumerate(self.schema.categorical):
            known = np.flatnonzero(features.codes[:, i] >= 0)
            out[known, column + features.codes[known, i]] = 1.0
            column += len(values)


def fit_preprocessing(
    scaling: str, schema: Schema, features: Features, train: Sequence[Ints]
) -> Preprocessing:
    """Fits one transform for each replica.

    Args:
        scaling: `standard` (mean 0, variance 1), `robust` (median 0, interquartile range 1, then
            the smooth clip x / sqrt(1 + (x / 3)^2) of RealMLP, arXiv 2407.04491) or `quantile`
            (ranks mapped to a standard normal).
        schema: What the columns are.
        features: The rows that `train` counts in.
        train: Training positions of each replica; nothing else is read.
    """
    quantiles = min(_MOST_QUANTILES, *(len(rows) for rows in train))
    medians, states = [], []
    for rows in train:
        numeric = features.numeric[rows]
        gaps = np.isnan(numeric)
        numeric = np.where(gaps.all(axis=0), 0.0, numeric)
        # NumPy's own look for gaps, column by column, takes two fifths of a trial's preparation.
        median = np.nanmedian(numeric, axis=0) if gaps.any() else np.median(numeric, axis=0)
        complete = np.where(gaps, median, numeric)
        medians.append(median)
        states.append(_fit(scaling, complete, quantiles))
    state = {name: np.stack([s[name] for s in states]) for name in states[0]}
    return Preprocessing(scaling, schema, np.stack(medians), state)


def _width(schema: Schema) -> int:
    one_hot = sum(len(values) for _, values in schema.categorical)
    return len(schema.numeric) + len(schema.flagged) + one_hot


def _fit(scaling: str, x: Floats, quantiles: int) -> dict[str, Floats]:
    if scaling == "standard":
        return {"center": x.mean(axis=0), "scale": _inverse(x.std(axis=0), x)}
    if scaling == "robust":
        low, middle, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
        # RealMLP: where the quartiles coincide, half of the full range stands in for their range.
        spread = np.where(high > low, high - low, (x.max(axis=0) - x.min(axis=0)) / 2)
        return {"center": middle, "scale": _inverse(spread, x)}
    references = np.linspace(0, 1, quantiles)
    # Interpolation can break the order by a rounding error, which np.interp would not forgive.
    return {"quantiles": np.maximum.accumulate(_column_quantiles(x, references), axis=0)}


def _column_quantiles(x: Floats, references: Floats) -> Floats:
    """`np.quantile(x, references, axis=0)`, to the bit.

    NumPy partitions a column around each quantile; for many of them, sorting it once takes a tenth
    of the time.
    """
    ordered = np.sort(x, axis=0)
    position = references * (len(x) - 1)
    low = np.floor(position).astype(np.int64)
    share = (position - low)[:, None]
    before, after = ordered[low], ordered[np.minimum(low + 1, len(x) - 1)]
    step = after - before
    out: Floats = np.where(share < 0.5, before + step * share, after - step * (1 - share))
    return out


def _inverse(scale: Floats, x: Floats) -> Floats:
    """1 / scale, and 0 where a column is constant in a fold, or too small for a scale.

    Its networks could learn nothing of such a column, and another value in it would meet weights
    that were never trained, in whatever unit it has.
    """
    constant = x.min(axis=0) == x.max(axis=0)  # its deviation may be a rounding error
    constant |= scale < _SMALLEST  # the squares of such numbers underflow
    return np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, scale))


def _standard(x: Floats, state: dict[str, Floats]) -> Floats:
    # A value farther out than any training row, say a 1e20 for a gap: in single precision the
    # square of a distance to it would overflow, or hide what other features say in its rounding.
    return np.clip((x - state["center"]) * state["scale"], -_FARTHEST, _FARTHEST)


def _robust(x: Floats, state: dict[str, Floats]) -> Floats:
    scaled = _standard(x, state)
    return scaled / np.hypot(1, scaled / 3)  # the square of an extreme value would overflow


def _quantile(x: Floats, state: dict[str, Floats]) -> Floats:
    # Torch's, which a worker has already: scipy's costs it a quarter of a second and 17 MB.
    import torch

    quantiles = state["quantiles"]
    references = np.linspace(0, 1, len(quantiles))
    out = np.empty_like(x)
    for i in range(x.shape[1]):
        q = quantiles[:, i]
        if q[0] == q[-1]:  # constant, as in `_inverse`
            out[:, i] = 0
            continue
        # From both sides, so that a repeated value gets the middle of its ranks.
        below = np.interp(x[:, i], q, references)
        above = np.interp(-x[:, i], -q[::-1], -references[::-1])
        rank = np.clip((below - above) / 2, _TAIL, 1 - _TAIL)
        out[:, i] = torch.special.ndtri(torch.from_numpy(rank)).numpy()
    return out


_SCALE = {"standard": _standard, "robust": _robust, "quantile": _quantile}
