"""The final evaluation: the ensemble, the best trial and their rivals, once on the test rows.

This is the only room that opens the test rows. Nothing is chosen by them: trials were chosen by
validation losses, the ensemble's weights, calibration and threshold by out-of-fold predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tune_steel.boosting import Boosting
from tune_steel.ensemble import (
    Calibration,
    Combination,
    ThresholdRule,
    combine,
    cross_fit,
    log_loss,
)
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Features, Floats, Ints
from tune_steel.loss import class_weights
from tune_steel.predict import FittedModel, Member
from tune_steel.refit import Plan, Refit, fold_models, member, retrain, validation_rows
from tune_steel.scores import Interval, bootstrap, confusion, confusion_interval, score
from tune_steel.seeds import derive
from tune_steel.splits import Development, SealedTest
from tune_steel.study import TrialRecord


@dataclass(frozen=True)
class Membership:
    """A trial that was refitted for the ensemble.

    Attributes:
        trial: Its number.
        family: Its family of networks.
        weight: Its weight in the ensemble; 0 where the selection left it out.
        log_loss: Out-of-fold log-loss of its fold models, at natural class frequencies.
    """

    trial: int
    family: str
    weight: float
    log_loss: float


@dataclass(frozen=True)
class EnsembleFacts:
    """How the ensemble came about; `ensemble` in `run.json`.

    Attributes:
        members: Every trial that was refitted, best validation loss first.
        calibration: What is done to the logits of the weighted average.
        threshold: Two classes: above which probability a row counts as of the second one.
        log_loss: Of the out-of-fold predictions that weights and calibration were fitted to.
        cross_fitted_log_loss: Of weights and calibration that were fitted to the other folds.
        cross_fitted: False with a single split, where no other rows are left: then the two are
            the same, and the validation scores flatter.
    """

    members: tuple[Membership, ...]
    calibration: Calibration
    threshold: float | None
    log_loss: float
    cross_fitted_log_loss: float
    cross_fitted: bool


@dataclass
class Scored:
    """One model on the test rows.

    Attributes:
        name: `ensemble`, `bagged`, `tuned`, `default` or `boosting`.
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


@dataclass(frozen=True)
class OutOfFold:
    """A model's predictions of the validation rows of one fold.

    Attributes:
        model: `ensemble`, `bagged` or `tuned`.
        fold: The fold, from 0.
        rows: Indices in the original table [N].
        y: Classes [N].
        probabilities: By models that did not see these rows [N, C].
    """

    model: str
    fold: int
    rows: Ints
    y: Ints
    probabilities: Floats


@dataclass
class Evaluation:
    """All that the final evaluation gave.

    Attributes:
        model: The ensemble, the final model.
        ensemble: How it came about.
        models: The scored models, the ensemble first.
        y: Classes of the test rows [n].
        rows: Their indices in the original table [n].
        confusion: Of the ensemble, [true class, predicted class].
        confusion_interval: 95 % bootstrap interval of each of its cells, low and high.
        out_of_fold: For each model and fold. The ensemble's are the cross-fitted ones, which its
            validation scores are of; those of `tuned` are of the search's own fold models.
        reproduction_gap: Difference between the validation loss that the search recorded and the
            one of training the best trial again; 0 on the same machine, None if that failed.
        notes: Lines about members and rivals that are missing.
    """

    model: FittedModel
    ensemble: EnsembleFacts
    models: list[Scored]
    y: Ints
    rows: Ints
    confusion: Ints
    confusion_interval: tuple[Ints, Ints]
    out_of_fold: list[OutOfFold] = field(repr=False)
    reproduction_gap: float | None
    notes: list[str]


@dataclass(frozen=True)
class _Entrant:
    """A model to score: its name, what gives its probabilities [S, n, C], its own figures."""

    name: str
    predict: Callable[[Features], Floats]
    validation: dict[str, float]
    threshold: float | None = None


def evaluate(
    refits: Sequence[tuple[Plan, Refit | str]],
    best: TrialRecord,
    default: TrialRecord | None,
    development: Development,
    sealed: SealedTest,
    *,
    seed: int,
    data_source: str,
    device: str,
    rule: ThresholdRule,
) -> Evaluation:
    """Makes the ensemble, trains its rivals and scores them; opens the test rows.

    Args:
        refits: The members: what training each again with this seed gave, or why it gave nothing.
        best: The chosen trial.
        default: The trial of the space's default config, if it trained.
        development: The rows that the search saw.
        sealed: The test rows, unopened.
        seed: Seed of the run.
        data_source: Where the table came from.
        device: `cpu` or `cuda`.
        rule: How the ensemble's decision threshold is chosen.

    Raises:
        NonFiniteLossError: No member is left.
    """
    notes = [
        f"trial {plan.trial} is missing in the ensemble: {why}"
        for plan, why in refits
        if isinstance(why, str)
    ]
    kept = [(plan, again) for plan, again in refits if isinstance(again, Refit)]
    if not kept:
        raise NonFiniteLossError(f"no member of the ensemble could be trained again; {notes[0]}")
    ensemble = _Ensemble(kept, development, rule)
    model = FittedModel(development.classes, ensemble.members(), ensemble.used(), data_source)
    out_of_fold = ensemble.out_of_fold()
    entrants = [
        _Entrant(
            "ensemble",
            lambda features: model.probabilities(features)[None],
            _fold_scores(out_of_fold, development, [t for _, t in ensemble.cross_fitted]),
            model.combination.threshold,
        )
    ]
    # A rival that cannot be trained is left out and said; it costs the ensemble nothing.
    gap = None
    for position, (plan, again) in enumerate(kept):
        if plan.trial == best.number:
            gap = abs(again.val_loss - plan.val_loss)
            parts = ensemble.blocks("bagged", ensemble.p[position])
            bagged = fold_models(plan, again, development)
            entrants.append(_Entrant("bagged", bagged.natural, _fold_scores(parts, development)))
            own = np.exp(again.out_of_fold[0])
            out_of_fold += [*parts, *ensemble.blocks("tuned", own)]
    on_all_rows = {plan.trial: (plan, again) for plan, again in kept}
    for name, label, record in (("tuned", "the best trial", best), ("default", _DEFAULT, default)):
        if record is None or record.best is None:
            notes.append(f"{label} is missing below: its trial did not get past an epoch")
            continue
        try:
            if record.number in on_all_rows:
                one = member(*on_all_rows[record.number], development)
            else:
                one = retrain(Plan.of(record), development, seed, device)
            entrants.append(_Entrant(name, one.probabilities, _validation(record)))
        except NonFiniteLossError as error:
            notes.append(f"{label} is missing below: {error}")
    try:
        boosting = Boosting(development, seed)
        entrants.append(_Entrant("boosting", boosting.probabilities, boosting.validation()))
    except Exception as error:  # scikit-learn's own limits, whatever they are
        notes.append(f"boosting is missing below: {type(error).__name__}: {error}")

    # All that could fail has been trained; from here on it is arithmetic.
    features, y = sealed.open()

    def scored(entrant: _Entrant) -> Scored:
        weights, threshold = development.reference_weights, entrant.threshold
        p = entrant.predict(features)
        each = [score(one, y, weights, threshold) for one in p]
        draws = derive(seed, "bootstrap")
        return Scored(
            entrant.name,
            p,
            bootstrap(p.mean(axis=0), y, weights, draws, threshold=threshold),
            {key: np.array([one[key] for one in each]) for key in each[0]},
            entrant.validation,
        )

    models = [scored(entrant) for entrant in entrants]
    table = confusion(models[0].probabilities.mean(axis=0), y, model.combination.threshold)
    return Evaluation(
        model=model,
        ensemble=ensemble.facts(),
        models=models,
        y=y,
        rows=sealed.rows,
        confusion=table,
        confusion_interval=confusion_interval(table, derive(seed, "bootstrap")),
        out_of_fold=out_of_fold,
        reproduction_gap=gap,
        notes=notes,
    )


_DEFAULT = "the default config"


class _Ensemble:
    """The members that were trained again, and their combination.

    Attributes:
        p: Out-of-fold probabilities of the members at natural frequencies [M, n, C].
        cross_fitted: Of each fold, the probabilities and threshold that the other folds gave.
    """

    def __init__(
        self, kept: list[tuple[Plan, Refit]], development: Development, rule: ThresholdRule
    ) -> None:
        self._kept = kept
        self._development = development
        self._positions, self._fold = validation_rows(development)
        self._y = development.y[self._positions]
        self.p = np.stack(
            [again.natural(class_weights(plan.config, development)) for plan, again in kept]
        )
        self._combination = combine(self.p, self._y, rule)
        self.cross_fitted = cross_fit(self.p, self._y, self._fold, rule)

    def used(self) -> Combination:
        """The combination of the members with a weight."""
        whole = self._combination
        return Combination(whole.weights[whole.weights > 0], whole.calibration, whole.threshold)

    def members(self) -> tuple[Member, ...]:
        """The members with a weight."""
        return tuple(
            member(plan, again, self._development)
            for (plan, again), weight in zip(self._kept, self._combination.weights, strict=True)
            if weight > 0
        )

    def out_of_fold(self) -> list[OutOfFold]:
        """The cross-fitted predictions."""
        return self.blocks("ensemble", np.concatenate([p for p, _ in self.cross_fitted]))

    def blocks(self, model: str, p: Floats) -> list[OutOfFold]:
        """Probabilities [n, C] of all validation rows, cut into folds."""
        return [
            OutOfFold(model, fold, self._development.rows[val], self._development.y[val], p[part])
            for fold, (_, val) in enumerate(self._development.folds)
            for part in [self._fold == fold]
        ]

    def facts(self) -> EnsembleFacts:
        """How it came about."""
        whole = self._combination
        crossed = np.concatenate([p for p, _ in self.cross_fitted])
        return EnsembleFacts(
            members=tuple(
                Membership(
                    plan.trial, plan.config.model.family, float(weight), log_loss(p, self._y)
                )
                for (plan, _), weight, p in zip(self._kept, whole.weights, self.p, strict=True)
            ),
            calibration=whole.calibration,
            threshold=whole.threshold,
            log_loss=log_loss(whole.apply(self.p), self._y),
            cross_fitted_log_loss=log_loss(crossed, self._y),
            cross_fitted=len(self._development.folds) > 1,
        )


def _fold_scores(
    parts: list[OutOfFold],
    development: Development,
    thresholds: Sequence[float | None] | None = None,
) -> dict[str, float]:
    """Mean over the folds of the scores of out-of-fold predictions."""
    folds = [
        score(part.probabilities, part.y, development.reference_weights, threshold)
        for part, threshold in zip(parts, thresholds or [None] * len(parts), strict=True)
    ]
    return {name: float(np.mean([fold[name] for fold in folds])) for name in folds[0]}


def _validation(record: TrialRecord) -> dict[str, float]:
    best = record.best
    assert best is not None
    return {key.removeprefix("val_"): v for key, v in best.items() if key.startswith("val_")}


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

    for part in evaluation.out_of_fold:
        fixed = {"model": part.model, "split": "out-of-fold", "fold": part.fold}
        yield block(part.rows, part.y, part.probabilities, **fixed)
    index, y = evaluation.rows, evaluation.y
    for model in evaluation.models:
        mean = model.probabilities.mean(axis=0)
        yield block(index, y, mean, model=model.name, split="test")
        if len(model.probabilities) > 1:
            for seed, p in enumerate(model.probabilities):
                yield block(index, y, p, model=model.name, split="test", seed=seed)
