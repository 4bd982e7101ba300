"""The final evaluation, rule by rule."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from trials import Rows, trial

from tune_steel.boosting import Boosting
from tune_steel.ensemble import ThresholdRule, combine, cross_fit
from tune_steel.errors import NonFiniteLossError
from tune_steel.evaluate import Evaluation, evaluate
from tune_steel.finalists import Finalists, train_finalists
from tune_steel.refit import (
    SEEDS,
    SEEDS_A_MEMBER,
    Plan,
    member,
    refit,
    retrain,
    validation_rows,
)
from tune_steel.scores import decide, score
from tune_steel.seeds import derive
from tune_steel.space import Space
from tune_steel.splits import Development
from tune_steel.study import TrialRecord
from tune_steel.summary import evaluation_summary, render

pytestmark = pytest.mark.usefixtures("one_thread")


def train(how: Any, plans: Sequence[Plan], development: Development) -> list[Any]:
    """A `Trainer` in this process."""
    results: list[Any] = []
    for plan in plans:
        try:
            *_, last = how(plan, development, "cpu")
            results.append(last)
        except NonFiniteLossError as error:
            results.append(str(error))
    return results


def finalists(
    trials: list[TrialRecord],
    default: TrialRecord | None,
    development: Development,
    rule: ThresholdRule = "none",
    train: Callable[..., list[Any]] = train,
) -> Finalists:
    """Trials trained again, the best one first."""
    rivals = [Plan.of(r) for r in (trials[0], default) if r is not None and r.best is not None]
    plans = [Plan.of(record) for record in trials]
    trainer = partial(train, development=development)
    return train_finalists(plans, rivals, development, 0, rule, trainer)


def run(
    trials: list[TrialRecord],
    default: TrialRecord | None,
    steel_rows: Rows,
    rule: ThresholdRule = "none",
    train: Callable[..., list[Any]] = train,
) -> Evaluation:
    """Their evaluation."""
    development, sealed = steel_rows
    found = finalists(trials, default, development, rule, train)
    return evaluate(found, trials[0], default, development, sealed, seed=0, data_source="stand-in")


def names(done: Evaluation) -> list[str]:
    return [model.name for model in done.models]


def test_boosting_is_validated_on_rows_that_it_was_not_trained_on(
    steel_rows: Rows,
) -> None:
    development, _ = steel_rows
    losses = []
    for train, val in development.folds:
        model = HistGradientBoostingClassifier(random_state=derive(0, "boosting"))
        model.fit(development.features.numeric[train], development.y[train])
        p = model.predict_proba(development.features.numeric[val])
        losses.append(score(p, development.y[val], development.reference_weights)["log_loss"])
    found = Boosting(development, 0).validation()["log_loss"]
    assert found == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_ensemble_stands_first_and_every_rival_has_figures_of_its_own(
    decaying_space: Space, steel_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    development, _ = steel_rows
    default = trial(decaying_space, development)
    best = trial(
        decaying_space, development, number=4, **{"optimizer.lr": 0.03, "loss.pos_weight": 3.0}
    )
    done = run([best, default], default, steel_rows)
    assert names(done) == ["ensemble", "bagged", "tuned", "default", "boosting"]
    assert done.notes == []
    ensemble, bagged, tuned, beside, _ = done.models
    assert ensemble.probabilities.shape == (1, 97, 2)
    assert bagged.probabilities.shape == (SEEDS_A_MEMBER, 97, 2)
    assert tuned.probabilities.shape == beside.probabilities.shape == (SEEDS, 97, 2)
    assert not np.allclose(tuned.probabilities, beside.probabilities)
    assert beside.validation["loss"] == default.best["val_loss"]  # type: ignore[index]
    assert done.reproduction_gap == 0
    assert done.confusion.sum() == 97
    assert ensemble.behind == {}
    for one in done.models[1:]:
        for name, gap in one.behind.items():
            assert gap.value == ensemble.intervals[name].value - one.intervals[name].value
            assert gap.low is None or gap.high is None or gap.low <= gap.value <= gap.high
    monkeypatch.setenv("COLUMNS", "80")
    narrow = render(*evaluation_summary(done, development.classes), terminal=True)
    assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", narrow).splitlines())) <= 80
    for name in ensemble.intervals:
        assert len(re.findall(rf"│ {name} ", narrow)) == 2, name  # test and validation
    low, high = done.confusion_interval
    assert ((low <= done.confusion) & (done.confusion <= high)).all()

    # The final model's networks are those on all rows.
    for one in done.model.members:
        assert [len(network.state_dict()["head.weight"]) for network in one.networks] == [SEEDS]
    facts = done.ensemble
    assert [m.trial for m in facts.members] == [4, 0]
    assert sum(m.weight for m in facts.members) == pytest.approx(1)
    assert len(done.model.members) == sum(m.weight > 0 for m in facts.members)
    assert facts.log_loss <= min(m.log_loss for m in facts.members)
    assert facts.cross_fitted
    for model in ("ensemble", "bagged", "tuned"):
        parts = [part for part in done.out_of_fold if part.model == model]
        assert [part.fold for part in parts] == [0, 1]
        losses = [
            score(part.probabilities, part.y, development.reference_weights)["loss"]
            for part in parts
        ]
        (scored,) = (one for one in done.models if one.name == model)
        assert np.mean(losses) == pytest.approx(scored.validation["loss"], rel=1e-9)


def test_the_best_trials_fold_models_are_calibrated_as_a_member_is(
    decaying_space: Space, steel_rows: Rows
) -> None:
    development, sealed = steel_rows
    features, _ = replace(sealed).open()
    best = trial(decaying_space, development, number=4, **{"loss.pos_weight": 3.0})
    done = run([best], None, steel_rows)
    plan = Plan.of(best)
    *_, again = refit(plan, development, "cpu")
    assert again is not None
    positions, fold = validation_rows(development)
    given = (again.probabilities()[np.newaxis], development.y[positions], np.array([[1.0, 3.0]]))
    parts = [part for part in done.out_of_fold if part.model == "bagged"]
    for part, (p, _) in zip(parts, cross_fit(*given, fold), strict=True):
        assert np.array_equal(part.probabilities, p)
    alone = combine(*given)
    assert alone.of_members[0].bias != (0, 0)
    stacks = member(plan, again.networks, development).stacks(features)
    assert np.array_equal(done.models[1].probabilities, [alone.apply([p]) for p in stacks])


def test_a_chosen_threshold_decides_the_ensembles_scores_and_no_other(
    decaying_space: Space, steel_rows: Rows
) -> None:
    best = trial(decaying_space, steel_rows[0], number=4)
    done = run([best], None, steel_rows, "balanced")
    threshold = done.model.combination.threshold
    assert threshold is not None
    assert threshold != 0.5
    for model in done.models:
        p = model.probabilities.mean(axis=0)
        predicted = decide(p, threshold if model.name == "ensemble" else None)
        found = model.intervals["accuracy"].value
        assert found == pytest.approx(np.mean(predicted == done.y)), model.name
    p = done.models[0].probabilities.mean(axis=0)
    assert done.confusion[:, 1].sum() == (p[:, 1] > threshold).sum()


def test_a_default_that_is_the_winner_is_not_trained_twice_and_scores_the_same(
    decaying_space: Space, steel_rows: Rows
) -> None:
    default = trial(decaying_space, steel_rows[0])
    trained: list[int] = []

    def once(how: Any, plans: Sequence[Plan], development: Development) -> list[Any]:
        trained.extend(plan.trial for plan in plans)
        return train(how, plans, development)

    done = run([default], default, steel_rows, train=once)
    assert trained == [0, 0]  # on the folds, and on all rows
    assert names(done)[2:4] == ["tuned", "default"]
    assert np.array_equal(done.models[2].probabilities, done.models[3].probabilities)


def test_what_cannot_be_trained_again_costs_the_rest_nothing_and_is_said(
    decaying_space: Space, steel_rows: Rows
) -> None:
    development, _ = steel_rows
    best = trial(decaying_space, development, number=4)
    other = trial(decaying_space, development, number=5)
    broken = other.config.model_copy(
        update={"loss": other.config.loss.model_copy(update={"pos_weight": 3e38})}
    )

    def dies(how: Any, plans: Sequence[Plan], development: Development) -> list[Any]:
        results = train(how, plans, development)
        folds = how is refit
        return [
            "its worker died" if folds and plan.trial == 4 else result
            for plan, result in zip(plans, results, strict=True)
        ]

    default = replace(other, number=0, config=broken)
    done = run([best, other], default, steel_rows, train=dies)
    assert names(done) == ["ensemble", "tuned", "boosting"]
    assert [m.trial for m in done.ensemble.members] == [5]
    assert done.reproduction_gap is None
    assert {part.model for part in done.out_of_fold} == {"ensemble"}
    assert done.notes[:2] == [
        "trial 4 is missing in the ensemble: its worker died",
        "bagged is missing below: its worker died",
    ]
    assert "the default config is missing below" in done.notes[2]
    assert "is not finite" in done.notes[2]


def test_a_member_without_networks_on_all_rows_leaves_its_weight_to_others(
    decaying_space: Space, steel_rows: Rows
) -> None:
    development, _ = steel_rows
    trials = [
        trial(decaying_space, development, number=number, **{"optimizer.lr": lr})
        for number, lr in ((4, 0.1), (5, 0.03), (6, 0.003))
    ]
    facts = finalists(trials, None, development).ensemble.facts()
    weights = {m.trial: m.weight for m in facts.members}
    heaviest = max(weights, key=lambda number: weights[number])
    asked: list[list[int]] = []

    def fails(how: Any, plans: Sequence[Plan], development: Development) -> list[Any]:
        asked.append([plan.trial for plan in plans])
        results = train(how, plans, development)
        folds = how is refit
        return [
            result if folds or plan.trial != heaviest else "it diverged"
            for plan, result in zip(plans, results, strict=True)
        ]

    done = run(trials, None, steel_rows, train=fails)
    left = [number for number in (4, 5, 6) if number != heaviest]
    assert [m.trial for m in done.ensemble.members] == left
    assert sum(m.weight for m in done.ensemble.members) == pytest.approx(1)
    assert done.notes[0] == f"trial {heaviest} is missing in the ensemble: it diverged"
    # Nothing is trained twice, and on all rows only what has a weight or is a rival.
    assert asked[0] == [4, 5, 6]
    on_all_rows = [number for numbers in asked[1:] for number in numbers]
    assert len(on_all_rows) == len(set(on_all_rows))
    used = {m.trial for m in done.ensemble.members if m.weight > 0}
    assert set(on_all_rows) == used | {n for n, w in weights.items() if w > 0} | {4}


@pytest.mark.parametrize("best", [4, 5, 6])  # two with a weight, and one without
def test_without_the_best_trial_on_all_rows_its_fold_models_are_there_all_the_same(
    decaying_space: Space, steel_rows: Rows, best: int
) -> None:
    development, sealed = steel_rows
    trials = [
        trial(decaying_space, development, number=number, **{"optimizer.lr": lr})
        for number, lr in ((4, 0.1), (5, 0.03), (6, 0.0003))
    ]
    trials.sort(key=lambda record: record.number != best)
    whole = run(trials, None, (development, replace(sealed)))  # test rows open once
    weights = {m.trial: m.weight for m in whole.ensemble.members}
    assert (weights[best] > 0) == (best != 6)

    def fails(how: Any, plans: Sequence[Plan], development: Development) -> list[Any]:
        return [
            result if how is refit or plan.trial != best else "it diverged"
            for plan, result in zip(plans, train(how, plans, development), strict=True)
        ]

    done = run(trials, None, steel_rows, train=fails)
    assert names(done) == ["ensemble", "bagged", "boosting"]
    assert np.array_equal(done.models[1].probabilities, whole.models[1].probabilities)
    assert done.reproduction_gap == 0
    assert {part.model for part in done.out_of_fold} == {"ensemble", "bagged", "tuned"}
    missing = f"trial {best} is missing in the ensemble: it diverged"
    assert (missing in done.notes) == (weights[best] > 0)
    assert "the best trial is missing below: it diverged" in done.notes
    if not weights[best]:  # it costs the ensemble nothing
        assert np.array_equal(done.models[0].probabilities, whole.models[0].probabilities)


def test_a_default_without_an_epoch_is_said(decaying_space: Space, steel_rows: Rows) -> None:
    best = trial(decaying_space, steel_rows[0], number=4)
    failed = replace(best, number=0, state="FAIL", epochs=[])
    done = run([best], failed, steel_rows)
    assert names(done) == ["ensemble", "bagged", "tuned", "boosting"]
    assert "no trial of it ran to its end" in done.notes[0]


@pytest.mark.parametrize("where", [refit, retrain])
def test_without_a_member_the_test_rows_stay_sealed(
    decaying_space: Space, steel_rows: Rows, where: Callable[..., Any]
) -> None:
    development, sealed = steel_rows
    best = trial(decaying_space, development)

    def diverges(how: Any, plans: Sequence[Plan], development: Development) -> list[Any]:
        if getattr(how, "func", how) is where:
            return ["it diverged"] * len(plans)
        return train(how, plans, development)

    with pytest.raises(NonFiniteLossError, match=r"no member of the ensemble .* it diverged"):
        run([best], None, steel_rows, train=diverges)
    sealed.open()  # would raise if it had been opened
