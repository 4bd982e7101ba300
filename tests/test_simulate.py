import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.simulate import (
    DEFAULT,
    PAGE,
    PUBLISHED,
    asha,
    markdown,
    modelled,
    read_curves,
    record,
    summarize,
)
from benchmarks.surrogate import Curve, Surrogate, random_params
from benchmarks.virtual import Mark, Search, Setting, model, replay
from tune_steel.options import default_grace_period
from tune_steel.scheduler import rungs
from tune_steel.search import search
from tune_steel.space import Params, Space, load_space

MOST = 20
CONFIGS = 40


@pytest.fixture
def space(space_file: Path) -> Space:
    return load_space(space_file)


def level(params: Params) -> float:
    """A smooth function of the config."""
    rate = np.log10(float(params["optimizer.lr"]))
    return float(0.4 + 0.2 * (rate + 2.2) ** 2 + 0.3 * float(params["model.dropout"]))


def curve_of(params: Params) -> Curve:
    length = MOST if float(params["model.dropout"]) < 0.3 else 14
    losses = tuple(level(params) * (1 + 0.5**epoch) for epoch in range(1, length + 1))
    return Curve(params, losses, length < MOST, 0.5 if params["model.depth"] == 1 else 1.0)


@pytest.fixture
def curves(space: Space) -> list[Curve]:
    rng = np.random.default_rng(0)
    others = [random_params(space, rng) for _ in range(CONFIGS - 1)]
    return [curve_of(params) for params in (space.defaults(), *others)]


def search_of(setting: Setting, space: Space, curves: list[Curve], **changed: Any) -> Search:
    given: dict[str, Any] = {"seed": 0, "max_epochs": MOST, "samples": len(curves), **changed}
    params = [curve.params for curve in curves]
    return Search(setting, space, lambda slot, _: curves[slot], configs=params, **given)


def test_without_a_scheduler_every_config_is_trained_to_its_end_and_the_best_is_chosen(
    space: Space, curves: list[Curve]
) -> None:
    search = search_of(Setting("none", "none"), space, curves)
    (mark,) = search.run([10**6])
    assert mark == Mark(min(c.final for c in curves), pytest.approx(np.nan, nan_ok=True), 40, True)
    assert search.epochs == sum(len(c.best) for c in curves)
    assert [r.state for r in search.searcher.records] == ["COMPLETE"] * CONFIGS
    lengths = {r.slot: len(r.epochs) for r in search.searcher.records}
    assert lengths == {slot: len(c.best) for slot, c in enumerate(curves)}


@pytest.mark.parametrize("setting", [Setting("none", "none"), DEFAULT, Setting("m", "median", 3)])
def test_every_epoch_is_counted_once_and_the_budget_ends_the_search(
    space: Space, curves: list[Curve], setting: Setting
) -> None:
    search = search_of(setting, space, curves, epochs=200)
    marks = search.run([100, 200])
    assert search.epochs == 200
    assert sum(len(r.epochs) for r in search.searcher.records) == 200
    assert [m.exhausted for m in marks] == [False, False]
    assert marks[0].trials < marks[1].trials


def test_asha_saves_epochs_and_its_rungs_hold_the_running_bests(
    space: Space, curves: list[Curve]
) -> None:
    search = search_of(asha(3, 3), space, curves)
    search.run([10**6])
    records = search.searcher.records
    assert {r.state for r in records} == {"COMPLETE", "PRUNED"}
    assert search.epochs < 0.6 * sum(len(c.best) for c in curves)
    assert {len(r.epochs) for r in records if r.state == "PRUNED"} <= set(rungs(MOST, 3, 3))
    held: Any = search.scheduler
    for milestone, values in held._brackets[0]._rungs:
        reached = {r.slot for r in records if len(r.epochs) >= milestone}
        bests = {f"t{slot}": -curves[slot].best[int(milestone) - 1] for slot in reached}
        assert values == bests


def test_the_schedulers_metric_can_be_the_epochs_own_loss(
    space: Space, curves: list[Curve]
) -> None:
    up = [Curve(c.params, (*c.val_loss[:2], 9.0, *c.val_loss[3:]), False, 1.0) for c in curves]
    search = search_of(asha(3, 3, metric="val_loss"), space, up, epochs=60)
    search.run([60])
    held: Any = search.scheduler
    assert set(held._brackets[0]._rungs[-1][1].values()) == {-9.0}


def test_a_repeat_gives_the_same_marks_twice_and_all_settings_the_same_order(
    space: Space, curves: list[Curve]
) -> None:
    def marks(setting: Setting, repeat: int, *budgets: int) -> list[tuple[float, int]]:
        given: dict[str, Any] = {"space": space, "curves": curves, "max_epochs": MOST}
        found = replay(setting, repeat=repeat, budgets=budgets, **given)
        return [(mark.loss, mark.trials) for mark in found]

    assert marks(DEFAULT, 1, 100, 300) == marks(DEFAULT, 1, 100, 300)
    assert marks(DEFAULT, 1, 100, 300) != marks(DEFAULT, 2, 100, 300)
    # Nothing is stopped so early.
    assert marks(Setting("none", "none"), 1, 40) == marks(asha(17, 3), 1, 40)


def test_a_surrogate_knows_what_was_recorded_and_predicts_the_rest_better_than_the_mean(
    space: Space, curves: list[Curve]
) -> None:
    surrogate = Surrogate(space, curves, MOST)
    known = surrogate.curve(curves[3].params)
    assert known.val_loss == curves[3].val_loss
    rng = np.random.default_rng(1)
    new = [random_params(space, rng) for _ in range(60)]
    guesses = [surrogate.curve(params) for params in new]
    finals = np.log([curve_of(params).final for params in new])
    errors = np.log([guess.final for guess in guesses]) - finals
    assert np.sqrt(np.mean(errors**2)) < 0.5 * finals.std()
    expected = np.log([guess.expected for guess in guesses]) - finals  # type: ignore[arg-type]
    assert np.sqrt(np.mean(expected**2)) < 0.3 * finals.std()
    assert all(np.diff(guess.val_loss).max() <= 0 for guess in guesses)
    assert surrogate.curve(new[0]) == guesses[0]
    quality = surrogate.quality(curves, 6)
    assert quality["spearman"] > 0.9
    assert quality["rmse"] < 0.3 * quality["sd"]


def test_tpe_on_a_surrogate_is_repeatable_and_takes_the_given_options(
    space: Space, curves: list[Curve]
) -> None:
    surrogate = Surrogate(space, curves, MOST)
    losses = []
    for options in ({}, {}, {"n_startup_trials": 1000}):
        setting = Setting("tpe", search="tpe", tpe=options)
        given: dict[str, Any] = {"space": space, "surrogate": surrogate, "max_epochs": MOST}
        marks = model(setting, repeat=0, budgets=(100, 300), **given)
        losses.append([mark.loss for mark in marks])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_differences_are_paired(space: Space) -> None:
    default = [[Mark(0.5 + 0.1 * i, 0.5, 10, False)] for i in range(4)]
    better = [[Mark(0.4 + 0.1 * i, 0.5, 20, i == 0)] for i in range(4)]
    (row,) = summarize(better, default, 0.3, (100,))
    assert row["regret"] == pytest.approx(0.25)
    assert row["difference"] == pytest.approx(-0.1)
    assert row["high"] == pytest.approx(-0.1)
    assert (row["trials"], row["exhausted"], row["repeats"]) == (20, 0.25, 4)


def test_a_runs_curves_are_kept_and_failed_trials_left_out(tmp_path: Path) -> None:
    run = {"run": "r", "task": "binary", "space": {}, "versions": {}}
    options = {"max_epochs": 3, "folds": 5}
    (tmp_path / "run.json").write_text(json.dumps({**run, "options": options}))
    trials = [
        {"trial": 0, "state": "COMPLETE", "model.depth": 2, "model.width_2": 64},
        {"trial": 1, "state": "FAIL", "model.depth": 1, "model.width_2": None},
        {"trial": 2, "state": "COMPLETE", "model.depth": 1, "model.width_2": None},
    ]
    pq.write_table(pa.Table.from_pylist(trials), tmp_path / "trials.parquet")
    epochs = [
        {"trial": trial, "epoch": epoch, "val_loss": loss, "seconds": 0.5 * epoch}
        for trial, epoch, loss in [(2, 2, 0.4), (2, 1, 0.5), (0, 1, 0.9), (0, 2, 0.7), (0, 3, 0.8)]
    ]
    pq.write_table(pa.Table.from_pylist(epochs), tmp_path / "epochs.parquet")
    record(tmp_path, tmp_path)
    curves, most = read_curves(tmp_path / "binary.parquet")
    assert most == 3
    assert curves == [
        Curve({"model.depth": 2, "model.width_2": 64}, (0.9, 0.7, 0.8), False, 1.0),
        Curve({"model.depth": 1}, (0.5, 0.4), True, 0.75),
    ]
    assert curves[0].best == [0.9, 0.7, 0.7]


def test_the_page_of_the_defaults_shows_the_published_figures() -> None:
    page = PAGE.read_text()
    for part in ("replay", "surrogate"):
        assert f"<!-- {part} -->\n{markdown(part)}<!-- end -->" in page


def test_the_products_defaults_are_those_that_were_compared_first() -> None:
    """What all others were compared with is what `make search` does."""
    given = inspect.signature(search).parameters
    assert given["scheduler"].default == "asha"
    assert given["reduction_factor"].default == DEFAULT.factor
    assert given["grace_period"].default is None
    assert default_grace_period(given["max_epochs"].default) == DEFAULT.grace
    assert given["search"].default == "tpe"
    first = modelled()[0]
    assert (first.search, first.tpe) == ("tpe", {})
    repeats = {r["part"]: r["repeats"] for r in pq.read_table(PUBLISHED).to_pylist()}
    assert repeats == {"replay": 60, "surrogate": 20}
