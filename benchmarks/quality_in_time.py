"""Out-of-fold log_loss against wall time: this project, tuned LightGBM, AutoGluon.

All three get the same five folds of the development rows, the same cores and the same time. The
loss is the log_loss without class weights, mean over the folds. This project's search is led by
another loss, the one with the task's class weights, and its curve is the lowest log_loss of the
trials that had ended; LightGBM's study is led by this one. Both choose the length of a training
on the validation rows of the folds; AutoGluon does not see them, and is a point for each time it
is given, not a curve. No test row is read for any figure here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.process import Usage, machine, run
from tune_steel.data import load_steel
from tune_steel.provenance import git_commit
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tasks import steel_task

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published" / "quality_in_time.parquet"
FOLDS = 5
OURS, LIGHTGBM, AUTOGLUON = "tune_steel", "lightgbm", "autogluon"
AUTOGLUON_SHARES = (0.25, 0.5, 1.0)
"""Shares of the time that AutoGluon gets, a run each."""

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("method", "data_source", "machine")),
        pa.field("versions", pa.string(), metadata={"doc": "Packages of the method, as JSON."}),
        pa.field("repeat", pa.int32()),
        pa.field("given_s", pa.float64(), metadata={"doc": "The time that the method was given."}),
        pa.field("seconds", pa.float64(), metadata={"doc": "Since the process began."}),
        pa.field("log_loss", pa.float64(), metadata={"doc": "The lowest so far."}),
        pa.field("note", pa.string(), metadata={"doc": "Why a method is missing."}),
        pa.field("git_commit", pa.string()),
    ]
)

Point = tuple[float, float]
"""Seconds since the process began, log_loss."""


def write_folds(path: Path, development: Development) -> None:
    """The rows as they are, for methods that need no scaling."""
    arrays: dict[str, Any] = {"x": development.features.numeric, "y": development.y}
    for fold, (train, val) in enumerate(development.folds):
        arrays |= {f"train_{fold}": train, f"val_{fold}": val}
    np.savez(path, **arrays)


def lowest_so_far(points: Sequence[Point]) -> list[Point]:
    """The points that lowered the loss, in the order of time."""
    out: list[Point] = []
    for seconds, loss in sorted(points):
        if not out or loss < out[-1][1]:
            out.append((seconds, loss))
    return out


def mean_log_loss(folds: Sequence[int], y: Sequence[int], p: Sequence[float]) -> float:
    """Mean over the folds of the log_loss of probabilities of class 1."""
    fold, truth, given = np.array(folds), np.array(y), np.array(p, dtype=float)
    nll = -np.log(np.clip(np.where(truth == 1, given, 1 - given), 1e-15, 1))
    return float(np.mean([nll[fold == f].mean() for f in np.unique(fold)]))


class Method:
    """A method that is given a time: its command, and what it wrote."""

    name: str

    def __init__(self, python: str, seconds: float, repeat: int, workers: int) -> None:
        self.python, self.seconds, self.repeat, self.workers = python, seconds, repeat, workers

    def command(self, request: Mapping[str, Any], folder: Path) -> list[str]:
        raise NotImplementedError

    def read(self, folder: Path, usage: Usage) -> tuple[list[Point], dict[str, str]]:
        raise NotImplementedError

    def run(self, data: Path, source: str, scratch: Path) -> list[dict[str, Any]]:
        """Rows of the table."""
        folder = Path(tempfile.mkdtemp(dir=scratch))
        request = {
            "data": str(data),
            "folds": FOLDS,
            "folder": str(folder),
            "seconds": self.seconds,
            "seed": self.repeat,
            "workers": self.workers,
            "source": source,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        usage = run(self.command(request, folder), environment, folder)
        row: dict[str, Any] = {
            "method": self.name,
            "data_source": source,
            "machine": machine(),
            "repeat": self.repeat,
            "given_s": self.seconds,
            "git_commit": git_commit(),
        }
        if usage.code:
            last = [line for line in usage.output.splitlines() if line.strip()][-1:]
            return [row | {"note": f"exit code {usage.code}: {' '.join(last)}"}]
        points, versions = self.read(folder, usage)
        row["versions"] = json.dumps(versions)
        return [row | {"seconds": at, "log_loss": loss} for at, loss in lowest_so_far(points)]


class Ours(Method):
    """This project's command line."""

    name = OURS

    def command(self, request: Mapping[str, Any], folder: Path) -> list[str]:
        options = {
            "task": "binary",
            "samples": 100_000,
            "time-budget": f"{self.seconds:g}",
            "folds": FOLDS,
            "concurrency": self.workers,
            "seed": self.repeat,
            "output": folder,
            "source": "stand-in" if request["source"] == "stand-in" else "auto",
        }
        pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "tune_steel.search", *pairs]

    def read(self, folder: Path, usage: Usage) -> tuple[list[Point], dict[str, str]]:
        (path,) = folder.glob("*/run.json")
        about = json.loads(path.read_text(encoding="utf-8"))
        journal = JournalStorage(JournalFileBackend(str(path.with_name("study.journal"))))
        study = optuna.load_study(study_name=about["run"], storage=journal)
        ended = {
            trial.number: trial.datetime_complete.timestamp() - usage.started
            for trial in study.get_trials(deepcopy=False)
            if trial.datetime_complete is not None
        }
        rows = pq.read_table(path.with_name("trials.parquet")).to_pylist()
        scored = [row for row in rows if row["state"] in ("COMPLETE", "PRUNED")]
        return [(ended[r["trial"]], r["val_log_loss"]) for r in scored], about["versions"]


class LightGBM(Method):
    """LightGBM tuned by Optuna."""

    name = LIGHTGBM

    def command(self, request: Mapping[str, Any], folder: Path) -> list[str]:
        module = "benchmarks.peers.lightgbm_optuna"
        return [self.python, "-m", module, str(folder / "request.json")]

    def read(self, folder: Path, usage: Usage) -> tuple[list[Point], dict[str, str]]:
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return [(at - usage.started, loss) for at, loss in answer["points"]], answer["versions"]


class AutoGluon(Method):
    """AutoGluon's `best_quality` on each fold."""

    name = AUTOGLUON

    def command(self, request: Mapping[str, Any], folder: Path) -> list[str]:
        script = ROOT / "benchmarks" / "peers" / "autogluon_folds.py"
        return [self.python, str(script), str(folder / "request.json")]

    def read(self, folder: Path, usage: Usage) -> tuple[list[Point], dict[str, str]]:
        table = pq.read_table(folder / "out-of-fold.parquet").to_pydict()
        loss = mean_log_loss(table["fold"], table["y"], table["p1"])
        versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
        return [(usage.seconds, loss)], versions


def measure(
    seconds: float, repeat: int, workers: int, pythons: Mapping[str, str], scratch: Path
) -> list[dict[str, Any]]:
    """Runs all methods once; rows of the table."""
    given = os.environ.get("TUNE_STEEL_DATA")
    table = load_steel(None, "auto" if given else "stand-in")
    task = steel_task(table, "binary")
    development, _, _ = prepare(task, freeze(task, seed=repeat, split=task.split, folds=FOLDS))
    data = scratch / f"folds-{repeat}.npz"
    write_folds(data, development)
    methods: list[Method] = [
        Ours(sys.executable, seconds, repeat, workers),
        LightGBM(pythons[LIGHTGBM], seconds, repeat, workers),
    ]
    python = pythons[AUTOGLUON]
    methods += [AutoGluon(python, s * seconds, repeat, workers) for s in AUTOGLUON_SHARES]
    return [row for method in methods for row in method.run(data, table.source, scratch)]


def at(rows: pd.DataFrame, seconds: float) -> float | None:
    """The lowest loss by then of the run that was given most, among those with a figure by then.

    Not the lowest of all runs: that would be a choice by the loss that is shown.
    """
    known = rows[rows["seconds"] <= seconds]
    if known.empty:
        return None
    return float(known.loc[known["given_s"] == known["given_s"].max(), "log_loss"].min())
