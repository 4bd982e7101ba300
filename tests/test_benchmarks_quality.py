import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import boosters, outside, quality, quality_table, rivals
from benchmarks.rivals import Fold, Outcome, Settings
from tune_steel.budget import Budget
from tune_steel.errors import OptionError
from tune_steel.options import Options
from tune_steel.problem import Problem
from tune_steel.scores import score
from tune_steel.tasks import STEEL_TASKS

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(trials=2, max_epochs=2, inner_folds=2, seed=3, threads=2)
KEY = ["task", "repeat", "fold", "method"]


def wine_fold(**changed: Any) -> Fold:
    table, task = quality.load("wine", "auto")
    train, test = quality.outer_folds(task, 4, 0, 3)[1]
    return Fold(table, task, train, test, 5, Settings(**{**vars(SETTINGS), **changed}))


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = pd.read_parquet(folder / "quality.parquet")
    return rows, pd.read_parquet(folder / "quality-predictions.parquet")


def run(folder: Path, **changed: Any) -> None:
    given = {
        "tasks": "breast_cancer,wine",
        "methods": "guess",
        "folds": "",
        "repeats": 1,
        "trials": 2,
        "max_epochs": 2,
        "outer": 2,
        "inner": 2,
        "threads": 2,
        "seed": 3,
        "rivals_python": None,
        "space": None,
        "source": "auto",
        "output": folder,
        "redo": False,
        "table": False,
    }
    quality.main(**{**given, **changed})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """`guess`, a method that knows only the class frequencies, and a note of what it was given."""
    made: list[tuple[str, int]] = []

    def guess(fold: Fold) -> Outcome:
        made.append((fold.task.name, int(fold.test[0])))
        share = np.bincount(fold.y, minlength=fold.classes) / len(fold.y)
        return Outcome({"guess": np.tile(share, (len(fold.test), 1))})

    monkeypatch.setattr(quality, "METHODS", {"guess": guess})
    return made


def test_every_row_is_tested_once_a_repeat_and_every_fold_has_the_classes_in_proportion() -> None:
    _, task = quality.load("faults7", "stand-in")
    repeats = [quality.outer_folds(task, 10, repeat, 0) for repeat in (0, 1)]
    for folds in repeats:
        tested = np.concatenate([test for _, test in folds])
        assert sorted(tested) == list(range(len(task.y)))
        for train, test in folds:
            assert not set(train) & set(test)
            counts = np.bincount(task.y[test], minlength=7)
            assert (np.abs(counts - np.bincount(task.y) / 10) < 1.5).all()
    assert not np.array_equal(repeats[0][0][1], repeats[1][0][1])


def test_a_killed_benchmark_goes_on_with_what_is_missing(
    calls: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess = quality.METHODS["guess"]

    def killed(fold: Fold) -> Outcome:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return guess(fold)

    monkeypatch.setitem(quality.METHODS, "guess", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    rows, _ = read(tmp_path)
    # All tasks on the first outer fold come before the second one.
    assert list(zip(rows["task"], rows["fold"], strict=True)) == [
        ("breast_cancer", 0),
        ("wine", 0),
        ("breast_cancer", 1),
    ]
    monkeypatch.setitem(quality.METHODS, "guess", guess)
    run(tmp_path)
    assert len(calls) == len(set(calls)) == 4
    rows, predictions = read(tmp_path)
    assert len(rows) == 4
    assert not rows.duplicated(KEY).any()
    assert not predictions.duplicated([*KEY, "row"]).any()
    assert predictions.groupby("task").size().to_dict() == {"breast_cancer": 569, "wine": 178}
    run(tmp_path, redo=True, folds="1", tasks="wine")
    assert calls[3:] == [calls[3]] * 2
    assert len(read(tmp_path)[1]) == 569 + 178
    # Other settings are refused before anything is lost, but where they are of all cells.
    with pytest.raises(OptionError, match=r"other settings \(trials 2, here 9\)"):
        run(tmp_path, redo=True, folds="1", trials=9)
    assert len(calls) == 5
    assert len(read(tmp_path)[0]) == 4
    run(tmp_path, redo=True, trials=9)
    assert read(tmp_path)[0]["trials"].tolist() == [9] * 4


def test_the_scores_are_those_of_the_predictions(
    calls: list[tuple[str, int]], tmp_path: Path
) -> None:
    run(tmp_path)
    rows, predictions = read(tmp_path)
    for (task, fold), part in predictions.groupby(["task", "fold"]):
        p = part.filter(regex=r"^p\d").dropna(axis=1).to_numpy()
        (row,) = rows[(rows["task"] == task) & (rows["fold"] == fold)].to_dict("records")
        assert row["test_rows"] == len(part)
        found = score(p, part["y"].to_numpy(), np.ones(p.shape[1]))
        for name in ("accuracy", "macro_f1", "log_loss", "auroc"):
            assert row[name] == pytest.approx(found[name])


def test_what_fails_is_said_kept_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(fold: Fold) -> Outcome:
        return Outcome({"guess": np.full((len(fold.test), fold.classes), np.nan)})

    monkeypatch.setattr(quality, "METHODS", {"guess": broken, "TabM": outside.METHODS["TabM"]})
    given: dict[str, Any] = {"tasks": "wine", "folds": "0", "methods": "guess,TabM"}
    for _ in range(2):
        run(tmp_path, **given)
        printed = capsys.readouterr().out
        assert "guess: NOT measured: ValueError: guess gave no probabilities" in printed
        assert "TabM: NOT measured: it needs --rivals-python" in printed
    rows = pd.read_parquet(tmp_path / "quality.parquet")
    assert rows["error"].notna().tolist() == [True, True]
    text = quality_table.render(rows)
    assert "- TabM was not measured (repeat/fold 0/0): it needs --rivals-python" in text


def test_cells_of_other_settings_and_unknown_names_are_refused(
    calls: list[tuple[str, int]], tmp_path: Path
) -> None:
    run(tmp_path, folds="0")
    with pytest.raises(OptionError, match=r"other settings \(trials 2, here 9\)"):
        run(tmp_path, trials=9)
    with pytest.raises(OptionError, match="--tasks iris: iris is unknown; allowed"):
        run(tmp_path, tasks="iris")
    assert len(calls) == 2
    with pytest.raises(OptionError, match="--space: the published table is of the tasks' own"):
        run(quality.PUBLISHED, space=tmp_path / "other.toml")
    assert len(calls) == 2


OURS = [0.90, 0.92, 0.88, 0.91, 0.89], [0.20, 0.21, 0.19, 0.20, 0.20]
THEIRS = [0.90, 0.91, 0.90, 0.90, 0.89], [0.40, 0.43, 0.40, 0.40, 0.42]


def rows_of(method: str, accuracy: list[float], log_loss: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "task": "wine",
            "repeat": 0,
            "fold": i,
            "cell": method,
            "method": method,
            "data_source": "file",
            "outer_folds": 10,
            "trials": 5,
            "inner_folds": 3,
            "threads": 2,
            "seed": 0,
            "train_rows": 90,
            "test_rows": 10,
            "seconds": 1.0,
            **dict.fromkeys(("macro_accuracy", "macro_f1", "macro_precision", "auroc"), 0.5),
            "accuracy": a,
            "log_loss": loss,
            "error": None,
        }
        for i, (a, loss) in enumerate(zip(accuracy, log_loss, strict=True))
    ]


def test_the_table_names_open_differences_and_compares_on_common_folds() -> None:
    rows = pd.DataFrame(
        [
            *rows_of("tuned", *OURS),
            *rows_of("LightGBM tuned", *THEIRS),
            *rows_of("XGBoost tuned", [0.90, 0.91], [0.10, 0.10]),
        ]
    )
    text = quality_table.render(rows)
    minus = "minus those of LightGBM tuned, the tuned booster with the lowest log-loss"
    assert minus in text
    lines = {line.split(" | ")[0]: line for line in text.partition(minus)[2].splitlines()}
    # By hand: mean -.21, sd .01, t(4) 2.7764, sqrt(1/5 + 1/9) = .5578.
    assert lines["| tuned"].startswith("| tuned | 5 | +0.000 [")
    assert "open |" in lines["| tuned"]
    assert lines["| tuned"].endswith("| -0.210 [-0.225, -0.195] better |")
    # Of two folds there is a mean, and nothing that it would prove.
    assert lines["| XGBoost tuned"] == "| XGBoost tuned | 2 | -0.005 | +0.000 | -0.105 |"


def test_a_booster_on_fewer_folds_is_not_the_one_with_the_lowest_log_loss() -> None:
    rows = [
        *rows_of("LightGBM tuned", [0.9] * 6, [0.4] * 6),
        *rows_of("XGBoost tuned", [0.9] * 6, [0.3] * 6),
        *rows_of("CatBoost tuned", [0.9] * 5, [0.1] * 5),
    ]
    text = quality_table.render(pd.DataFrame(rows))
    assert "minus those of XGBoost tuned, " in text
    assert "minus those of CatBoost tuned" not in text


def test_the_short_table_has_the_means_and_the_ensemble_beside_each_tuned_booster() -> None:
    text = quality_table.brief(
        pd.DataFrame(
            [
                *rows_of("ensemble", *OURS),
                *rows_of("LightGBM tuned", *THEIRS),
                *rows_of("XGBoost tuned", [0.90], [0.10]),
            ]
        ).assign(task="binary")
    )
    lines = text.splitlines()
    assert lines[4:6] == [
        "| **tune_steel: ensemble** | 0.900 / 0.500 / 0.200, 1 s |",
        "| LightGBM tuned | 0.900 / 0.500 / 0.410, 1 s |",
    ]
    # The mean of one fold stands beside the ensemble's on that fold, not on all.
    assert lines[11] == (
        "| binary | XGBoost tuned | 1 | 0.900 / 0.500 / 0.100 | 0.900 / 0.500 / 0.200 |"
    )
    lines = lines[12:]
    against = [line for line in lines if line.startswith("| binary | ")]
    assert len(against) == 1
    assert against[0].startswith("| binary | as shipped | LightGBM tuned | 5 | +0.000 [")
    assert against[0].endswith("| -0.210 [-0.225, -0.195] better |")


def test_means_are_those_of_a_repeat_and_differences_those_of_all_repeats() -> None:
    rows = pd.DataFrame(
        [
            *rows_of("ensemble", *OURS),
            *rows_of("LightGBM tuned", *THEIRS),
            *({**row, "repeat": 1} for row in rows_of("ensemble", [0.8] * 5, [0.3] * 5)),
            *({**row, "repeat": 1} for row in rows_of("LightGBM tuned", [0.6] * 5, [0.3] * 5)),
        ]
    ).assign(task="binary")
    short = quality_table.brief(rows).splitlines()
    again = next(i for i, line in enumerate(short) if line.startswith("The same with the rows"))
    assert "| **tune_steel: ensemble** | 0.900 / 0.500 / 0.200, 1 s |" in short[:again]
    assert "| **tune_steel: ensemble** | 0.800 / 0.500 / 0.300, 1 s |" in short[again:]
    whole = quality_table.render(rows)
    assert "**binary**: means over 5 of " in whole
    assert "**binary, repeat 1**: means over 5 of " in whole
    # Half of the ten differences in accuracy are 0, half are .2.
    assert whole.count("| ensemble | 10 | +0.100 [") == 1
    assert sum("| LightGBM tuned | 10 | +0.100 [" in line for line in short) == 1


def test_readme_and_docs_show_what_is_published() -> None:
    rows = pd.read_parquet(quality.PUBLISHED / "quality.parquet")
    for path, text in (
        (quality_table.README, quality_table.brief(rows)),
        (quality_table.DOCUMENT, quality_table.render(rows)),
    ):
        rest = path.read_text().split(quality_table.BEGIN)[1]
        assert rest.split(quality_table.END)[0].strip() == text.strip(), path.name
    ours = rows[rows["cell"].isin(["tune_steel", "without try", "random search"])]
    steel = ours[ours["task"].isin(STEEL_TASKS)]
    assert set(steel["data_source"]) == {"file"}
    assert not steel["git_commit"].str.endswith("+changes").any()


def test_the_product_s_problem_is_the_outer_fold(space_file: Path) -> None:
    fold = wine_fold()
    space_file.write_text(space_file.read_text().replace("pos_weight", "class_weight_power"))
    chosen = {"folds": 2, "task": None, "space": space_file, "threshold": "none"}
    options: Any = type("O", (), chosen)
    problem = rivals.problem_of(fold, options)
    assert problem.sealed.rows.tolist() == fold.test.tolist()
    assert problem.development.rows.tolist() == fold.train.tolist()


@pytest.mark.parametrize("method", ["tune_steel", "without try", "random search"])
def test_the_product_tries_its_placed_config_first_only_where_it_runs_as_it_is_shipped(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenError(Exception):
        pass

    def look(options: Options, problem: Problem, *_: Any) -> int:
        assert bool(problem.space.tries) == (method == "tune_steel")
        assert (options.search, options.scheduler, options.budget) == (
            ("random", "none", Budget(100_000, epochs=7))
            if method == "random search"
            else ("tpe", "asha", Budget(SETTINGS.trials))
        )
        raise SeenError

    monkeypatch.setattr(rivals, "run_problem", look)
    table, task = quality.load("binary", "stand-in")
    train, test = quality.outer_folds(task, 4, 0, 3)[1]
    fold = Fold(table, task, train, test, 5, SETTINGS, {"epochs": 7})
    with pytest.raises(SeenError):
        quality.METHODS[method](fold)


def test_what_runs_in_another_environment_gets_the_rows_and_gives_every_class_its_column(
    tmp_path: Path,
) -> None:
    """Its interpreter is a script here, which answers as such a library would."""
    answer = tmp_path / "answer.py"
    answer.write_text(
        "import json, sys, pandas as pd\n"
        "_, script, name, train, test, out, options = sys.argv\n"
        "train, test = pd.read_parquet(train), pd.read_parquet(test)\n"
        "assert name == 'TabM' and json.loads(options)['threads'] == 2\n"
        "assert 'y' in train and 'y' not in test\n"
        "pd.DataFrame({'p2': test['f0'], 'p0': test['f0'] * 3}).to_parquet(out)\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {answer} "$@"\n')
    python.chmod(0o755)
    fold = wine_fold(python=python)
    (p,) = outside.METHODS["TabM"](fold).probabilities.values()
    assert p == pytest.approx(np.tile([0.75, 0.0, 0.25], (len(fold.test), 1)))


@pytest.mark.ray
def test_the_product_runs_whole_on_an_outer_fold(space_file: Path, tmp_path: Path) -> None:
    """As a process of its own: Ray reads its settings once, when it is first imported."""
    space_file.write_text(space_file.read_text().replace("pos_weight", "class_weight_power"))
    fold = wine_fold()
    settings = {"outer": 4, "folds": 1, "inner": 2, "trials": 2, "max-epochs": 2, "seed": 3}
    places = {"space": space_file, "output": tmp_path, "tasks": "wine", "methods": "tune_steel"}
    options = [f"--{name}={value}" for name, value in {**settings, **places}.items()]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", *options],
        cwd=Path(__file__).parents[1],
        check=True,
        timeout=300,
    )
    rows, predictions = read(tmp_path)
    assert {"ensemble", "bagged", "tuned", "default", "boosting"} <= set(rows["method"])
    assert rows["epochs"].between(3, 4).all()
    boosting = predictions[predictions["method"] == "boosting"].set_index("row")
    assert sorted(boosting.index) == sorted(fold.test)
    p = boosting[["p0", "p1", "p2"]].to_numpy()
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-5)
    # Columns and rows are in the task's order: even so little training beats the guess.
    assert (p.argmax(axis=1) == fold.task.y[boosting.index]).mean() > 0.8


@pytest.mark.parametrize(
    "method",
    [
        rivals.METHODS["logistic regression"],
        rivals.METHODS["extra trees"],
        *(
            pytest.param(
                boosters.METHODS[f"{booster.title} tuned"],
                marks=pytest.mark.skipif(
                    importlib.util.find_spec(booster.package) is None,
                    reason=f"{booster.package} is not installed",
                ),
            )
            for booster in boosters.BOOSTERS
        ),
    ],
)
def test_a_rival_learns(method: rivals.Method) -> None:
    fold = wine_fold()
    (p,) = method(fold).probabilities.values()
    assert (p.argmax(axis=1) == fold.task.y[fold.test]).mean() > 0.85


def test_the_reference_has_a_loss_for_each_task() -> None:
    import torch

    scores, y = torch.tensor([[0.0], [0.0]]), torch.tensor([0, 1])
    loss = rivals._reference_loss("binary", y, 2)
    assert float(loss(scores, y)) == pytest.approx(1.5 * np.log(2))
    six = rivals._reference_loss("multiclass", y, 6)
    y = torch.tensor([0, 2])
    scores = torch.zeros(2, 6)
    scores[1, 2] = 1.0
    each = [np.log(6), np.log(5 + np.e) - 1]
    assert float(six(scores, y)) == pytest.approx((4 * each[0] + 2 * each[1]) / 6)
