"""The final evaluation: the ensemble, the best trial and their rivals, once on the test rows.

This is the only room that opens the test rows. Nothing is chosen by them: trials were chosen by
validation losses, the ensemble's weights, calibration and threshold by out-of-fold predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from tune_steel.boosting import Boosting
from tune_steel.ensemble import Combination
from tune_steel.features import Features, Floats, Ints
from tune_steel.finalists import EnsembleFacts, Finalists, OutOfFold
from tune_steel.predict import FittedModel, Member
from tune_steel.refit import Plan, member
from tune_steel.scores import (
    Interval,
    confusion,
    confusion_interval,
    interval,
    resample,
    score,
)
from tune_steel.seeds import derive
from tune_steel.splits import Development, SealedTest
from tune_steel.study import TrialRecord


@dataclass
class Scored:
    """One model on the test rows.

    Attributes:
        name: `ensemble`, `bagged`, `tuned`, `default` or `boosting`.
        probabilities: Test probabilities of each seed [S, n, C].
        intervals: Scores of the averaged prediction with their intervals.
        behind: The ensemble's scores minus these; the interval is of both on the same draws of
            rows, and so closer than the two intervals tell. Empty for the ensemble.
        seed_scores: Scores of each seed [S], by name.
        validation: Mean over the folds of the validation scores.
    """

    name: str
    probabilities: Floats
    intervals: dict[str, Interval]
    behind: dict[str, Interval]
    seed_scores: dict[str, Floats]
    validation: dict[str, float]


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
        confusion_interval: 95 % interval of each of its cells, low and high.
        out_of_fold: For each model and fold. Those of the ensemble and of `bagged` are the
            cross-fitted ones, which their validation scores are of; those of `tuned` are of the
            search's own fold models.
        reproduction_gap: Difference between the validation loss that the search recorded and the
            one of training the best trial on its folds again; 0 on the same machine, None if
            that failed.
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
    finalists: Finalists,
    best: TrialRecord,
    default: TrialRecord | None,
    development: Development,
    sealed: SealedTest,
    *,
    seed: int,
    data_source: str,
) -> Evaluation:
    """Puts the ensemble and its rivals together and scores them; opens the test rows.

    Args:
        finalists: What training members and rivals again gave.
        best: The chosen trial.
        default: The trial of the space's default config, if there is one.
        development: The rows that the search saw.
        sealed: The test rows, unopened.
        seed: Seed of the run.
        data_source: Where the table came from.
    """
    ensemble = finalists.ensemble
    notes = [
        f"trial {trial} is missing in the ensemble: {why}"
        for trial, why in finalists.left_out.items()
    ]

    def on_all_rows(plan: Plan) -> Member:
        return member(plan, finalists.networks[plan.trial], development)

    members = tuple(on_all_rows(plan) for plan in ensemble.chosen())
    model = FittedModel(development.classes, members, ensemble.used(), data_source)
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
    for plan, again in finalists.refits:
        if plan.trial == best.number:
            gap = abs(again.val_loss - plan.val_loss)
            alone, parts = ensemble.alone("bagged", plan, again)
            bagged = member(plan, again.networks, development)
            predict = partial(_calibrated, bagged, alone)
            entrants.append(_Entrant("bagged", predict, _fold_scores(parts, development)))
            own = np.exp(again.out_of_fold[0])
            out_of_fold += [*parts, *ensemble.blocks("tuned", own)]
            break
    else:
        notes.append(f"bagged is missing below: {finalists.left_out[best.number]}")
    for name, label, record in (("tuned", "the best trial", best), ("default", _DEFAULT, default)):
        if record is None or record.best is None:
            notes.append(f"{label} is missing below: no trial of it ran to its end")
        elif record.number in finalists.networks:
            one = on_all_rows(Plan.of(record))
            entrants.append(_Entrant(name, one.probabilities, _validation(record)))
        else:
            notes.append(f"{label} is missing below: {finalists.without_networks[record.number]}")
    try:
        boosting = Boosting(development, seed)
        entrants.append(_Entrant("boosting", boosting.probabilities, boosting.validation()))
    except Exception as error:  # scikit-learn's own limits, whatever they are
        notes.append(f"boosting is missing below: {type(error).__name__}: {error}")

    # All that could fail has been trained; from here on it is arithmetic.
    features, y = sealed.open()

    weights, draws = development.reference_weights, derive(seed, "bootstrap")
    models: list[Scored] = []
    final: dict[str, Floats] = {}
    for entrant in entrants:
        threshold = entrant.threshold
        p = entrant.predict(features)
        mean = p.mean(axis=0)
        each = [score(one, y, weights, threshold) for one in p]
        drawn = resample(mean, y, weights, draws, threshold=threshold)
        values = score(mean, y, weights, threshold)
        behind = {}
        if models:
            first = models[0].intervals
            behind = {
                name: interval(first[name].value - value, final[name] - drawn[name])
                for name, value in values.items()
            }
        else:
            final = drawn
        models.append(
            Scored(
                entrant.name,
                p,
                {name: interval(value, drawn[name]) for name, value in values.items()},
                behind,
                {key: np.array([one[key] for one in each]) for key in each[0]},
                entrant.validation,
            )
        )
    table = confusion(models[0].probabilities.mean(axis=0), y, model.combination.threshold)
    return Evaluation(
        model=model,
        ensemble=ensemble.facts(),
        models=models,
        y=y,
        rows=sealed.rows,
        confusion=table,
        confusion_interval=confusion_interval(table),
        out_of_fold=out_of_fold,
        reproduction_gap=gap,
        notes=notes,
    )


_DEFAULT = "the default config"


def _calibrated(one: Member, alone: Combination, features: Features) -> Floats:
    """Probabilities of each stack of a single member [S, n, C]."""
    return np.stack([alone.apply([p]) for p in one.stacks(features)])


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
        for name, own in model.intervals.items():
            spread, gap = model.seed_scores[name], model.behind.get(name)
            yield {
                "model": model.name,
                "split": "test",
                "rows": len(evaluation.y),
                "score": name,
                "value": own.value,
                "low": own.low,
                "high": own.high,
                "ensemble_minus": gap and gap.value,
                "ensemble_minus_low": gap and gap.low,
                "ensemble_minus_high": gap and gap.high,
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
