"""The final evaluation, rule by rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_SPACE
from searches import options_of
from sklearn.ensemble import HistGradientBoostingClassifier

from tune_steel.data import Table, load_steel
from tune_steel.errors import NonFiniteLossError
from tune_steel.evaluate import SEEDS, Boosting, evaluate, retrain
from tune_steel.fit import Fit
from tune_steel.job import choose
from tune_steel.scores import score
from tune_steel.seeds import derive
from tune_steel.space import Space, load_space
from tune_steel.splits import Development, SealedTest, freeze, prepare
from tune_steel.study import TrialRecord
from tune_steel.tasks import steel_task
from tune_steel.trainable import replica_seeds, report_row

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = options_of(max_epochs=50, grace_period=6)


@pytest.fixture(scope="module")
def steel() -> Table:
    return load_steel(source="stand-in")


@pytest.fixture
def rows(steel: Table) -> tuple[Development, SealedTest]:
    task = steel_task(steel, "binary")
    development, sealed, _ = prepare(task, freeze(task, seed=0, split=task.split, folds=2))
    return development, sealed


@pytest.fixture
def space(tmp_path: Path) -> Space:
    # The learning rate falls at every epoch that is not better.
    text = SMALL_SPACE + "[schedule]\nplateau_patience = 0\nplateau_factor = 0.3\n"
    (tmp_path / "s.toml").write_text(text)
    return load_space(tmp_path / "s.toml")


def trial(space: Space, development: Development, number: int = 0, **params: Any) -> TrialRecord:
    """A trial that ran to its end, in this process."""
    values = {**space.defaults(), **params}
    config = space.config(values)
    seed = derive("t", number)
    record = TrialRecord(number, number, seed, values, config, state="COMPLETE")
    seeds = replica_seeds(record.seed, len(development.folds))
    fit = Fit(record.config, development, development.folds, seeds)
    record.epochs = [{**report_row(r), "node": "here"} for r in fit.epochs(12)]
    return record


def run(
    best: TrialRecord, default: TrialRecord | None, rows: tuple[Development, SealedTest]
) -> Any:
    return evaluate(best, default, *rows, seed=0, data_source="stand-in", device="cpu")


def ended(number: int, state: str, epochs: int, loss: float, space: Space) -> TrialRecord:
    values = space.defaults()
    curve = [{"best_val_loss": loss, "best_epoch": 1} for _ in range(epochs)]
    config = space.config(values)
    return TrialRecord(number, number, 0, values, config, state=state, epochs=curve)


def test_the_lowest_loss_wins_among_trials_that_had_a_full_chance(space: Space) -> None:
    # Rungs are at 6 and 18: a trial that was stopped at 6 had none, however good it looked.
    records = [
        ended(0, "COMPLETE", 50, 0.50, space),
        ended(1, "PRUNED", 6, 0.10, space),
        ended(2, "PRUNED", 18, 0.40, space),
        ended(3, "FAIL", 30, 0.05, space),
        ended(4, "INTERRUPTED", 40, 0.01, space),
        ended(5, "COMPLETE", 12, 0.45, space),
    ]
    best = choose(records, OPTIONS)
    assert best is not None
    assert best.number == 2
    best = choose([r for r in records if r.number != 2], OPTIONS)
    assert best is not None
    assert best.number == 5


def test_a_search_that_was_cut_short_takes_the_best_of_what_the_scheduler_stopped(
    space: Space,
) -> None:
    records = [
        ended(0, "INTERRUPTED", 40, 0.1, space),
        ended(1, "PRUNED", 6, 0.4, space),
        ended(2, "PRUNED", 6, 0.3, space),
    ]
    best = choose(records, OPTIONS)
    assert best is not None
    assert best.number == 2
    assert choose(records[:1], OPTIONS) is None


def test_the_retrained_model_repeats_the_trials_learning_rates_up_to_its_best_epoch(
    space: Space, rows: tuple[Development, SealedTest]
) -> None:
    development, _ = rows
    record = trial(space, development, **{"optimizer.lr": 0.1})
    best = record.best
    assert best is not None
    rates = [row["learning_rate"] for row in record.epochs]
    assert 1 < best["epoch"] < len(record.epochs)
    assert rates[best["epoch"] - 1] < rates[0]

    everything = np.arange(len(development.y))
    by_hand = Fit(
        record.config,
        development,
        [(everything, everything[:0])] * SEEDS,
        [derive(3, "retrain", i) for i in range(SEEDS)],
    )
    for rate in rates[: best["epoch"]]:
        by_hand.train_epoch(rate)
    model = retrain(record, development, 3, "stand-in", "cpu")
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, by_hand.network.state_dict()[name]), name


def test_boosting_is_validated_on_rows_that_it_was_not_trained_on(
    rows: tuple[Development, SealedTest],
) -> None:
    development, _ = rows
    losses = []
    for train, val in development.folds:
        model = HistGradientBoostingClassifier(random_state=derive(0, "boosting"))
        model.fit(development.features.numeric[train], development.y[train])
        p = model.predict_proba(development.features.numeric[val])
        losses.append(score(p, development.y[val], development.reference_weights)["log_loss"])
    found = Boosting(development, 0).validation()["log_loss"]
    assert found == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_default_stands_beside_the_winner_with_a_curve_of_its_own(
    space: Space, rows: tuple[Development, SealedTest]
) -> None:
    development, _ = rows
    default = trial(space, development)
    best = trial(space, development, number=4, **{"optimizer.lr": 0.03})
    done = run(best, default, rows)
    assert [model.name for model in done.models] == ["tuned", "default", "boosting"]
    assert done.notes == []
    tuned, beside, _ = done.models
    assert tuned.probabilities.shape == beside.probabilities.shape == (SEEDS, 97, 2)
    assert not np.allclose(tuned.probabilities, beside.probabilities)
    assert beside.validation["loss"] == default.best["val_loss"]  # type: ignore[index]
    assert done.reproduction_gap == 0
    assert done.confusion.sum() == 97
    low, high = done.confusion_interval
    assert ((low <= done.confusion) & (done.confusion <= high)).all()


def test_a_default_that_is_the_winner_is_not_trained_twice_and_scores_the_same(
    space: Space, rows: tuple[Development, SealedTest]
) -> None:
    default = trial(space, rows[0])
    done = run(default, default, rows)
    assert np.array_equal(done.models[0].probabilities, done.models[1].probabilities)


def test_a_rival_that_cannot_be_trained_costs_the_winner_nothing_and_is_said(
    space: Space, rows: tuple[Development, SealedTest]
) -> None:
    development, _ = rows
    best = trial(space, development, number=4)
    default = trial(space, development)
    broken = default.config.model_copy(
        update={"loss": default.config.loss.model_copy(update={"pos_weight": 3e38})}
    )
    done = run(best, replace(default, config=broken), rows)
    assert [model.name for model in done.models] == ["tuned", "boosting"]
    assert "the default config is missing below" in done.notes[0]
    assert "is not finite" in done.notes[0]


def test_a_default_without_an_epoch_is_said(
    space: Space, rows: tuple[Development, SealedTest]
) -> None:
    best = trial(space, rows[0], number=4)
    done = run(best, ended(0, "FAIL", 0, 0.0, space), rows)
    assert [model.name for model in done.models] == ["tuned", "boosting"]
    assert "its trial did not get past an epoch" in done.notes[0]


def test_a_winner_that_cannot_be_retrained_leaves_the_test_rows_sealed(
    space: Space, rows: tuple[Development, SealedTest]
) -> None:
    development, sealed = rows
    best = trial(space, development)
    best.epochs = [{**row, "learning_rate": float("nan")} for row in best.epochs]
    with pytest.raises(NonFiniteLossError):
        run(best, None, rows)
    sealed.open()  # would raise if it had been opened
