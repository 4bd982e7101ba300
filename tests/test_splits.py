import pickle

import numpy as np
import pandas as pd
import pytest

from tune_steel.data import FLAGS, Table, load_steel
from tune_steel.errors import DataError, OptionError
from tune_steel.splits import Splits, freeze, prepare, split_hash
from tune_steel.tasks import STEEL_TASKS, Task, own_task, steel_task


@pytest.fixture(scope="module")
def steel() -> Table:
    return load_steel(source="stand-in")


def cut(task: Task, seed: int = 0, folds: int = 5) -> Splits:
    return freeze(task, seed=seed, split=task.split, folds=folds)


def own(**columns: object) -> Task:
    return own_task(Table("mine", pd.DataFrame(columns), "file", "hash"), "label")


@pytest.mark.parametrize("name", STEEL_TASKS)
@pytest.mark.parametrize("folds", [1, 2, 5, 10])
def test_the_number_of_folds_never_changes_the_test_rows(
    steel: Table, name: str, folds: int
) -> None:
    task = steel_task(steel, name)
    assert cut(task, folds=folds).test.tolist() == cut(task, folds=1).test.tolist()


@pytest.mark.parametrize("name", STEEL_TASKS)
def test_splits_are_disjoint_whole_stratified_and_sized_as_asked(steel: Table, name: str) -> None:
    task = steel_task(steel, name)
    splits = cut(task)
    together = np.concatenate([splits.train, splits.val, splits.test])
    assert sorted(together) == list(range(len(task.y)))
    shares = np.bincount(task.y) / len(task.y)
    for rows, share in zip((splits.train, splits.val, splits.test), task.split, strict=True):
        assert abs(len(rows) - share * len(task.y)) <= 1
        found = np.bincount(task.y[rows], minlength=len(shares)) / len(rows)
        assert np.abs(found - shares).max() < 1 / len(rows) + 1e-9


def test_the_binary_test_split_has_97_rows(steel: Table) -> None:
    assert len(cut(steel_task(steel, "binary")).test) == 97


def test_every_development_row_is_validated_on_exactly_once(steel: Table) -> None:
    splits = cut(steel_task(steel, "faults7"))
    validated = np.concatenate([val for _, val in splits.folds])
    assert sorted(validated) == splits.development.tolist()
    for train, val in splits.folds:
        assert not set(train) & set(val)
        assert len(train) + len(val) == len(splits.development)


def test_one_fold_is_the_plain_split(steel: Table) -> None:
    splits = cut(steel_task(steel, "binary"), folds=1)
    ((train, val),) = splits.folds
    assert train.tolist() == splits.train.tolist()
    assert val.tolist() == splits.val.tolist()


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(steel: Table) -> None:
    task = steel_task(steel, "binary")
    first, again, other = cut(task), cut(task), cut(task, seed=1)
    assert split_hash(first.test) == split_hash(again.test)
    assert split_hash(first.test) != split_hash(other.test)
    for (a, b), (c, d) in zip(first.folds, again.folds, strict=True):
        assert a.tolist() == c.tolist()
        assert b.tolist() == d.tolist()


@pytest.mark.parametrize("split", [(0.5, 0.2, 0.2), (0.9, 0.1, 0.0), (1.2, -0.1, -0.1)])
def test_shares_must_be_positive_and_sum_to_one(
    steel: Table, split: tuple[float, float, float]
) -> None:
    with pytest.raises(OptionError, match="sum to 1"):
        freeze(steel_task(steel, "binary"), seed=0, split=split, folds=5)


@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("rare", [1, 2])
def test_a_class_too_rare_for_its_splits_is_named(folds: int, rare: int) -> None:
    task = own(x=range(100), label=["often"] * (100 - rare) + ["seldom"] * rare)
    with pytest.raises(DataError, match=f"class 'seldom' has {rare} rows, too few"):
        freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=folds)


def test_a_class_too_rare_for_its_folds_is_named() -> None:
    task = own(x=range(100), label=["often"] * 93 + ["seldom"] * 7)
    assert len(freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=5).folds) == 5
    with pytest.raises(DataError, match="too few for the 10 folds"):
        freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=10)


def test_folds_need_no_validation_split() -> None:
    task = own(x=range(90), label=[*"abcdef"] * 15)
    splits = freeze(task, seed=0, split=(0.78, 0.02, 0.2), folds=5)
    assert len(splits.development) == 72
    assert all(len(np.unique(task.y[val])) == 6 for _, val in splits.folds)
    with pytest.raises(DataError, match="too few for the splits"):
        freeze(task, seed=0, split=(0.78, 0.02, 0.2), folds=1)


def test_reference_weights_are_the_inverse_frequencies_of_the_development_rows(
    steel: Table,
) -> None:
    task = steel_task(steel, "multiclass")
    splits = cut(task)
    development, _, _ = prepare(task, splits)
    counts = np.bincount(task.y[splits.development])
    np.testing.assert_allclose(
        development.reference_weights, counts.sum() / (len(counts) * counts), rtol=1e-12
    )


@pytest.mark.parametrize("name", STEEL_TASKS)
def test_what_workers_get_holds_no_flag_and_no_test_row(steel: Table, name: str) -> None:
    task = steel_task(steel, name)
    development, sealed, _ = prepare(task, cut(task))
    assert not set(development.schema.numeric) & {*FLAGS, "Class"}
    assert development.features.numeric.shape[1] == 27
    assert not set(development.rows) & set(sealed.rows)
    test_features, _ = sealed.open()
    seen = {row.tobytes() for row in development.features.numeric}
    assert not any(row.tobytes() in seen for row in test_features.numeric)


def test_nothing_that_workers_get_depends_on_the_test_rows(steel: Table) -> None:
    task = steel_task(steel, "binary")
    splits = cut(task)
    before, _, _ = prepare(task, splits)
    scrambled = task.frame.copy()
    scrambled.iloc[splits.test] = 1e9
    y = task.y.copy()
    y[splits.test] = 1 - y[splits.test]
    other = Task(task.name, task.classes, task.features, scrambled, y, task.rows, task.split)
    after, _, _ = prepare(other, splits)
    assert pickle.dumps(before) == pickle.dumps(after)


def test_the_test_rows_open_once_and_do_not_travel(steel: Table) -> None:
    task = steel_task(steel, "binary")
    _, sealed, _ = prepare(task, cut(task))
    with pytest.raises(TypeError, match="do not travel"):
        pickle.dumps(sealed)
    _, y = sealed.open()
    assert len(y) == 97
    with pytest.raises(RuntimeError, match="opened once"):
        sealed.open()


def test_columns_become_numbers_flags_and_categories() -> None:
    rng = np.random.default_rng(0)
    n = 200
    task = own(
        number=rng.normal(size=n),
        gaps=np.where(rng.random(n) < 0.5, np.nan, 1.0 + rng.random(n)),
        colour=rng.choice(["red", "blue"], n),
        flag=rng.random(n) < 0.5,
        same=[3] * n,
        many=[f"v{i % 90}" for i in range(n)],
        id=[f"row {i}" for i in range(n)],
        label=np.arange(n) % 2,
    )
    development, sealed, notes = prepare(
        task, freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=5)
    )
    schema = development.schema
    assert schema.numeric == ("number", "gaps")
    assert schema.flagged == (1,)
    assert dict(schema.categorical)["colour"] == ("blue", "red")
    assert dict(schema.categorical)["flag"] == ("False", "True")
    assert len(dict(schema.categorical)["many"]) == 64
    assert notes[0] == "column same is constant and was dropped"
    assert "column many has" in notes[1]
    assert notes[2] == "column id names every row differently and was dropped"
    features, _ = sealed.open()
    assert features.codes[:, 2].min() == -1


def test_test_rows_whose_categories_are_all_unknown_are_encoded_without_a_word() -> None:
    names = [f"name {i}" for i in range(39)]
    task = own(x=range(40), name=[*names, names[0]], label=["a", "b"] * 20)
    _, sealed, _ = prepare(task, cut(task, folds=2))
    features, _ = sealed.open()
    assert features.codes.tolist() == [[-1]] * 6


def test_a_gap_in_a_category_is_a_category_of_its_own() -> None:
    task = own(colour=["red", None, "blue", "red"] * 25, label=[0, 1, 0, 1] * 25)
    development, _, _ = prepare(task, freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=2))
    assert dict(development.schema.categorical)["colour"] == ("<missing>", "blue", "red")
    assert development.features.codes.min() == 0


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pd.date_range("2026-01-01", periods=100), "holds dates or durations"),
        (pd.to_timedelta(range(100), unit="D"), "holds dates or durations"),
        ([np.inf, *range(99)], "infinite values"),
    ],
)
def test_unusable_columns_are_one_clear_line(column: object, message: str) -> None:
    task = own(x=column, label=[0, 1] * 50)
    with pytest.raises(DataError, match=message):
        prepare(task, freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=2))


def test_a_table_without_a_usable_column_is_said() -> None:
    task = own(x=[1] * 100, label=[0, 1] * 50)
    with pytest.raises(DataError, match="no usable feature column"):
        prepare(task, freeze(task, seed=0, split=(0.7, 0.15, 0.15), folds=2))
