"""Budgets end a search when they are used up, leave no trial running, and score what there is."""

import json
from pathlib import Path

import pytest
from optuna.trial import TrialState
from searches import ENDED, finish, only_run, read, start, study_of

from tune_steel.budget import Budget, Stop
from tune_steel.errors import OptionError
from tune_steel.options import parse_duration, parse_memory


@pytest.mark.ray
def test_a_time_budget_ends_the_search_in_time_and_keeps_what_there_was(
    space_file: Path, tmp_path: Path
) -> None:
    given = ("--task", "binary", "--source", "stand-in", "--space", space_file)
    # Short trials: one must have ended in the budget, of which a slow start takes the most.
    short = ("--max-epochs", 5, "--folds", 2)
    budget = ("--samples", 100_000, "--time-budget", "20s")
    code, out, err = finish(start(tmp_path, *given, *short, *budget))
    assert code == 0, err
    assert "the time budget is the search's; retraining and scoring come after it" in err
    assert "the search ended because its time budget of 20 s is used up" in err
    assert "Test scores on 97 rows" in out
    run = only_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished"
    assert 20 <= record["search_seconds"] <= 20 * 1.05 + 5
    trials, epochs = read(run, "trials"), read(run, "epochs")
    assert set(trials["state"]) <= {*ENDED, "INTERRUPTED"}
    assert TrialState.RUNNING not in [t.state for t in study_of(run).trials]
    cut = trials[trials["state"] == "INTERRUPTED"]
    assert len(cut) <= record["concurrency"]
    assert epochs.groupby("trial").size().to_dict() == {
        t: n for t, n in zip(trials["trial"], trials["epochs"], strict=True) if n
    }


@pytest.mark.ray
def test_an_epochs_budget_ends_the_search_at_that_epoch(space_file: Path, tmp_path: Path) -> None:
    given = ("--task", "binary", "--source", "stand-in", "--space", space_file)
    code, _, err = finish(
        start(tmp_path, *given, "--max-epochs", 9, "--folds", 2, "--epochs-budget", 30)
    )
    assert code == 0, err
    assert "its budget of 30 epochs is used up" in err
    epochs = read(only_run(tmp_path), "epochs")
    assert 30 <= len(epochs) <= 32  # a report of another trial may be on its way
    # The budget is of one process: the run goes on where it is asked to.
    code, _, err = finish(
        start(tmp_path, "--resume", only_run(tmp_path), "--samples", 8, "--epochs-budget", 300)
    )
    assert code == 0, err
    assert read(only_run(tmp_path), "trials")["state"].isin(ENDED).sum() >= 8


def test_an_interrupt_waits_until_nothing_is_being_written() -> None:
    stop = Stop(Budget(1))
    written = []

    def write() -> None:
        with stop.writing():
            stop.interrupt()
            written.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written
    with stop.writing():  # it came once
        pass
    with pytest.raises(KeyboardInterrupt):
        stop.interrupt()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("1h1m1s", 3661)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--time-budget", text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0m", "-5s", "soon", "5d", "m", "1m1h", "1..5h", "nan", "9999999h"]
)
def test_no_durations(text: str) -> None:
    with pytest.raises(OptionError, match="allowed are times like 90s, 10m or 1h30m"):
        parse_duration("--time-budget", text)


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("2GiB", 2**31), ("100000000", 10**8)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory("--memory", text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1MB", "0", "8EiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="allowed are sizes from 50MB"):
        parse_memory("--memory", text)
