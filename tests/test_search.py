"""The main job as a user runs it: the real command line, real Ray, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import ray
from conftest import SMALL_SPACE, Command
from optuna.trial import TrialState
from searches import SMALL, check_plain, only_run, processes_of, read

from tune_steel.predict import load_model
from tune_steel.study import open_study

pytestmark = pytest.mark.ray
ONE = ("--concurrency", 1)
"""Where two trials at once would tell nothing more: a second worker takes seconds to start."""


def test_an_own_table_with_strings_categories_and_gaps_works_from_another_directory(
    command: Command, own_csv: Path, space_file: Path, tmp_path: Path
) -> None:
    given = ("--data", own_csv, "--target", "verdict", "--space", space_file)
    done = command(*given, *SMALL, *ONE, "--threshold", "f1")
    assert done.returncode == 0, done.stderr
    assert "column site is constant and was dropped" in done.stderr
    run = only_run(tmp_path / "elsewhere")
    record = json.loads((run / "run.json").read_text())
    assert record["classes"] == ["bad", "good"]
    assert record["features"] == {
        "numeric": ["size", "weight"],
        "flagged": [1],
        "categorical": ["shade"],
    }
    scores = read(run, "scores").set_index(["model", "split", "score"])["value"]
    assert scores["tuned", "test", "auroc"] > 0.7  # size and shade tell most of it
    frame = pd.read_csv(own_csv)
    model = load_model(run / "model")
    p = model.predict_proba(frame)
    assert p.shape == (300, 2)
    threshold = record["ensemble"]["threshold"]
    assert model.predict(frame).tolist() == np.where(p[:, 1] > threshold, "good", "bad").tolist()
    confusion = np.array(record["test"]["confusion"])
    assert scores["ensemble", "test", "accuracy"] == np.trace(confusion) / confusion.sum()

    moved = own_csv.rename(own_csv.with_name("plates_v2.csv"))
    done = command("--resume", run, "--data", moved, "--samples", 9)
    assert done.returncode == 0, done.stderr
    trials = read(run, "trials")
    assert len(trials) == 9
    assert set(trials["task"]) == set(read(run, "scores")["task"]) == {"plates"}
    assert "column site is constant and was dropped" in (run / "report.txt").read_text()


def test_scrambled_test_rows_change_no_bit_of_the_search(
    command: Command, own_csv: Path, space_file: Path, tmp_path: Path
) -> None:
    def curves(table: Path, name: str) -> tuple[pd.DataFrame, list[int]]:
        done = command(
            *("--data", table, "--target", "verdict", "--space", space_file, *SMALL),
            *(*ONE, "--output", tmp_path / name),
        )
        assert done.returncode == 0, done.stderr
        (run,) = (tmp_path / name).iterdir()
        record = json.loads((run / "run.json").read_text())
        epochs = read(run, "epochs").drop(columns=["run", "task", "seconds"])
        return epochs, record["splits"]["test_rows"]

    before, test_rows = curves(own_csv, "a")
    frame = pd.read_csv(own_csv)
    frame.loc[test_rows, "size"] = 1e6
    frame.loc[test_rows, "weight"] = np.nan
    frame.loc[test_rows, "shade"] = "violet"
    frame.to_csv(tmp_path / "scrambled.csv", index=False)
    after, same_rows = curves(tmp_path / "scrambled.csv", "b")
    assert same_rows == test_rows
    pd.testing.assert_frame_equal(before, after, check_exact=True)


def test_a_reader_of_the_output_that_goes_away_costs_no_result(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    small = ["--samples", "2", "--max-epochs", "2", "--folds", "2", "--concurrency", "1"]
    search = [sys.executable, "-m", "tune_steel.search", "--task", "binary", *small]
    search += ["--source", "stand-in", "--space", str(space_file)]
    script = 'set -o pipefail; "$@" 2>&1 | true'
    done = subprocess.run(["bash", "-c", script, "bash", *search], cwd=tmp_path, check=False)
    assert done.returncode == 0
    run = only_run(tmp_path)
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert len(read(run, "scores")) > 0
    assert "Test scores" in (run / "report.txt").read_text()


def test_a_column_with_one_known_value_and_odd_class_names_cost_no_result(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=120)
    rare = np.full(120, np.nan)
    rare[7] = 1.0
    verdict = np.where(x > 0, "[/b]", "[red]x")
    pd.DataFrame({"x": x, "rare": rare, "y": verdict}).to_csv(tmp_path / "odd.csv")
    given = ("--data", tmp_path / "odd.csv", "--target", "y", "--space", space_file)
    done = command(*given, *SMALL, *ONE)
    assert done.returncode == 0, done.stderr
    assert "[red]x" in done.stdout
    run = only_run(tmp_path / "elsewhere")
    record = json.loads((run / "run.json").read_text())
    assert set(record["features"]["numeric"]) <= {"x", "rare"}  # no row numbers
    assert "boosting" in set(read(run, "scores")["model"])


def test_trials_that_raise_are_recorded_and_the_search_goes_on(
    command: Command, tmp_path: Path
) -> None:
    space = tmp_path / "s.toml"
    # A weight near the largest float makes the loss infinite.
    weight = "pos_weight = { choices = [1.0, 3e38], default = 1.0 }"
    space.write_text(
        SMALL_SPACE.replace(
            "pos_weight = { float = [0.5, 4.0], log = true, default = 1.0 }", weight
        )
    )
    done = command("--task", "binary", "--source", "stand-in", "--space", space, *SMALL, *ONE)
    assert done.returncode == 0, done.stderr
    check_plain(done.stderr)
    run = only_run(tmp_path / "elsewhere")
    trials = read(run, "trials")
    failed = trials[trials["loss.pos_weight"] > 1]
    assert 0 < len(failed) < 8
    assert (failed["state"] == "FAIL").all()
    assert failed["error"].str.startswith("NonFiniteLossError: the training loss of epoch 1").all()
    assert set(trials.loc[trials["loss.pos_weight"] == 1, "state"]) <= {"COMPLETE", "PRUNED"}
    study = open_study(run / "study.journal", run.name)
    states = [t.state for t in study.trials]
    assert states.count(TrialState.FAIL) == len(failed)
    assert TrialState.RUNNING not in states


def test_when_every_trial_fails_it_says_why_and_exits_with_1(
    command: Command, tmp_path: Path
) -> None:
    space = tmp_path / "s.toml"
    space.write_text(
        SMALL_SPACE.replace(
            "pos_weight = { float = [0.5, 4.0], log = true, default = 1.0 }", "pos_weight = 3e38"
        )
    )
    arguments = ("--samples", 3, "--max-epochs", 3, "--folds", 1, *ONE)
    done = command("--task", "binary", "--source", "stand-in", "--space", space, *arguments)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "every trial failed (3); the first one with NonFiniteLossError" in last
    check_plain(done.stderr)
    assert read(only_run(tmp_path / "elsewhere"), "trials")["state"].tolist() == ["FAIL"] * 3


def test_ctrl_c_writes_and_scores_what_is_finished_and_says_so(
    space_file: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tune_steel.search", "--task", "binary"),
            *("--source", "stand-in", "--space", str(space_file), "--samples", "100000"),
            *("--max-epochs", "6", "--folds", "2"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(_ended(tmp_path)) < 5:
            time.sleep(0.5)
        _check_processes(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the job
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    run = only_run(tmp_path)
    trials = read(run, "trials")
    assert (trials["state"].isin(["COMPLETE", "PRUNED"])).sum() >= 5
    assert set(trials["state"]) <= {"COMPLETE", "PRUNED", "INTERRUPTED"}
    assert "Test scores on 97 rows" in out
    assert "cut short" in err
    check_plain(err)
    assert json.loads((run / "run.json").read_text())["state"] == "cut short"
    assert len(read(run, "scores")) > 0
    study = open_study(run / "study.journal", run.name)
    assert TrialState.RUNNING not in [t.state for t in study.trials]


def _check_processes(pid: int) -> None:
    """A private Ray is what workers need, and no process more."""
    package = Path(ray.__file__).parent
    lines = processes_of(pid).values()
    assert any("gcs_server" in line for line in lines)
    for part in (
        "autoscaler/_private/monitor.py",
        "_private/log_monitor.py",
        "dashboard/dashboard.py",
    ):
        helper = package / part
        assert helper.exists()
        assert not [line for line in lines if str(helper) in line]


def _ended(folder: Path) -> list[optuna.trial.FrozenTrial]:
    journals = list(folder.glob("results/*/study.journal"))
    if not journals:
        return []
    study = open_study(journals[0], journals[0].parent.name)
    return [t for t in study.trials if t.state.is_finished()]


@pytest.mark.real_data
@pytest.mark.parametrize("task", ["binary", "multiclass", "faults7"])
def test_the_three_tasks_run_on_the_real_table(
    command: Command, tmp_path: Path, task: str
) -> None:
    # The default, and the first config that the task's space tries.
    small = ("--samples", 2, "--max-epochs", 2, "--folds", 2, *ONE)
    done = command("--task", task, *small)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "elsewhere")
    assert set(read(run, "trials")["data_source"]) == {"file"}
    assert "STAND-IN" not in done.stderr
    classes = len(json.loads((run / "run.json").read_text())["classes"])
    p = read(run, "predictions")[[f"p{i}" for i in range(classes)]]
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-9)
