"""The gradient-boosting reference that every run is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from tune_steel.features import Features, Floats, Ints
from tune_steel.scores import score, score_names
from tune_steel.seeds import derive
from tune_steel.splits import Development


class Boosting:
    """scikit-learn's HistGradientBoostingClassifier at its defaults, on the same rows."""

    def __init__(self, development: Development, seed: int) -> None:
        self._development = development
        self._random_state = derive(seed, "boosting")
        self._final = self._fit(np.arange(len(development.y)))

    def probabilities(self, features: Features) -> Floats:
        """Probabilities [1, n, C] by the model of all development rows."""
        return self._predict(self._final, features)[None]

    def validation(self) -> dict[str, float]:
        """Mean over the folds of the validation scores."""
        development = self._development
        folds = []
        for train, val in development.folds:
            p = self._predict(self._fit(train), development.features.take(val))
            folds.append(score(p, development.y[val], development.reference_weights))
        return {
            name: float(np.mean([fold[name] for fold in folds]))
            for name in score_names(len(development.classes))
        }

    def _fit(self, rows: Ints) -> tuple[Any, NDArray[np.bool_]]:
        """The model of some rows, and which columns it reads: it cannot take an empty one."""
        x = _matrix(self._development.features.take(rows))
        known = np.asarray(np.isfinite(x).any(axis=0))
        numeric = len(self._development.schema.numeric)
        categorical = np.arange(x.shape[1]) >= numeric
        model = HistGradientBoostingClassifier(
            categorical_features=categorical[known], random_state=self._random_state
        )
        # A second thread gains a fifth here, and on a busy core its waiting costs a fourfold.
        with threadpool_limits(1, "openmp"):
            return model.fit(x[:, known], self._development.y[rows]), known

    def _predict(self, fitted: tuple[Any, NDArray[np.bool_]], features: Features) -> Floats:
        model, known = fitted
        out = np.zeros((len(features), len(self._development.classes)))
        with threadpool_limits(1, "openmp"):
            out[:, model.classes_] = model.predict_proba(_matrix(features)[:, known])
        return out


def _matrix(features: Features) -> Floats:
    """Numeric columns and category codes side by side; gaps and unknown codes are NaN."""
    codes = np.where(features.codes < 0, np.nan, features.codes)
    return np.concatenate([features.numeric, codes], axis=1)
