"""Learning curves of configs that were never trained, from those that were.

A Gaussian process with a length scale for each feature predicts, in logarithms, the curve of the
running best (its principal components), the number of epochs and the seconds of an epoch. What it
misses is added from a recorded config with a similar predicted loss: all of its leave-one-out
residuals together, so they keep their shape. Which one is derived from the config, so the same
config always has the same curve. A recorded config has its own recorded curve.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import KFold, cross_val_predict

from tune_steel.seeds import derive
from tune_steel.space import Params, Space, Value

Floats: TypeAlias = NDArray[np.float64]

_COMPONENTS = 3
_DONORS = 30
_MOST_STEPS = 15  # more fits the length scales to this sample, not better
_CHECKED = 1000


@dataclass(frozen=True)
class Curve:
    """The whole learning curve of a config.

    Attributes:
        params: Its sampled parameters.
        val_loss: Its loss after each epoch.
        converged: Whether its own early stopping ended it.
        seconds: What an epoch takes.
        expected: The lowest loss that a surrogate expects of it, without any residual.
    """

    params: Params
    val_loss: tuple[float, ...]
    converged: bool
    seconds: float
    expected: float | None = None

    @cached_property
    def best(self) -> list[float]:
        """The running best."""
        return list(np.minimum.accumulate(self.val_loss))

    @property
    def final(self) -> float:
        """The lowest loss of the whole curve."""
        return self.best[-1]


class Surrogate:
    """Predicts the curves of all configs of a space."""

    def __init__(self, space: Space, curves: Sequence[Curve], max_epochs: int) -> None:
        """Fits it.

        Args:
            space: Where the configs come from.
            curves: Recorded ones.
            max_epochs: The most epochs of a curve.
        """
        self._space = space
        self._most = max_epochs
        self._recorded = {_key(curve.params): curve for curve in curves}
        self._x = np.array([self._features(curve.params) for curve in curves])
        whole = [curve.best + [curve.final] * (max_epochs - len(curve.best)) for curve in curves]
        logs = np.log(whole)
        self._mean = logs.mean(axis=0)
        self._components = np.linalg.svd(logs - self._mean, full_matrices=False)[2][:_COMPONENTS]
        lengths = np.log([len(curve.best) for curve in curves])
        seconds = np.log([curve.seconds for curve in curves])
        targets = np.column_stack([(logs - self._mean) @ self._components.T, lengths, seconds])
        with warnings.catch_warnings():
            # A feature that does not matter has a length scale at its bound.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._models = [_process(self._x.shape[1]).fit(self._x, y) for y in targets.T]
        left_out = np.column_stack(
            [_left_out(m, y) for m, y in zip(self._models, targets.T, strict=True)]
        )
        predicted = self._curves(left_out)
        self._finals = predicted[:, -1]
        self._residuals = np.column_stack([logs - predicted, (targets - left_out)[:, -2:]])
        self._expected = {
            _key(c.params): math.exp(f) for c, f in zip(curves, self._finals, strict=True)
        }

    def curve(self, params: Params) -> Curve:
        """The curve of a config: the recorded one if there is one."""
        key = _key(params)
        known = self._recorded.get(key)
        if known is not None:
            return Curve(
                known.params, known.val_loss, known.converged, known.seconds, self._expected[key]
            )
        x = np.array([self._features(params)])
        scores = np.array([[model.predict(x)[0] for model in self._models]])
        log_curve = self._curves(scores)[0]
        # The residuals of bad configs are larger than those of good ones.
        alike = np.argsort(np.abs(self._finals - log_curve[-1]), kind="stable")[:_DONORS]
        donor = self._residuals[alike[derive("residual", key) % len(alike)]]
        losses = np.exp(np.minimum.accumulate(log_curve + donor[: self._most]))
        length = round(math.exp(scores[0, -2] + donor[-2]))
        length = min(max(length, 1), self._most)
        return Curve(
            params,
            tuple(losses[:length].tolist()),
            length < self._most,
            math.exp(scores[0, -1] + donor[-1]),
            math.exp(log_curve[-1]),
        )

    def _curves(self, scores: Floats) -> Floats:
        curves = self._mean + scores[:, :_COMPONENTS] @ self._components[: scores.shape[1]]
        return np.asarray(np.minimum.accumulate(curves, axis=1))

    def _features(self, params: Params) -> list[float]:
        return features(self._space, params)

    def quality(self, curves: Sequence[Curve], epoch: int) -> dict[str, float]:
        """How well it predicts, and how much its configs are like recorded ones.

        Args:
            curves: The recorded curves.
            epoch: The epoch whose running best is correlated with the final one.
        """
        finals = np.log([curve.final for curve in curves])
        lengths = np.log([len(curve.best) for curve in curves])
        folds = KFold(5, shuffle=True, random_state=0)
        process = _process(self._x.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            predicted = cross_val_predict(process, self._x, finals, cv=folds)
            length = cross_val_predict(process, self._x, lengths, cv=folds)
        rng = np.random.default_rng(0)
        drawn = [self.curve(random_params(self._space, rng)) for _ in range(_CHECKED)]
        fresh = np.log([curve.final for curve in drawn])
        return {
            "spearman": float(spearmanr(predicted, finals)[0]),
            "rmse": float(np.sqrt(np.mean((predicted - finals) ** 2))),
            "sd": float(finals.std()),
            "spearman_of_length": float(spearmanr(length, lengths)[0]),
            "sd_of_new": float(fresh.std()),
            "mean": float(finals.mean()),
            "mean_of_new": float(fresh.mean()),
            "best_hundredth": float(np.quantile(finals, 0.01)),
            "best_hundredth_of_new": float(np.quantile(fresh, 0.01)),
            "early": _early(curves, epoch),
            "early_of_new": _early(drawn, epoch),
            "epochs": float(np.mean([len(curve.best) for curve in curves])),
            "epochs_of_new": float(np.mean([len(curve.best) for curve in drawn])),
        }


def features(space: Space, params: Params) -> list[float]:
    """A config as numbers: words one-hot, all else scaled to 0..1, -0.5 where it is not active."""
    out: list[float] = []
    for leaf in space.leaves:
        value = params.get(leaf.key)
        if leaf.kind == "choices" and isinstance(leaf.values[0], str):
            out += [float(value == choice) for choice in leaf.values]
        elif value is None:
            out.append(-0.5)
        elif leaf.kind == "choices":
            out.append(sorted(leaf.values, key=float).index(value) / max(len(leaf.values) - 1, 1))
        else:
            low, high, here = (
                math.log(float(v)) if leaf.log else float(v) for v in (*leaf.values, value)
            )
            out.append((here - low) / (high - low))
    return out


def random_params(space: Space, rng: np.random.Generator) -> Params:
    """A config as random search samples it."""

    def choose(leaf: Any) -> Value:
        if leaf.kind == "choices":
            return leaf.values[rng.integers(len(leaf.values))]  # type: ignore[no-any-return]
        low, high = leaf.values
        if leaf.kind == "int":
            return int(rng.integers(low, high + 1))
        if leaf.log:
            return float(np.exp(rng.uniform(np.log(low), np.log(high))))
        return float(rng.uniform(low, high))

    return space.sample(choose)


def _key(params: Params) -> str:
    return json.dumps(params, sort_keys=True)


def _early(curves: Sequence[Curve], epoch: int) -> float:
    early = [curve.best[min(epoch, len(curve.best)) - 1] for curve in curves]
    return float(spearmanr(early, [curve.final for curve in curves])[0])


def _process(dimensions: int) -> GaussianProcessRegressor:
    kernel = ConstantKernel(1.0) * RBF(np.full(dimensions, 1.5), (0.1, 30.0)) + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True, optimizer=_few_steps)


def _few_steps(
    objective: Callable[..., Any], start: Floats, bounds: Floats
) -> tuple[Floats, float]:
    found = minimize(
        objective, start, jac=True, bounds=list(bounds), options={"maxiter": _MOST_STEPS}
    )
    return found.x, float(found.fun)


def _left_out(model: GaussianProcessRegressor, y: Floats) -> Floats:
    """What the process predicts for each recorded config from all others (its scales fixed)."""
    inverse = np.linalg.inv(model.L_ @ model.L_.T)
    residuals = model.alpha_.ravel() / np.diag(inverse)
    return np.asarray(y - residuals * model._y_train_std)
