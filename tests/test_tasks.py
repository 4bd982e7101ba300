import numpy as np
import pandas as pd
import pytest

from tune_steel.data import FAULT_NAMES, FLAGS, Table, load_steel
from tune_steel.errors import DataError, OptionError
from tune_steel.tasks import STEEL_TASKS, own_task, steel_task


@pytest.fixture(scope="module")
def steel() -> Table:
    return load_steel(source="stand-in")


def table(**columns: object) -> Table:
    return Table("mine", pd.DataFrame(columns), "file", "hash")


def test_binary_has_all_rows_and_other_faults_as_the_positive_class(steel: Table) -> None:
    task = steel_task(steel, "binary")
    assert task.classes == ("named_fault", "Other_Faults")
    assert np.bincount(task.y).tolist() == [1268, 673]
    assert ((task.y == 1) == (steel.frame["Class"] == 2)).all()
    assert task.split == (0.90, 0.05, 0.05)


def test_multiclass_has_the_rows_with_a_named_fault_and_remembers_where_they_stood(
    steel: Table,
) -> None:
    task = steel_task(steel, "multiclass")
    assert task.classes == FAULT_NAMES
    assert np.bincount(task.y).tolist() == [158, 190, 391, 72, 55, 402]
    flags = steel.frame.loc[task.rows, list(FLAGS)].to_numpy()
    assert (flags[np.arange(len(task.y)), task.y] == 1).all()
    assert (steel.frame["V5"].to_numpy()[task.rows] == task.frame["V5"]).all()


def test_faults7_has_other_faults_as_its_seventh_class(steel: Table) -> None:
    task = steel_task(steel, "faults7")
    assert task.classes == (*FAULT_NAMES, "Other_Faults")
    assert np.bincount(task.y).tolist() == [158, 190, 391, 72, 55, 402, 673]


@pytest.mark.parametrize("name", STEEL_TASKS)
def test_no_task_has_a_fault_flag_or_the_class_among_its_features(steel: Table, name: str) -> None:
    task = steel_task(steel, name)
    assert task.features == tuple(f"V{i}" for i in range(1, 28))
    assert list(task.frame.columns) == list(task.features)


@pytest.mark.parametrize("name", STEEL_TASKS)
def test_no_feature_holds_the_values_of_a_fault_flag(steel: Table, name: str) -> None:
    task = steel_task(steel, name)
    for flag in FLAGS:
        values = steel.frame[flag].to_numpy()[task.rows]
        for column in task.features:
            assert (task.frame[column].to_numpy() != values).any(), (column, flag)


@pytest.mark.real_data
@pytest.mark.parametrize("name", STEEL_TASKS)
def test_the_real_table_makes_the_three_tasks(name: str) -> None:
    task = steel_task(load_steel(), name)
    expected = {"binary": (1941, 2), "multiclass": (1268, 6), "faults7": (1941, 7)}
    assert (len(task.y), len(task.classes)) == expected[name]
    assert not set(task.features) & {*FLAGS, "Class"}


def test_an_unknown_steel_task_names_the_known_ones(steel: Table) -> None:
    with pytest.raises(OptionError, match="allowed: binary, multiclass, faults7"):
        steel_task(steel, "ternary")


@pytest.mark.parametrize(
    ("labels", "classes", "y"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        ([2.0, 1.0, 2.0], ("1", "2"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([3, 1, 2], ("1", "2", "3"), [2, 0, 1]),
        ([1, "a", 1], ("1", "a"), [0, 1, 0]),
        (pd.Categorical(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
    ],
)
def test_labels_of_any_kind_become_sorted_classes(
    labels: object, classes: tuple[str, ...], y: list[int]
) -> None:
    task = own_task(table(x=[1, 2, 3], label=labels), "label")
    assert task.classes == classes
    assert task.y.tolist() == y
    assert task.features == ("x",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1], "only one class"),
        ([1.5, 2.0, 2.0], "fractional numbers"),
        (["a", None, "b"], "1 rows have no label; .*words like NA, None and null in a CSV"),
        ([f"c{i}" for i in range(101)], "101 different values"),
    ],
)
def test_an_unusable_target_is_one_clear_line(labels: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        own_task(table(x=range(len(labels)), label=labels), "label")


def test_a_target_that_is_not_there_lists_the_columns() -> None:
    with pytest.raises(DataError, match="no such column in mine; its columns: x, label"):
        own_task(table(x=[1, 2], label=[0, 1]), "lable")


def test_the_steel_table_is_not_a_table_of_ones_own_while_its_flags_are_in_it(
    steel: Table,
) -> None:
    with pytest.raises(DataError, match=r"V28\.\.V33 are the label; use --task"):
        own_task(steel, "Class")
    without = Table("mine", steel.frame.drop(columns=list(FLAGS)), "file", "hash")
    assert own_task(without, "Class").features == tuple(f"V{i}" for i in range(1, 28))
    # Ionosphere's columns are V1..V34 and Class too.
    other = steel.frame.assign(**dict.fromkeys(FLAGS, steel.frame["V1"]))
    assert len(own_task(Table("other", other, "file", "hash"), "Class").features) == 33


def test_a_table_that_names_its_own_target_needs_no_option() -> None:
    frame = pd.DataFrame({"x": [1, 2], "label": [0, 1]})
    assert own_task(Table("t", frame, "openml", "hash", target="label"), None).features == ("x",)
    with pytest.raises(OptionError, match="add --target"):
        own_task(Table("t", frame, "file", "hash"), None)
