"""This project beside its peers: the same space, rows, folds, epochs and trials on the same cores.

    python -m benchmarks.speed search
    python -m benchmarks.speed quality-in-time
    python -m benchmarks.speed table             # what is published, into the README

`search` runs, in turn (A B C D, A B C D, ...):

- `tune_steel`: `python -m tune_steel.search`, which also retrains the winner and scores it;
- `ray`: a Ray Tune script as its documentation teaches it (`peers/ray_tune.py`);
- `optuna`: plain Optuna in processes, over a journal (`peers/plain_optuna.py`);
- `syne`: Syne Tune's local backend with BOHB (`peers/syne.py`; `--syne-python` names the Python
  that has it, if it is not this one).

What is the same: the TOML file of the space; the default config as the first trial; successive
halving from the same epoch by the same factor; the validation loss, which is the cross-entropy
with the task's class weights, mean over the folds; plateau and early stopping on it; one thread a
trial. The peers get rows that are already scaled in all three ways, with this project's code; here
scaling is part of each trial. Whatever the method's own choice is, a peer's chosen trial is the
one with the lowest loss of all epochs.

Times begin with the process. A search ends when its last trial does; the wall time is that of the
whole process. The chosen configs are judged by one function on folds and with seeds that chose
none of them, cut from the same development rows: lowest mean loss over its epochs, mean of the
cuts. The target is the loss that one in ten of the recorded random configs beats
(`curves/binary.parquet`), five folds of the real table cut with seed 0; the seed of a repeat is
its number, and later ones have other cuts, all methods the same. Time to it is until the first
trial that reached it had ended. Memory is looked at twice a second.

The peers need `pip install '.[benchmark]'`; AutoGluon an environment of its own (`python -m venv
FOLDER`, then `FOLDER/bin/pip install 'autogluon.tabular[lightgbm,catboost,xgboost]'`), named by
`--autogluon-python FOLDER/bin/python`. A method that cannot run is a line of the output and a row
of the table with the reason. `TUNE_STEEL_DATA` names the real table, else it is the stand-in.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sklearn.model_selection import StratifiedKFold

from benchmarks import fit, quality_in_time, speed_table
from benchmarks.peers.training import Request, Trial
from benchmarks.process import Usage, machine, run
from benchmarks.quality_in_time import OURS
from tune_steel.data import load_steel
from tune_steel.fit import Fit, prepare_process
from tune_steel.options import default_grace_period
from tune_steel.preprocess import fit_preprocessing
from tune_steel.provenance import git_commit
from tune_steel.seeds import derive
from tune_steel.space import Params, Space, load_space
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tables import write_table
from tune_steel.tasks import steel_task

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published" / "speed.parquet"
CURVES = ROOT / "benchmarks" / "curves" / "binary.parquet"
SPACE = ROOT / "benchmarks" / "spaces" / "binary.toml"
METHODS = (OURS, "ray", "optuna", "syne")
MODULES = {
    "ray": "benchmarks.peers.ray_tune",
    "optuna": "benchmarks.peers.plain_optuna",
    "syne": "benchmarks.peers.syne",
}
REDUCTION_FACTOR = 3
CUTS = 2
JUDGE_FOLDS = 5
TARGET_SHARE = 0.1

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("method", "data_source", "machine", "started")),
        pa.field("versions", pa.string(), metadata={"doc": "Packages of the method, as JSON."}),
        *(
            pa.field(name, pa.int32())
            for name in ("folds", "repeat", "workers", "samples", "max_epochs", "trials", "epochs")
        ),
        pa.field("wall_s", pa.float64(), metadata={"doc": "The whole process."}),
        pa.field("search_s", pa.float64(), metadata={"doc": "Until the last trial had ended."}),
        pa.field("cpu_s", pa.float64(), metadata={"doc": "CPU time of all its processes."}),
        pa.field("peak_mb", pa.float64(), metadata={"doc": "The most PSS of all its processes."}),
        pa.field("trials_per_minute", pa.float64(), metadata={"doc": "By search_s."}),
        pa.field("epochs_per_minute", pa.float64(), metadata={"doc": "By search_s."}),
        pa.field("best_val_loss", pa.float64(), metadata={"doc": "Of the chosen trial."}),
        pa.field("judged_loss", pa.float64(), metadata={"doc": "Its loss on other folds."}),
        pa.field("target", pa.float64(), metadata={"doc": "A loss; null where none is defined."}),
        pa.field("target_s", pa.float64(), metadata={"doc": "Until a trial below it had ended."}),
        pa.field("params", pa.string(), metadata={"doc": "Of the chosen trial, as JSON."}),
        pa.field("note", pa.string(), metadata={"doc": "Why a method is missing."}),
        pa.field("git_commit", pa.string()),
    ]
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Setting:
    """One search of each method.

    Attributes:
        request: What the peers are asked for.
        development: The rows, for the judge.
        folds: 1 is the plain split.
        data_source: Where the table came from.
    """

    request: Request
    development: Development
    folds: int
    data_source: str

    @property
    def space(self) -> Space:
        return load_space(Path(self.request.space))


@dataclass(frozen=True)
class Outcome:
    """What a search gave.

    Attributes:
        trials: Those that ended, in the order in which they did.
        chosen: The chosen one.
        versions: Packages.
    """

    trials: list[Trial]
    chosen: Trial
    versions: Mapping[str, str]


def set_up(
    folder: Path, *, folds: int, repeat: int, samples: int, most: int, workers: int
) -> Setting:
    """Cuts the table as a search with this seed does, and writes it for the peers."""
    given = os.environ.get("TUNE_STEEL_DATA")
    table = load_steel(None, "auto" if given else "stand-in")
    task = steel_task(table, "binary")
    splits = freeze(task, seed=repeat, split=task.split, folds=folds)
    development, _, _ = prepare(task, splits)
    data = folder / f"data-{folds}-{repeat}.npz"
    write_data(data, development)
    request = Request(
        data=str(data),
        space=str(SPACE),
        samples=samples,
        max_epochs=most,
        grace_period=default_grace_period(most),
        reduction_factor=REDUCTION_FACTOR,
        workers=workers,
        seed=repeat,
        folder=str(folder),
    )
    return Setting(request, development, folds, table.source)


def write_data(path: Path, development: Development) -> None:
    """The arrays that `peers.training.Data` reads."""
    train = [rows for rows, _ in development.folds]
    arrays: dict[str, Any] = {"y": development.y, "weights": development.reference_weights}
    for scaling in ("standard", "robust", "quantile"):
        fitted = fit_preprocessing(scaling, development.schema, development.features, train)
        arrays[scaling] = fitted.transform(development.features)
    for fold, (train_rows, val_rows) in enumerate(development.folds):
        arrays |= {f"train_{fold}": train_rows, f"val_{fold}": val_rows}
    np.savez(path, **arrays)


def run_method(method: str, setting: Setting, python: str) -> dict[str, Any]:
    """Runs one search in a folder of its own; its row of the table."""
    request = setting.request
    folder = Path(tempfile.mkdtemp(prefix=f"{method}-", dir=request.folder))
    request = replace(request, folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if method == OURS:
        command = own_command(request, setting)
    else:
        request.write(folder / "request.json")
        command = [python, "-m", MODULES[method], str(folder / "request.json")]
    usage = run(command, environment, folder)
    row: dict[str, Any] = {
        "method": method,
        "data_source": setting.data_source,
        "machine": machine(),
        "started": datetime.fromtimestamp(usage.started, UTC).isoformat(timespec="seconds"),
        "folds": setting.folds,
        "repeat": request.seed,
        "workers": request.workers,
        "samples": request.samples,
        "max_epochs": request.max_epochs,
        "git_commit": git_commit(),
    }
    if usage.code:
        last = [line for line in usage.output.splitlines() if line.strip()][-1:]
        return row | {"note": f"exit code {usage.code}: {' '.join(last)}"}
    outcome = (read_own if method == OURS else read_peer)(folder, request.samples)
    shutil.rmtree(folder, ignore_errors=True)
    return row | measures(outcome, usage, target_loss(setting), setting.space)


def own_command(request: Request, setting: Setting) -> list[str]:
    options: dict[str, object] = {
        "task": "binary",
        "samples": request.samples,
        "folds": setting.folds,
        "max-epochs": request.max_epochs,
        "grace-period": request.grace_period,
        "reduction-factor": request.reduction_factor,
        "concurrency": request.workers,
        "seed": request.seed,
        "space": request.space,
        "output": request.folder,
        "source": "stand-in" if setting.data_source == "stand-in" else "auto",
    }
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "tune_steel.search", *pairs]


def read_own(folder: Path, samples: int) -> Outcome:
    """The trials of this project's run, by its tables and its journal."""
    (path,) = folder.glob("*/run.json")
    about = json.loads(path.read_text(encoding="utf-8"))
    journal = JournalStorage(JournalFileBackend(str(path.with_name("study.journal"))))
    study = optuna.load_study(study_name=about["run"], storage=journal)
    ended = {t.number: t.datetime_complete for t in study.get_trials(deepcopy=False)}
    trials = {
        row["trial"]: Trial(
            {key: value for key, value in row.items() if "." in key and value is not None},
            row["val_loss"],
            row["epochs"],
            ended[row["trial"]].timestamp(),  # type: ignore[union-attr]
        )
        for row in pq.read_table(path.with_name("trials.parquet")).to_pylist()
        if row["val_loss"] is not None
    }
    in_order = sorted(trials.values(), key=lambda trial: trial.ended)[:samples]
    return Outcome(in_order, trials[about["best_trial"]], about["versions"])


def read_peer(folder: Path, samples: int) -> Outcome:
    """What a peer answered."""
    answer = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    trials = sorted((Trial(**trial) for trial in answer["trials"]), key=lambda t: t.ended)[
        :samples
    ]
    return Outcome(trials, min(trials, key=lambda t: t.best_val_loss), answer["versions"])


def measures(outcome: Outcome, usage: Usage, target: float | None, space: Space) -> dict[str, Any]:
    """The figures of a search that ended well."""
    trials = outcome.trials
    search = trials[-1].ended - usage.started
    epochs = sum(trial.epochs for trial in trials)
    below = [t.ended for t in trials if target is not None and t.best_val_loss <= target]
    return {
        "versions": json.dumps(dict(outcome.versions)),
        "trials": len(trials),
        "epochs": epochs,
        "wall_s": usage.seconds,
        "search_s": search,
        "cpu_s": usage.cpu_seconds,
        "peak_mb": usage.peak_mb,
        "trials_per_minute": 60 * len(trials) / search,
        "epochs_per_minute": 60 * epochs / search,
        "best_val_loss": outcome.chosen.best_val_loss,
        "target": target,
        "target_s": below[0] - usage.started if below else None,
        "params": json.dumps(active(space, outcome.chosen.config)),
    }


def active(space: Space, config: Mapping[str, Any]) -> Params:
    """The sampled values of a config whose conditions hold."""
    return space.sample(lambda leaf: config[leaf.key])


def target_loss(setting: Setting) -> float | None:
    """The loss that the best tenth of the recorded random configs reach.

    None where the recorded loss is another: on other folds than they, on the stand-in, or with
    fewer epochs.
    """
    table = pq.read_table(CURVES)
    about = json.loads(table.schema.metadata[b"about"])
    same = setting.folds == about["folds"] and setting.request.max_epochs >= about["max_epochs"]
    if not same or setting.data_source == "stand-in":
        return None
    lowest = [min(curve) for curve in table["val_loss"].to_pylist()]
    return float(np.quantile(lowest, TARGET_SHARE))


def judge(task: tuple[Development, Space, Params, int]) -> float:
    """The loss of a config on cuts of the development rows that chose nothing."""
    development, space, params, most = task
    prepare_process(1)
    losses = []
    for cut in range(CUTS):
        other = StratifiedKFold(JUDGE_FOLDS, shuffle=True, random_state=derive("judge", cut))
        folds = tuple(other.split(development.y, development.y))
        seeds = [derive("judge", cut, fold) for fold in range(JUDGE_FOLDS)]
        *_, last = Fit(space.config(params), development, folds, seeds).epochs(most)
        losses.append(last.best_val_loss)
    return float(np.mean(losses))


def judge_all(rows: Iterable[dict[str, Any]], settings: Mapping[tuple[int, int], Setting]) -> None:
    """Adds `judged_loss` to the rows."""
    rows = [row for row in rows if row.get("params")]
    tasks = {}  # methods often choose the same config, such as the default
    for row in rows:
        setting = settings[row["folds"], row["repeat"]]
        params = json.loads(row["params"])
        task = setting.development, setting.space, params, row["max_epochs"]
        tasks[row["repeat"], row["params"]] = task
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        losses = dict(zip(tasks, pool.map(judge, tasks.values(), chunksize=1), strict=True))
    for row in rows:
        row["judged_loss"] = losses[row["repeat"], row["params"]]


@app.command()
def search(
    folds: Annotated[list[int] | None, typer.Option(help="1 and 5 by default.")] = None,
    repeats: Annotated[int, typer.Option(help="Of each method and number of folds.")] = 3,
    samples: Annotated[int, typer.Option(help="Trials of a search.")] = 40,
    max_epochs: Annotated[int, typer.Option(help="The most epochs of a trial.")] = 50,
    workers: Annotated[int, typer.Option(help="Trials at once, and cores.")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="By default, all.")] = None,
    syne_python: Annotated[str, typer.Option(help="A Python with syne-tune.")] = sys.executable,
    output: Annotated[Path, typer.Option(help="The table; rows of other folds stay.")] = PUBLISHED,
) -> None:
    """Runs all methods in turn, judges what they chose, prints and publishes."""
    if method and output == PUBLISHED:
        raise typer.BadParameter(
            "--method: the published ratios are of methods that ran in turn; name another --output"
        )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    methods = tuple(method or METHODS)
    counts = folds or [1, 5]
    others = pq.read_table(output).to_pylist() if output.exists() else []
    others = [row for row in others if row["folds"] not in counts]
    rows: list[dict[str, Any]] = []
    settings: dict[tuple[int, int], Setting] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="speed-", ignore_cleanup_errors=True) as scratch:
        for repeat in range(repeats):
            for count in counts:
                setting = set_up(
                    Path(scratch),
                    folds=count,
                    repeat=repeat,
                    samples=samples,
                    most=max_epochs,
                    workers=workers,
                )
                settings[count, repeat] = setting
                for name in methods:
                    row = run_method(
                        name, setting, syne_python if name == "syne" else sys.executable
                    )
                    rows.append(row)
                    write_table(output, others + rows, SCHEMA)
                    said = row.get("note") or f"{row['wall_s']:.0f} s, {row['trials']} trials"
                    print(f"{name}, {count} folds, repeat {repeat}: {said}", file=sys.stderr)
        judge_all(rows, settings)
    write_table(output, others + rows, SCHEMA)
    print(speed_table.searches(pd.read_parquet(output)))


@app.command("quality-in-time")
def beside_boosters(
    seconds: Annotated[float, typer.Option(help="What each method is given.")] = 120.0,
    repeats: Annotated[int, typer.Option(help="Of each method.")] = 1,
    workers: Annotated[int, typer.Option(help="Trials at once, and cores.")] = 2,
    lightgbm_python: Annotated[str, typer.Option(help="A Python with lightgbm.")] = sys.executable,
    autogluon_python: Annotated[
        str, typer.Option(help="A Python with autogluon.tabular, which needs pandas 2.")
    ] = sys.executable,
    output: Annotated[Path, typer.Option(help="The table.")] = quality_in_time.PUBLISHED,
) -> None:
    """Out-of-fold log_loss against time, beside tuned LightGBM and AutoGluon."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    pythons = {
        quality_in_time.LIGHTGBM: lightgbm_python,
        quality_in_time.AUTOGLUON: autogluon_python,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="quality-", ignore_cleanup_errors=True) as scratch:
        for repeat in range(repeats):
            rows += quality_in_time.measure(seconds, repeat, workers, pythons, Path(scratch))
            write_table(output, rows, quality_in_time.SCHEMA)
    print(speed_table.in_time(pd.read_parquet(output)))


@app.command("table")
def tables() -> None:
    """Puts what is published into the README."""
    speed_table.publish(PUBLISHED, quality_in_time.PUBLISHED, fit.PUBLISHED)


if __name__ == "__main__":
    app()
