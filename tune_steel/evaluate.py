"""The final evaluation: retrain the best trial, score it and its rivals once on the test rows.

This is the only room that opens the test rows. Nothing is chosen here: what is evaluated was
decided by validation losses before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Features, Floats, Ints
from tune_steel.fit import Fit
from tune_steel.networks import log_probabilities
from tune_steel.predict import FittedModel
from tune_steel.scores import (
    Interval,
    bootstrap,
    confusion,
    confusion_interval,
    score,
    score_names,
)
from tune_steel.seeds import derive
from tune_steel.splits import Development, SealedTest
from tune_steel.study import TrialRecord
from tune_steel.trainable import replica_seeds

SEEDS = 5
"""Networks that are retrained in lock-step and averaged."""


_Entrant: TypeAlias = tuple[str, Callable[[Features], Floats], dict[str, float]]
"""A model to score: its name, what gives its probabilities [S, n, C], its validation scores."""


@dataclass
class Scored:
    """One model on the test rows.

    Attributes:
        name: `tuned`, `default` or `boosting`.
        probabilities: Test probabilities of each seed [S, n, C].
        intervals: Scores of the averaged prediction with their intervals.
        seed_scores: Scores of each seed [S], by name.
        validation: Mean over the folds of the validation scores.
    """

    name: str
    probabilities: Floats
    intervals: dict[str, Interval]
    seed_scores: dict[str, Floats]
    validation: dict[str, float]


@dataclass
class Evaluation:
    """All that the final evaluation gave.

    Attributes:
        model: The retrained best trial.
        models: The scored models, the tuned one first.
        y: Classes of the test rows [n].
        rows: Their indices in the original table [n].
        confusion: Of the tuned model, [true class, predicted class].
        confusion_interval: 95 % bootstrap interval of each of its cells, low and high.
        out_of_fold: For each fold: validation row indices, classes, probabilities [N, C] of the
            best trial at its best epoch.
        reproduction_gap: Difference between the validation loss that the search recorded and the
            one of training the best trial again; 0 on the same machine.
        notes: Lines about rivals that are missing.
    """

    model: FittedModel
    models: list[Scored]
    y: Ints
    rows: Ints
    confusion: Ints
    confusion_interval: tuple[Ints, Ints]
    out_of_fold: list[tuple[Ints, Ints, Floats]] = field(repr=False)
    reproduction_gap: float
    notes: list[str]


def evaluate(
    best: TrialRecord,
    default: TrialRecord | None,
    development: Development,
    sealed: SealedTest,
    seed: int,
    data_source: str,
    device: str,
) -> Evaluation:
    """Retrains and scores; opens the test rows.

    Args:
        best: The chosen trial.
        default: The trial of the space's default config, if it trained.
        development: The rows that the search saw.
        sealed: The test rows, unopened.
        seed: Seed of the run.
        data_source: Where the table came from.
        device: `cpu` or `cuda`.
    """
    out_of_fold, gap = _out_of_fold(best, development, device)
    model = retrain(best, development, seed, data_source, device)
    entrants: list[_Entrant] = [("tuned", model.replica_probabilities, _validation(best))]
    # A rival that cannot be trained is left out and said; it costs the winner nothing.
    notes: list[str] = []
    if default is None or default.best is None:
        notes.append("the default config is missing below: its trial did not get past an epoch")
    elif default.number == best.number:
        entrants.append(("default", model.replica_probabilities, _validation(default)))
    else:
        try:
            rival = retrain(default, development, seed, data_source, device)
            entrants.append(("default", rival.replica_probabilities, _validation(default)))
        except NonFiniteLossError as error:
            notes.append(f"the default config is missing below: {error}")
    try:
        boosting = Boosting(development, seed)
        entrants.append(("boosting", boosting.probabilities, boosting.validation()))
    except Exception as error:  # scikit-learn's own limits, whatever they are
        notes.append(f"boosting is missing below: {type(error).__name__}: {error}")

    # All that could fail has been trained; from here on it is arithmetic.
    features, y = sealed.open()

    def scored(name: str, p: Floats, validation: dict[str, float]) -> Scored:
        weights = development.reference_weights
        each = [score(one, y, weights) for one in p]
        return Scored(
            name,
            p,
            bootstrap(p.mean(axis=0), y, weights, derive(seed, "bootstrap")),
            {key: np.array([one[key] for one in each]) for key in each[0]},
            validation,
        )

    models = [scored(name, predict(features), scores) for name, predict, scores in entrants]
    table = confusion(models[0].probabilities.mean(axis=0), y)
    return Evaluation(
        model=model,
        models=models,
        y=y,
        rows=sealed.rows,
        confusion=table,
        confusion_interval=confusion_interval(table, derive(seed, "bootstrap")),
        out_of_fold=out_of_fold,
        reproduction_gap=gap,
        notes=notes,
    )


def retrain(
    record: TrialRecord, development: Development, seed: int, data_source: str, device: str
) -> FittedModel:
    """Trains a trial's config on all development rows, several seeds in lock-step.

    It takes the trial's best epoch count and, because there are no validation rows left that a
    plateau could be seen on, the learning rate that the trial had in each of those epochs.

    Raises:
        NonFiniteLossError: The training loss is NaN or infinite.
    """
    everything = np.arange(len(development.y))
    fit = Fit(
        record.config,
        development,
        [(everything, everything[:0])] * SEEDS,
        [derive(seed, "retrain", i) for i in range(SEEDS)],
        device,
    )
    best = record.best
    assert best is not None
    for row in record.epochs[: best["epoch"]]:
        if not np.isfinite(fit.train_epoch(row["learning_rate"])).all():
            raise NonFiniteLossError(f"retraining trial {record.number}: the loss is not finite")
    return FittedModel(
        record.config, development.classes, fit.network, fit.preprocessing, data_source
    )


def _out_of_fold(
    record: TrialRecord, development: Development, device: str
) -> tuple[list[tuple[Ints, Ints, Floats]], float]:
    """Trains the best trial's folds again, with its own seeds, up to its best epoch."""
    best = record.best
    assert best is not None
    seeds = replica_seeds(record.seed, len(development.folds))
    fit = Fit(record.config, development, development.folds, seeds, device)
    *_, last = fit.epochs(best["epoch"])
    parts = [
        (
            development.rows[val],
            development.y[val],
            log_probabilities(torch.tensor(logits)).exp().numpy(),
        )
        for (_, val), logits in zip(development.folds, fit.validation_logits(), strict=True)
    ]
    return parts, abs(last.val_loss - best["val_loss"])


def _validation(record: TrialRecord) -> dict[str, float]:
    best = record.best
    assert best is not None
    return {key.removeprefix("val_"): v for key, v in best.items() if key.startswith("val_")}


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
        out[:, model.classes_] = model.predict_proba(_matrix(features)[:, known])
        return out


def _matrix(features: Features) -> Floats:
    """Numeric columns and category codes side by side; gaps and unknown codes are NaN."""
    codes = np.where(features.codes < 0, np.nan, features.codes)
    return np.concatenate([features.numeric, codes], axis=1)


def score_rows(evaluation: Evaluation) -> Iterator[dict[str, object]]:
    """Rows of `scores.parquet`, without the run's columns."""
    for model in evaluation.models:
        seeds = len(model.probabilities)
        for name, interval in model.intervals.items():
            spread = model.seed_scores[name]
            yield {
                "model": model.name,
                "split": "test",
                "rows": len(evaluation.y),
                "score": name,
                "value": interval.value,
                "low": interval.low,
                "high": interval.high,
                "seeds": seeds,
                "seed_mean": float(spread.mean()),
                "seed_sd": float(spread.std(ddof=1)) if seeds > 1 else None,
            }
        for name, value in model.validation.items():
            if name in model.intervals:
                yield {"model": model.name, "split": "validation", "score": name, "value": value}


def prediction_blocks(
    evaluation: Evaluation, classes: tuple[str, ...]
) -> Iterator[dict[str, object]]:
    """Blocks of `predictions.parquet`, by column, without the run's columns."""
    names = np.array(classes)

    def block(index: Ints, y: Ints, p: Floats, **fixed: object) -> dict[str, object]:
        probabilities = {f"p{c}": p[:, c] for c in range(p.shape[1])}
        return {**fixed, "row": index, "y": y, "label": names[y], **probabilities}

    for fold, (index, y, p) in enumerate(evaluation.out_of_fold):
        yield block(index, y, p, model="tuned", split="out-of-fold", fold=fold)
    index, y = evaluation.rows, evaluation.y
    for model in evaluation.models:
        mean = model.probabilities.mean(axis=0)
        yield block(index, y, mean, model=model.name, split="test")
        if len(model.probabilities) > 1:
            for seed, p in enumerate(model.probabilities):
                yield block(index, y, p, model=model.name, split="test", seed=seed)
