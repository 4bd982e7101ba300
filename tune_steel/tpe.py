"""Optuna's tree-structured Parzen estimator, one parameter at a time, computed over arrays.

Optuna's own `TPESampler(multivariate=False)` walks in Python over all trials for every parameter.
This one keeps the trials as arrays and draws the same random numbers, so from the same study and
seed it proposes the same values, but for rounding (tests/test_tpe.py).

Source: Watanabe, "Tree-Structured Parzen Estimator", 2023, arXiv 2304.11127; Optuna 5.0.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr, ndtr, ndtri_exp

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

# All as Optuna has them.
_STARTUP = 10
_CANDIDATES = 24
_BELOW_SHARE, _MOST_BELOW = 0.1, 25
_FULL_WEIGHT = 25
_PRIOR_WEIGHT = 1.0
_NARROWEST = 100.0

# Widths beyond which a normal distribution has less than rounding.
_WHOLE = 9.0
# Kernels that are evaluated together: few enough to stay in a core's cache.
_BLOCK = 512
# Widths at which a normal density is 1e-27 of its peak: far below rounding beside the prior.
_REACH = 11.0


class TPE(BaseSampler):
    """Samples each parameter where good trials are dense and the others are not.

    Stopped trials count as worse than every complete one, those that came further first; running
    ones count as bad, so that workers do not try the same; failed ones do not count. The study
    minimises, and has no constraints.
    """

    def __init__(self, seed: int) -> None:
        # Optuna's generator: another one would propose other values.
        self._rng = np.random.RandomState(seed)
        self._startup = RandomSampler(seed=seed)
        self._split: Split | None = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Forgets what another trial was sampled from."""
        self._split = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """No parameters are sampled together."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """No parameters are sampled together."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The value of one parameter."""
        if self._split is None:
            history = _HISTORIES.setdefault(study, History())
            history.update(study)
            self._split = history.split(trial.number)
        if self._split.finished < _STARTUP:
            return self._startup.sample_independent(study, trial, param_name, param_distribution)
        below, above = densities(self._split, param_name, param_distribution)
        candidates = below.draw(self._rng, _CANDIDATES)
        gain = np.log(below.density(candidates)) - np.log(above.density(candidates))
        return param_distribution.to_external_repr(candidates[np.argmax(gain)].item())


@dataclass
class Column:
    """The values of a parameter in all trials.

    Attributes:
        values: In Optuna's terms, by number of the trial; NaN where it has none.
        order: The numbers of those that have one, by value, equals by number.
    """

    values: Floats
    order: Ints


class History:
    """The trials of a study as arrays over their numbers.

    It holds nothing that the study does not, so a sampler with a new one proposes the same.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._unfinished: list[int] = []
        self._ranking: list[tuple[int, float, float, int]] = []
        self._counts = np.zeros(0, dtype=np.bool_)
        self._columns: dict[str, Column] = {}

    def update(self, study: optuna.Study) -> None:
        """Takes in what has happened since the last time."""
        trials = study.get_trials(deepcopy=False)
        if len(trials) > len(self._counts):
            size = 2 * len(trials)
            self._counts = _grown(self._counts, size, False)
            for column in self._columns.values():
                column.values = _grown(column.values, size, np.nan)
        new: dict[str, list[int]] = {}
        changing, self._unfinished = self._unfinished, []
        for number in chain(changing, range(self._seen, len(trials))):
            trial = trials[number]
            if not trial.state.is_finished():
                self._unfinished.append(number)
            elif trial.state != TrialState.FAIL:
                bisect.insort(self._ranking, (*_rank(trial), number))
            counts = trial.state not in (TrialState.FAIL, TrialState.WAITING)
            self._counts[number] = counts
            for name, value in trial.params.items() if counts else ():
                if name not in self._columns:
                    self._columns[name] = _nothing(len(self._counts))
                values = self._columns[name].values
                if np.isnan(values[number]):
                    values[number] = trial.distributions[name].to_internal_repr(value)
                    new.setdefault(name, []).append(number)
        for name, numbers in new.items():
            _sort_in(self._columns[name], numbers)
        self._seen = len(trials)

    def split(self, number: int) -> Split:
        """The trials, divided into the good ones and the others, for sampling a new one.

        Args:
            number: The new one, which does not count.
        """
        finished = len(self._ranking)
        good = min(math.ceil(_BELOW_SHARE * finished), _MOST_BELOW)
        below = np.zeros_like(self._counts)
        below[[rank[-1] for rank in self._ranking[:good]]] = True
        above = self._counts & ~below
        above[number] = False
        return Split(finished, below, above, self._columns)


_HISTORIES: WeakKeyDictionary[optuna.Study, History] = WeakKeyDictionary()


def _grown(array: NDArray[Any], size: int, fill: float | bool) -> NDArray[Any]:
    out = np.full(size, fill, dtype=array.dtype)
    out[: len(array)] = array
    return out


def _nothing(size: int) -> Column:
    return Column(np.full(size, np.nan), np.zeros(0, dtype=np.int64))


def _sort_in(column: Column, numbers: list[int]) -> None:
    """Puts new values into the order."""
    values = column.values
    if len(numbers) == 1:
        (number,) = numbers
        key = (values[number], number)
        place = bisect.bisect(column.order, key, key=lambda other: (values[other], other))
        column.order = np.insert(column.order, place, number)
    else:
        present = np.flatnonzero(~np.isnan(values))
        column.order = present[np.argsort(values[present], kind="stable")]


def _rank(trial: FrozenTrial) -> tuple[int, float, float]:
    """The lower, the better; the trial's number decides between equals."""
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None
        return 0, trial.value, 0.0
    if not trial.intermediate_values:
        return 1, 1.0, 0.0
    step, value = max(trial.intermediate_values.items())
    return 1, -step, math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Split:
    """Trials to sample from.

    Attributes:
        finished: How many ended with a loss.
        below: Whether it is a good one, by number.
        above: Whether it is another or a running one, by number.
        columns: Of each parameter.
    """

    finished: int
    below: NDArray[np.bool_]
    above: NDArray[np.bool_]
    columns: dict[str, Column]


def densities(
    split: Split, name: str, distribution: BaseDistribution
) -> tuple[Categories | Kernels, Categories | Kernels]:
    """The densities of a parameter among the good trials and among the others."""
    column = split.columns.get(name) or _nothing(len(split.below))
    known = ~np.isnan(column.values)
    sides = split.below & known, split.above & known
    if isinstance(distribution, CategoricalDistribution):
        count = len(distribution.choices)
        below, above = (Categories(column.values[side], count) for side in sides)
        return below, above
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    good, others = (_kernels(column, side, distribution) for side in sides)
    return good, others


def _kernels(
    column: Column, side: NDArray[np.bool_], distribution: FloatDistribution | IntDistribution
) -> Kernels:
    by_value = column.order[side[column.order]]
    ages = np.cumsum(side)[by_value] - 1
    return Kernels(column.values[by_value], ages, distribution)


def _weights(count: int) -> Floats:
    """Of so many trials, the oldest first, and of the prior; the newest count in full."""
    if count == 0:
        return np.ones(1)
    weights = np.full(count + 1, 1.0)
    if count >= _FULL_WEIGHT:
        old = count - _FULL_WEIGHT
        weights[:old] = np.linspace(1.0 / count, 1.0, num=old)
    weights[-1] = _PRIOR_WEIGHT
    weights /= weights.sum()
    return weights


class Categories:
    """A mixture over the choices: each trial prefers its own, the prior none."""

    def __init__(self, seen: Floats, choices: int) -> None:
        self._weights = _weights(len(seen))
        self._chosen = seen.astype(np.int64)
        self._choices = choices
        self._flat = _PRIOR_WEIGHT / (len(seen) + 1)

    def draw(self, rng: np.random.RandomState, size: int) -> Floats:
        """Indices of choices, as Optuna has them."""
        kernels = rng.choice(len(self._weights), p=self._weights, size=size)
        quantiles = rng.rand(size)
        rows = np.full((size, self._choices), self._flat)
        own = kernels < len(self._chosen)
        rows[np.flatnonzero(own), self._chosen[kernels[own]]] += 1
        cumulated = np.cumsum(rows / rows.sum(axis=1, keepdims=True), axis=1)
        cumulated[:, -1] = 1
        found: Floats = np.sum(cumulated < quantiles[:, np.newaxis], axis=1, dtype=np.float64)
        return found

    def density(self, x: Floats) -> Floats:
        """The probability of each of the given choices."""
        own = np.bincount(self._chosen, self._weights[:-1], minlength=self._choices)
        each = (own + self._flat * own.sum()) / (1 + self._choices * self._flat)
        found: Floats = (each + self._weights[-1] / self._choices)[x.astype(np.int64)]
        return found


class Kernels:
    """A mixture of truncated normal densities: one about each trial's value, and a wide prior.

    A kernel is as wide as the larger of the distances to its neighbours. Values of a log range
    are logarithms here; an integer stands for the interval of half a step on either side.
    """

    def __init__(
        self, seen: Floats, ages: Ints, distribution: FloatDistribution | IntDistribution
    ) -> None:
        """Sorts nothing.

        Args:
            seen: The values of the trials, lowest first.
            ages: Of each, how many trials were before its own.
            distribution: The range.
        """
        self._low, self._high = float(distribution.low), float(distribution.high)
        self._step = float(distribution.step or 0)
        self._log = distribution.log
        begin, end = self._ends = tuple(
            self._scale(np.array([self._low - self._step / 2, self._high + self._step / 2]))
        )
        middles = self._scale(seen)
        narrow = (end - begin) / min(_NARROWEST, len(seen) + 2)
        widths = np.clip(_gaps(middles, begin, end), narrow, end - begin)
        self._middles = np.append(middles, 0.5 * (begin + end))
        self._widths = np.append(widths, end - begin)
        self._ages = np.append(ages, len(ages))  # the prior is the last one in both orders
        self._weights = _weights(len(seen))

    def _scale(self, x: Floats) -> Floats:
        return np.log(x) if self._log else x

    def draw(self, rng: np.random.RandomState, size: int) -> Floats:
        """Values in the range, integers where there is a step."""
        drawn = rng.choice(len(self._weights), p=self._weights, size=size)
        kernels = np.argsort(self._ages)[drawn]
        quantiles = rng.uniform(0, 1, size=size)
        middles, widths = self._middles[kernels], self._widths[kernels]
        begin, end = self._ends
        found = middles + widths * _quantile(
            quantiles, (begin - middles) / widths, (end - middles) / widths
        )
        if self._log:
            found = np.exp(found)
        if self._step:
            found = self._low + np.round((found - self._low) / self._step) * self._step
        return np.clip(found, self._low, self._high)

    def density(self, x: Floats) -> Floats:
        """The density of the scaled value of each of the given values, or its probability."""
        begin, end = self._ends
        a, b = (begin - self._middles) / self._widths, (end - self._middles) / self._widths
        weights = self._weights[self._ages]
        cut = (a > -_WHOLE) | (b < _WHOLE)
        weights[cut] /= _mass(a[cut], b[cut])
        if not self._step:
            return _sum_of_normals(self._scale(x), self._middles, self._widths, weights)
        # Equal neighbours are one kernel: a narrow range has few distinct ones.
        new = np.ones(len(weights), dtype=np.bool_)
        new[1:] = (np.diff(self._middles) != 0) | (np.diff(self._widths) != 0)
        first = np.flatnonzero(new)
        middles, widths = self._middles[first], self._widths[first]
        values, places = np.unique(x, return_inverse=True)
        left = self._scale(values - self._step / 2)[:, np.newaxis]
        right = self._scale(values + self._step / 2)[:, np.newaxis]
        mass = _mass((left - middles) / widths, (right - middles) / widths)
        found: Floats = (mass @ np.add.reduceat(weights, first))[places]
        return found


def _gaps(middles: Floats, begin: float, end: float) -> Floats:
    """The larger distance of each sorted value to its neighbours, the ends to the only one."""
    if len(middles) < 2:
        return np.maximum(middles - begin, end - middles)
    between = np.diff(middles)
    gaps: Floats = np.maximum(np.append(between[0], between), np.append(between, between[-1]))
    return gaps


def _mass(a: Floats, b: Floats) -> Floats:
    """The probability of a standard normal value between a and b, exact in both tails."""
    right = a > 0
    mass: Floats = ndtr(np.where(right, -a, b)) - ndtr(np.where(right, -b, a))
    return mass


def _quantile(q: Floats, a: Floats, b: Floats) -> Floats:
    """Quantiles of a standard normal distribution truncated to [a, b]."""
    left = a < 0  # of the two tails the lower one is exact
    share = np.where(left, np.log(q), np.log1p(-q)) + np.log(_mass(a, b))
    found: Floats = ndtri_exp(np.logaddexp(log_ndtr(np.where(left, a, -b)), share))
    return np.where(left, found, -found)


def _sum_of_normals(x: Floats, middles: Floats, widths: Floats, weights: Floats) -> Floats:
    """A weighted sum of normal densities at each x; their middles are sorted but for the last."""
    heights = weights / (widths * math.sqrt(2 * math.pi))
    out = np.zeros(len(x))
    for begin in range(0, len(middles), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        here = middles[block]
        reach = _REACH * widths[block].max()
        near = (x > here.min() - reach) & (x < here.max() + reach)
        z = (x[near, np.newaxis] - here) / widths[block]
        z *= -0.5 * z
        out[near] += np.exp(z, out=z) @ heights[block]
    return out
