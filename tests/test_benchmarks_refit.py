import numpy as np
import pandas as pd
import pytest

from benchmarks import refit
from tune_steel import splits
from tune_steel.config import TrialConfig
from tune_steel.data import load_steel
from tune_steel.refit import Plan
from tune_steel.tables import write_table
from tune_steel.tasks import steel_task

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(trial: int) -> Plan:
    tree = {
        "model": {"depth": 1, "width_1": 8, "dropout": 0.0},
        "loss": {"pos_weight": 2.0},
        "optimizer": {"lr": 1e-2, "batch_size": 64},
    }
    return Plan(trial, TrialConfig.model_validate(tree), trial, (1e-2,) * 3, 0.5, 1.0)


def test_a_held_fold_is_predicted_by_networks_that_did_not_see_it(monkeypatch, tmp_path) -> None:
    task = steel_task(load_steel(None, "stand-in"), "binary")
    seen = []

    def prepared(task, cut):
        out = splits.prepare(task, cut)
        seen.append(set(out[0].rows.tolist()))
        return out

    monkeypatch.setattr(refit, "prepare", prepared)
    rows = refit.measure(task, 1, [plan(0), plan(1)], 0, 3)
    frozen = splits.freeze(task, seed=0, split=task.split, folds=3)
    train, held = (set(task.rows[part].tolist()) for part in frozen.folds[1])
    assert seen == [train]
    assert not train & (held | set(task.rows[frozen.test].tolist()))
    by_way = {row["networks"]: row for row in rows}
    assert list(by_way) == ["folds", "all", "both"]
    assert {row["rows"] for row in rows} == {len(held)}
    losses = {way: row["log_loss"] for way, row in by_way.items()}
    assert losses["folds"] != losses["all"]
    assert max(losses.values()) < np.log(2)
    # The mean of two predictions loses less than the mean of their losses.
    assert losses["both"] < (losses["folds"] + losses["all"]) / 2 + 1e-3
    names = ("run", "task", "data_source", "git_commit")
    write_table(
        tmp_path / "t.parquet", [dict.fromkeys(names, "x") | row for row in rows], refit.SCHEMA
    )


def test_the_page_shows_what_is_published() -> None:
    rows = pd.read_parquet(refit.PUBLISHED)
    shown = refit.PAGE.read_text().split(refit.BEGIN)[1].split(refit.END)[0].strip()
    assert shown == refit.render(rows)
    mean = rows[(rows["task"] == "binary") & (rows["networks"] == "all")]["log_loss"].mean()
    assert f"| networks on all rows | {mean:.4f} /" in shown
