"""A search that is killed, interrupted or asked for more goes on as if nothing had happened."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMALL_SPACE, Command
from searches import (
    ENDED,
    check_whole,
    curves,
    curves_by_slot,
    finish,
    only_run,
    processes_of,
    read,
    start,
    study_of,
    wait_for,
    wait_for_line,
)

from tune_steel.search import main
from tune_steel.study import run_lock

pytestmark = pytest.mark.ray
KILLS = int(os.environ.get("TUNE_STEEL_KILLS", "3"))
"""Each takes a start of Ray, so only who changes this runs it with 20."""

SAMPLES = max(15, 5 * KILLS)
"""Enough that there is a search to kill; a process ends two to four trials before it is killed."""


def options(folder: Path) -> tuple[object, ...]:
    space = folder / "small.toml"
    # What is tried first is queued in turn, and has to keep its turn.
    tries = "".join(f'[[try]]\n"model.depth" = 2\n"optimizer.lr" = {lr}\n' for lr in (0.05, 0.003))
    space.write_text(SMALL_SPACE + tries)
    return (
        *("--task", "binary", "--source", "stand-in", "--space", space, "--folds", 3),
        *("--samples", SAMPLES, "--max-epochs", 18, "--grace-period", 2, "--concurrency", 1),
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, one trial at a time, so that it can be repeated."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, _, err = finish(start(folder, *options(folder)))
    assert code == 0, err
    return only_run(folder)


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> Path:
    shutil.copytree(unbroken, tmp_path / "results" / unbroken.name)
    return tmp_path / "results" / unbroken.name


def kill(process: subprocess.Popen[str], what: str, run: Path) -> None:
    """SIGKILLs the driver, one of its workers or the raylet; then the driver is gone."""
    ours = {"worker": r"^ray::ImplicitFunc", "raylet": r"^\S*/raylet/raylet "}
    if what in ours:
        for pid, line in processes_of(process.pid).items():
            if re.search(ours[what], line):
                os.kill(pid, signal.SIGKILL)
                break
        time.sleep(0.5)
    if what == "raylet":
        code, _, err = finish(process, 90)
        # On a fast machine the search may have ended before.
        finished = json.loads((run / "run.json").read_text())["state"] == "finished"
        assert code == (0 if finished else 1), err
        # Ray notices it too, and may end the process first, without a word.
        complaints = [line for line in err.splitlines() if "error: " in line]
        assert len(complaints) <= 1, err
        assert all("; go on with --resume " in line for line in complaints), err
    process.kill()
    process.communicate()


def test_a_search_killed_at_random_moments_ends_as_the_one_that_was_not(
    unbroken: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    process = start(tmp_path, *options(tmp_path))
    wait_for((lambda: list(tmp_path.glob("results/*/run.json"))), every=0.001)
    run = only_run(tmp_path)
    for attempt in range(KILLS):
        what = ("driver", "worker", "raylet", "driver")[attempt % 4]
        if what == "driver" and rng.random() < 0.5:  # anywhere, while it starts too
            time.sleep(rng.uniform(0, 12))
        else:  # while it trains
            wait_for_training(tmp_path, process)
            time.sleep(rng.uniform(0, 0.6))
        kill(process, what, run)
        print(f"kill {attempt + 1} ({what}): {curves(tmp_path)} curves in the journal")
        process = start(tmp_path, "--resume", run)
    kill_at_the_tables(process, run)
    print(f"killed at the tables; left: {[p.name for p in run.glob('.*')]}")
    code, _, err = finish(start(tmp_path, "--resume", run))
    assert code == 0, err
    trials = check_whole(run, SAMPLES)
    assert (trials["state"] == "INTERRUPTED").sum() <= KILLS + 1
    pd.testing.assert_frame_equal(curves_by_slot(run), curves_by_slot(unbroken), check_exact=True)
    for name in ("scores", "predictions"):
        pd.testing.assert_frame_equal(
            read(run, name).drop(columns="run"),
            read(unbroken, name).drop(columns="run"),
            check_exact=True,
        )


def wait_for_training(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until another trial has ended, or the whole search."""
    before = curves(folder)
    wait_for(lambda: curves(folder) > before or process.poll() is not None)


def kill_at_the_tables(process: subprocess.Popen[str], run: Path) -> None:
    """Kills a search while it writes a table, if it is caught at that; else after its end."""
    wait_for(lambda: list(run.glob(".*.parquet.*.tmp")) or process.poll() is not None, every=1e-4)
    process.kill()
    process.communicate()


def test_two_trials_at_once_survive_a_kill_too(tmp_path: Path) -> None:
    arguments = [2 if argument == 1 else argument for argument in options(tmp_path)]
    process = start(tmp_path, *arguments)
    wait_for(lambda: curves(tmp_path) >= 3)
    process.kill()
    process.communicate()
    code, _, err = finish(start(tmp_path, "--resume", only_run(tmp_path)))
    assert code == 0, err
    trials = check_whole(only_run(tmp_path), SAMPLES)
    assert "INTERRUPTED" in set(trials["state"])


def test_a_finished_run_has_nothing_to_do(copied: Path, command: Command) -> None:
    done = command("--resume", copied)
    assert done.returncode == 0
    assert "nothing to do" in done.stderr


def test_more_samples_go_on_from_damaged_files_and_say_that_the_test_rows_were_seen(
    copied: Path, command: Command
) -> None:
    """As a full disk or a power cut leaves them: the last trial was never told to have ended."""
    before = curves_by_slot(copied)
    journal = copied / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if b'"curve"' in line)
    journal.write_bytes(b"".join(lines[:last]) + lines[last][:50])
    (copied / "trials.parquet").write_bytes(b"")
    (copied / "epochs.parquet").unlink()
    (copied / ".epochs.parquet.1.tmp").write_bytes(b"half")
    done = command("--resume", copied, "--samples", SAMPLES + 3)
    assert done.returncode == 0, done.stderr
    assert "the last line of study.journal was cut off" in done.stderr
    assert f"{SAMPLES - 1} of {SAMPLES + 3} trials have ended, 1 are tried again" in done.stderr
    check_whole(copied, SAMPLES + 3)
    after = curves_by_slot(copied)
    kept = after[after["slot"] < SAMPLES].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before, check_exact=True)
    assert "look number 2 of this run at its test rows" in " ".join(done.stdout.split())
    record = json.loads((copied / "run.json").read_text())
    assert record["looks_at_test"] == 2
    (again,) = record["resumed"]
    assert {"command", "started", "git_commit", "machine"} <= set(again)


def test_results_that_are_lost_are_made_again_and_other_looks_at_the_test_rows_are_said(
    copied: Path, command: Command
) -> None:
    shutil.copytree(copied, copied.with_name("twin"))
    twin = copied.with_name("twin") / "run.json"
    twin.write_text(json.dumps({**json.loads(twin.read_text()), "run": "twin"}))
    record = json.loads((copied / "run.json").read_text())
    record["options"]["address"] = "127.0.0.1:1"  # of a cluster that is no more
    (copied / "run.json").write_text(json.dumps(record))
    scores, predictions = read(copied, "scores"), read(copied, "predictions")
    shutil.rmtree(copied / "model")
    (copied / "report.txt").unlink()
    (copied / "scores.parquet").write_bytes(b"")
    done = command("--resume", copied, "--address", "local")
    assert done.returncode == 0, done.stderr
    assert "a result of it is missing or damaged" in done.stderr
    pd.testing.assert_frame_equal(read(copied, "scores"), scores, check_exact=True)
    pd.testing.assert_frame_equal(read(copied, "predictions"), predictions, check_exact=True)
    assert (copied / "model" / "model.json").exists()
    report = " ".join((copied / "report.txt").read_text().split())
    assert report in " ".join(done.stdout.split())
    assert "look number 2 of this run at its test rows" in report
    assert "These test rows were opened before, by twin, in folders beside" in report
    done = command("--resume", copied, "--address", "local")
    assert "nothing to do" in done.stderr


Refusal = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line that a command ends with; in this process, or each would import for seconds."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tune-steel", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert line.startswith("tune_steel: error: ")
        return line

    return run


@pytest.fixture
def untouched(copied: Path) -> Iterator[Path]:
    """A run that must be the same afterwards, to the byte."""
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    yield copied
    after = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", 1), "--seed 1: the run that is resumed has 0"),
        (("--task", "faults7"), "--task faults7: the run that is resumed has binary"),
        (("--folds", 5), "--folds 5: the run that is resumed has 3"),
        (("--search", "random"), "--search random: the run that is resumed has tpe"),
        (("--try", "{}"), "--try {}: the run that is resumed has none"),
        (("--output", "elsewhere"), "a run is resumed in its own folder"),
        (("--samples", 0), "--samples 0: must be at least 1"),
    ],
)
def test_what_would_make_it_another_search_is_refused(
    untouched: Path, refusal: Refusal, arguments: tuple[object, ...], message: str
) -> None:
    assert message in refusal("--resume", untouched, "--samples", 99, *arguments)


def test_a_changed_space_is_refused_with_the_difference(
    untouched: Path, refusal: Refusal, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(SMALL_SPACE.replace("float = [1e-3, 1e-1]", "float = [1e-3, 3e-1]"))
    line = refusal("--resume", untouched, "--samples", 99, "--space", changed)
    assert "optimizer.lr is {'float': [0.001, 0.1]" in line
    assert "here {'float': [0.001, 0.3]" in line


@pytest.mark.real_data
def test_a_changed_table_is_refused_with_the_difference(untouched: Path, refusal: Refusal) -> None:
    table = os.environ["TUNE_STEEL_DATA"]
    given = ("--data", table, "--source", "auto", "--samples", 99)
    assert "its table has the hash" in refusal("--resume", untouched, *given)


def test_a_run_that_another_process_runs_is_refused(untouched: Path, command: Command) -> None:
    with run_lock(untouched / "study.journal"):
        done = command("--resume", untouched, "--samples", 99)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("tune_steel: error: ")
    assert "another process is running this search" in line


def test_what_is_damaged_or_no_run_is_one_line(
    copied: Path, refusal: Refusal, tmp_path: Path
) -> None:
    journal = (copied / "study.journal").read_bytes()
    lines = journal.splitlines(keepends=True)
    (copied / "study.journal").write_bytes(b"".join([*lines[:9], b"damage\n", *lines[10:]]))
    assert "line 10 is damaged" in refusal("--resume", copied, "--samples", 99)
    (copied / "study.journal").write_bytes(b"")
    assert "it is empty, but run.json tells of trials" in refusal(
        "--resume", copied, "--samples", 99
    )
    record = json.loads((copied / "run.json").read_text())
    del record["options"]["threshold"]
    (copied / "run.json").write_text(json.dumps(record))
    assert "of another version of tune_steel" in refusal("--resume", copied)
    (copied / "run.json").write_text('{"run": ')
    assert "run.json: it is damaged" in refusal("--resume", copied)
    (tmp_path / "empty").mkdir()
    assert "this is no folder of a run" in refusal("--resume", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    assert "this is no folder of a run" in refusal("--resume", tmp_path / "missing")


def test_sigterm_ends_the_search_scores_what_there_is_and_it_can_go_on(tmp_path: Path) -> None:
    process = start(tmp_path, *options(tmp_path))
    wait_for(lambda: curves(tmp_path) >= 3)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143, err
    assert "SIGTERM: ending the search and scoring what there is" in err
    assert "Test scores on 97 rows" in out
    run = only_run(tmp_path)
    assert json.loads((run / "run.json").read_text())["state"] == "cut short"
    process = start(tmp_path, "--resume", run)
    wait_for_line(process, "retraining:")
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143, err
    assert err.strip() == f"tune_steel: go on with --resume {run}"
    assert out == ""
    assert json.loads((run / "run.json").read_text())["state"] == "cut short"
    code, _, err = finish(start(tmp_path, "--resume", run))
    assert code == 0, err
    check_whole(run, SAMPLES)


def test_a_second_signal_ends_it_at_once_and_loses_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, *options(tmp_path))
    wait_for(lambda: curves(tmp_path) >= 3)
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "SIGINT: ending the search")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process, 30)
    assert code == 130, err
    assert out == ""
    assert re.search(r"go on with --resume \S+\ntune_steel: interrupted$", err.strip())
    study = study_of(only_run(tmp_path))
    assert len([t for t in study.trials if t.state.name in ENDED]) >= 3
