"""The search for a config to begin with, on small tables."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import starts
from tune_steel.data import Table
from tune_steel.space import load_space, spaces_folder
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tasks import own_task


def development(classes: int) -> Development:
    rng = np.random.default_rng(0)
    counts = [20 * (c + 1) for c in range(classes)]
    y = np.repeat(np.arange(classes), counts)
    frame = pd.DataFrame({"x": rng.normal(size=len(y)) + y, "y": [f"c{c}" for c in y]})
    task = own_task(Table("own", frame, "file", "hash"), "y")
    return prepare(task, freeze(task, seed=0, split=task.split, folds=2))[0]


def test_candidates_are_drawn_and_every_other_one_is_near_the_published() -> None:
    found = starts.candidates(40, 0)
    assert found == starts.candidates(40, 0)
    assert found != starts.candidates(40, 1)
    published = starts.NAMED["published"]

    def shared(name: str) -> float:
        return float(np.mean([found[name].get(key) == value for key, value in published.items()]))

    near = [shared(name) for name in found if name.startswith("near")]
    far = [shared(name) for name in found if name.isdigit()]
    assert len(near) == len(far) == 20
    assert 0.3 < np.mean(far) + 0.15 < np.mean(near) < 0.8
    assert shared("published") == 1
    for name, given in starts.NAMED.items():
        assert {key: found[name][key] for key in given} == given
    assert {start["model.family"] for start in found.values()} == {"nca"}


@pytest.mark.parametrize("classes", [2, 3])
def test_the_power_of_the_class_weights_means_the_same_for_two_classes_and_more(
    classes: int,
) -> None:
    rows = development(classes)
    start = starts.candidates(1, 0)["steel"]
    loss = starts.config_of(start, rows).loss
    assert loss.label_smoothing == 0.05
    ratio = rows.reference_weights[1] / rows.reference_weights[0]
    if classes == 2:
        assert loss.pos_weight == pytest.approx(ratio**0.8)
    else:
        assert loss.class_weight_power == 0.8
        assert loss.pos_weight is None


def rows_of(losses: dict[str, tuple[float, ...]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"config": name, "table": table, "val_loss": loss}
            for name, of_name in losses.items()
            for table, loss in zip("stu", of_name, strict=True)
        ]
    )


def test_regret_is_in_units_of_the_median_and_no_table_counts_for_more() -> None:
    first = rows_of({"a": (1, 3, 1), "b": (2, 2, 3), "c": (9, 9, 2)})
    found = starts.regret(first, first)
    assert found.loc["a"].tolist() == [0, 1, 0]
    assert found.loc["b"].tolist() == [1, 0, 1]
    assert found.loc["c"].tolist() == [1, 1, 1]
    again = starts.regret(rows_of({"a": (0.5, 2.5, 1.5)}), first)
    assert again.loc["a"].tolist() == [0, 0.5, 0.5]


def test_a_portfolio_is_of_configs_that_make_up_for_each_other() -> None:
    regrets = pd.DataFrame(
        {"s": [0.1, 0.0, 0.9, 0.2], "t": [0.1, 0.25, 0.9, 0.2], "u": [1.0, 0.8, 0.0, 1.0]},
        index=["a", "b", "c", "d"],
    )
    # c has the highest mean, but is the only one that is good on u.
    assert starts.portfolio(regrets, 3) == ["b", "c", "a"]
    # Without s they are c and a, without t b and c, without u a and b.
    assert sorted(starts.unseen(regrets, 2)) == pytest.approx([0.1, 0.25, 0.8])
    pairs = [regrets.loc[[a, b]].min().mean() for a, b in combinations(regrets.index, 2)]
    assert starts.of_random(regrets, 2).mean() == pytest.approx(np.mean(pairs))
    assert starts.of_random(regrets, 1) == pytest.approx(regrets.mean().to_numpy())


def test_neither_a_wide_config_nor_the_steel_tables_own_may_be_placed() -> None:
    rows = rows_of({"wide": (1, 1, 1), "a": (2, 2, 3), "b": (3, 3, 2), "steel": (1, 1, 1)})
    widths = rows["config"].map({"wide": starts.MOST_WIDTH + 1}).fillna(starts.MOST_WIDTH)
    rows["params"] = [json.dumps({"model.width": width}) for width in widths]
    rows["round"] = [1] * 12
    assert list(starts.of_candidates(rows).index) == ["a", "b"]
    assert starts.of_candidates(rows).loc["a", "s"] == 1, "the scale is that of all configs"


def test_both_rounds_run_on_tables_of_r_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyreadr = pytest.importorskip("pyreadr")
    rng = np.random.default_rng(0)
    for name in ("Vehicle", "spam"):
        package, target = starts.TABLES[name]
        y = rng.integers(0, 2 + (name == "Vehicle"), 120)
        frame = pd.DataFrame({"x": rng.normal(size=120) + y, target: [f"c{c}" for c in y]})
        path = tmp_path / package / "data" / f"{name}.rda"
        path.parent.mkdir(parents=True)
        pyreadr.write_rdata(str(path), frame, df_name=name)
    output = tmp_path / "starts.parquet"
    arguments: dict[str, Any] = {"count": 3, "size": 1, "folds": 2, "epochs": 2, "workers": 1}
    arguments |= {"tables": "Vehicle,spam", "library": tmp_path, "seed": 0, "output": output}
    starts.measure(**arguments)
    rows = pd.read_parquet(output)
    assert (rows["round"] == 1).sum() == 2 * 5
    first, again = (rows[rows["round"] == number] for number in (1, 2))
    (chosen,) = starts.portfolio(starts.of_candidates(rows), 1)
    assert "steel" not in starts.of_candidates(rows).index
    assert set(again["config"]) == {chosen, "published", "steel"}
    both = first.merge(again, on=["table", "config"])
    assert (both["val_loss_x"] != both["val_loss_y"]).all(), "the same folds and seeds again"
    assert (both["params_x"] == both["params_y"]).all()
    assert f"| {chosen} | " in capsys.readouterr().out
    left = rows[(rows["config"] != "near 1") | (rows["round"] == 2)]
    left.to_parquet(output, index=False)  # as if killed
    starts.measure(**arguments)
    anew = pd.read_parquet(output).sort_values(["round", "table", "config"], ignore_index=True)
    same = rows.sort_values(["round", "table", "config"], ignore_index=True)
    pd.testing.assert_frame_equal(anew.drop(columns="seconds"), same.drop(columns="seconds"))
    assert set(anew["seconds"]) - set(same["seconds"]), "nothing was trained again"
    assert len(set(anew["seconds"]) & set(same["seconds"])) >= 2 * 4


@pytest.mark.parametrize("name", ["binary", "multiclass", "faults7"])
def test_the_shipped_spaces_place_the_published_portfolio(name: str) -> None:
    rows = pd.read_parquet(starts.PUBLISHED)
    assert starts.render(rows) in starts.PAGE.read_text(encoding="utf-8")
    first = rows[rows["round"] == 1]
    tries = load_space(spaces_folder() / f"{name}.toml").tries
    for config, given in zip(
        starts.portfolio(starts.of_candidates(rows), starts.SIZE), tries, strict=True
    ):
        params = json.loads(first.loc[first["config"] == config, "params"].iloc[0])
        power = params.pop("power")
        if name != "binary":
            assert given["loss.class_weight_power"] == pytest.approx(power, abs=0.005)
        assert set(params) == {key for key in given if not key.startswith("loss.")} | {
            "loss.label_smoothing"
        }
        for key, value in params.items():
            if key == "loss.label_smoothing":
                assert given[key] == pytest.approx(value, abs=0.005)
            elif isinstance(value, float):
                assert given[key] == pytest.approx(value, rel=0.05)
            else:
                assert given[key] == value
