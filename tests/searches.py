"""Real searches as processes, to be watched and killed, and what must be true of their runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState

from tune_steel.budget import Budget
from tune_steel.options import Options, Resources
from tune_steel.study import open_study

ENDED = ["COMPLETE", "PRUNED", "FAIL"]
SMALL = ("--samples", 8, "--max-epochs", 7, "--grace-period", 1, "--folds", 3)


def options_of(**changed: Any) -> Options:
    """The options of a plain search, some of them changed."""
    given = {
        **dict.fromkeys(("data", "target", "openml_id", "split", "space", "address")),
        "task": "binary",
        "budget": Budget(9),
        "source": "auto",
        "folds": 5,
        "max_epochs": 50,
        "grace_period": 6,
        "reduction_factor": 3,
        "scheduler": "asha",
        "search": "tpe",
        "resources": Resources(1.0, 0.0, None),
        "max_failures": 2,
        "warm_start": (),
        "tries": (),
        "threshold": "none",
        "seed": 0,
        "output": Path("results"),
        "dry_run": False,
        "profile": False,
    }
    return Options(**{**given, **changed})


def start(
    folder: Path, *arguments: object, script: tuple[object, ...] = ("-m", "tune_steel.search")
) -> subprocess.Popen[str]:
    """A search in its own process group, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, *map(str, script), *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Reads what the process says until a line has this in it; that line."""
    assert process.stderr is not None
    line = next((line for line in process.stderr if text in line), None)
    assert line is not None, f"it ended without {text!r}"
    return line


def only_run(folder: Path) -> Path:
    (run,) = (folder / "results").iterdir()
    return run


def read(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / f"{name}.parquet")


def curves(folder: Path) -> int:
    """Trials of the only run that have given their curve to the journal; 0 before it begins."""
    journals = list(folder.glob("results/*/study.journal"))
    return journals[0].read_bytes().count(b'"curve"') if journals else 0


def wait_for(condition: Callable[[], object], seconds: float = 120, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(every)


def processes_of(pid: int) -> dict[int, str]:
    """Every descendant of a process, with its command line."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            children.setdefault(parent, []).append((int(entry.name), line))
    out: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child, line in children.get(waiting.pop(), []):
            out[child] = line
            waiting.append(child)
    return out


def study_of(run: Path) -> optuna.Study:
    return open_study(run / "study.journal", json.loads((run / "run.json").read_text())["run"])


def check_whole(run: Path, samples: int) -> pd.DataFrame:
    """Exactly so many trials ended, none lost, none twice, and all tables agree."""
    trials, epochs = read(run, "trials"), read(run, "epochs")
    ended = trials[trials["state"].isin(ENDED)]
    assert sorted(ended["slot"]) == list(range(samples))
    again = trials[~trials["state"].isin(ENDED)]
    assert set(again["state"]) <= {"INTERRUPTED", "LOST"}
    assert set(again["trial"]) <= set(trials["retry_of"].dropna())
    first = trials.drop_duplicates("slot").set_index("slot")
    for _, trial in trials.iterrows():
        assert trial["seed"] == first.loc[trial["slot"], "seed"]
        curve = epochs[epochs["trial"] == trial["trial"]]
        assert curve["epoch"].tolist() == list(range(1, trial["epochs"] + 1))
    for _, trial in ended.iterrows():
        assert trial["config"] == first.loc[trial["slot"], "config"]
    assert set(epochs["trial"]) <= set(trials["trial"])
    study = study_of(run)
    assert TrialState.RUNNING not in [t.state for t in study.trials]
    states = {t.number: t.state.name for t in study.trials if t.state != TrialState.WAITING}
    for _, trial in trials.iterrows():
        told = states.pop(trial["trial"])
        assert told == (trial["state"] if trial["state"] in ENDED else "FAIL")
        stored = study.trials[trial["trial"]].intermediate_values
        curve = epochs[epochs["trial"] == trial["trial"]]
        if trial["state"] in ENDED:
            assert list(stored.values()) == curve["best_val_loss"].tolist()
    assert set(states.values()) <= {"FAIL"}  # killed before they were sampled
    assert not list(run.glob(".*")), "something half-written was left"
    record = json.loads((run / "run.json").read_text())
    assert record["trials"]["states"] == trials["state"].value_counts().to_dict()
    return trials


def curves_by_slot(run: Path) -> pd.DataFrame:
    """The curves of all trials that ended, without what a clock or a number decides."""
    trials = read(run, "trials")
    ended = trials[trials["state"].isin(ENDED)][["trial", "slot", "config", "seed", "state"]]
    merged = ended.merge(read(run, "epochs"), on="trial")
    changing = ["trial", "run", "seconds"]
    return merged.drop(columns=changing).sort_values(["slot", "epoch"], ignore_index=True)


def check_plain(err: str) -> None:
    """Nothing but our own lines: no chatter of Ray, no warning, no traceback."""
    for line in err.splitlines():
        assert line.startswith(("tune_steel: ", "trials ")), line
