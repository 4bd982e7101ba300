from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState

from benchmarks import packs
from benchmarks.packs import PackSearch, architecture, gains, network_of, sharing_rows, sooner
from benchmarks.surrogate import Curve
from benchmarks.virtual import Search
from tune_steel.data import load_steel
from tune_steel.fit import Fit
from tune_steel.space import Params, Space, load_space
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tasks import steel_task

MOST, EPOCHS = 20, 300


@pytest.fixture(scope="module")
def development() -> Development:
    task = steel_task(load_steel(None, "stand-in"), "binary")
    return prepare(task, freeze(task, seed=0, split=(0.3, 0.1, 0.6), folds=2))[0]


@pytest.fixture
def space(space_file: Path) -> Space:
    return load_space(space_file)


def curve_of(params: Params) -> Curve:
    level = 0.4 + 0.2 * (np.log10(float(params["optimizer.lr"])) + 2.2) ** 2
    losses = tuple(float(level) * (1 + 0.5**epoch) for epoch in range(1, MOST + 1))
    return Curve(params, losses, False, 0.5 if params["model.depth"] == 1 else 1.0)


def search_of(space: Space, size: int | None, gain: packs.Gain = float) -> Search:
    def curve(slot: int, params: Params) -> Curve:
        return curve_of(params)

    given = {"configs": [space.defaults()], "seed": 0, "max_epochs": MOST, "samples": 10**6}
    if size is None:
        return Search(packs.SETTING, space, curve, epochs=EPOCHS, **given)
    return PackSearch(size, gain, packs.SETTING, space, curve, epochs=EPOCHS, **given)


@pytest.mark.usefixtures("one_thread")
def test_the_trials_of_a_pack_learn_what_they_learn_alone(development: Development) -> None:
    config = network_of((16, 8), 32)
    folds = len(development.folds)
    packed = packs.pack(config, development, 3)
    together = [packed.train_epoch(1e-2) for _ in range(3)]
    scores = packed.score()["loss"]
    assert len(set(scores)) == 3 * folds
    for trial in range(3):
        own = slice(trial * folds, (trial + 1) * folds)
        alone = Fit(config, development, development.folds, range(own.start, own.stop))
        for losses in together:
            np.testing.assert_allclose(losses[own], alone.train_epoch(1e-2), rtol=1e-6)
        np.testing.assert_allclose(scores[own], alone.score()["loss"], rtol=1e-6)


def test_packs_of_one_are_the_search_without_packs(space: Space) -> None:
    plain, packed = search_of(space, None), search_of(space, 1)
    marks = [[(m.loss, m.trials) for m in s.run([100, 200])] for s in (plain, packed)]
    assert marks[0] == marks[1]
    params = [[r.params for r in s.searcher.records] for s in (plain, packed)]
    assert params[0] == params[1]


def test_a_pack_shares_its_architecture_and_nothing_else(space: Space) -> None:
    search = search_of(space, 4)
    search.run([])
    params = [record.params for record in search.searcher.records]
    for start in range(0, len(params) - 3, 4):
        members = params[start : start + 4]
        assert len({architecture(member) for member in members}) == 1
        assert len({member["optimizer.lr"] for member in members}) == 4
    assert len({architecture(member) for member in params}) > 1
    states = {t.state for t in search.searcher._study.trials}
    assert TrialState.PRUNED in states  # so some packs have shrunk


def test_a_pack_takes_its_members_time_over_the_gain_of_so_many(space: Space) -> None:
    ends = {}
    for name, gain in {"none": lambda n: 1.0, "half": lambda n: 2.0}.items():
        search = search_of(space, 4, gain)
        assert isinstance(search, PackSearch)
        search.run([])
        ends[name] = search.seconds[-1]
        assert len(search.searcher.records[0].epochs) <= MOST
    assert ends["none"] == pytest.approx(2 * ends["half"])


def test_gains_are_ratios_within_a_repeat() -> None:
    seconds = np.array([[1.0, 2.0, 2.0, 2.0], [3.0, 6.0, 6.0, 6.0]])
    np.testing.assert_allclose(gains(seconds), [[1, 1, 2, 4]] * 3)


def test_sooner_is_the_ratio_of_the_times_at_the_worse_of_the_last_losses() -> None:
    times = np.arange(1.0, 101.0)
    single = [(times, 1 - times / 200)] * 2
    packed = [(times / 4, 1 - times / 200)] * 2
    assert sooner(single, single) == 1
    assert sooner(single, packed) == pytest.approx(4, rel=0.02)
    assert sooner(packed, single) == pytest.approx(1 / 4, rel=0.02)


def test_trials_are_counted_with_the_others_of_their_architecture(space: Space) -> None:
    one = space.defaults()
    other = {**one, "optimizer.batch_size": 32}
    alike = {**one, "optimizer.lr": 0.05, "model.dropout": 0.3}
    shares = {r["pack"]: r["trials"] for r in sharing_rows([[one, alike, other], [one]])}
    assert shares == {1: 1.0, 2: 0.5, 4: 0.0, 8: 0.0}


def test_the_page_shows_the_published_figures() -> None:
    rows = pq.read_table(packs.PUBLISHED).to_pylist()
    assert packs.markdown(rows) in packs.PAGE.read_text(encoding="utf-8")
    assert {row["part"] for row in rows} == {"speed", "sharing", "search"}
    assert {row["data_source"] for row in rows} <= {"file", "cache", "openml"}
