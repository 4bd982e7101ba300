"""How good the final model is, beside what people use: a nested benchmark.

    TUNE_STEEL_DATA=... python -m benchmarks.quality --rivals-python .../bin/python
    python -m benchmarks.quality --table

Outer folds, stratified and repeated, are for the report; the whole pipeline of each method
(search, choice, refit) runs inside each outer training part, on the same rows and CPUs. A cell is
a method on an outer fold of a task. All methods and tasks are done on one outer fold before the
next one begins, so there is a whole comparison early. Finished cells are kept: a benchmark that
was killed goes on when it is started again, and so does one that is given more folds, tasks or
methods. What cannot run is a line here and in the table, and is tried again the next time.

`results/published/quality.parquet` holds a row for each task, repeat, fold and method, and
`quality-predictions.parquet` the probabilities of their test rows; `--table` renders the first
into the README, in short, and into docs/quality.md. Outer test rows are for reporting only:
docs/quality.md says what of the product is not independent of them. `boosters.py`, `rivals.py`
and `outside.py` say what each method is.
"""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from sklearn import datasets
from sklearn.model_selection import StratifiedKFold

from benchmarks import boosters, outside, quality_table, rivals
from benchmarks.rivals import Fold, Method, MissingError, Outcome, Settings
from tune_steel.data import Table, hash_frame, load_steel
from tune_steel.errors import OptionError, TuneSteelError
from tune_steel.features import Floats
from tune_steel.provenance import git_commit
from tune_steel.scores import SCORES, score
from tune_steel.seeds import derive
from tune_steel.study import run_lock
from tune_steel.tables import replacing, write_table
from tune_steel.tasks import STEEL_TASKS, Task, own_task, steel_task

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
OWN = ("breast_cancer", "wine", "digits")
# The product comes first: AutoGluon gets its seconds, random search its epochs.
METHODS: dict[str, Method] = {**rivals.METHODS, **boosters.METHODS, **outside.METHODS}
_PACKAGES = (
    *("tune-steel", "torch", "scikit-learn", "optuna", "ray", "lightgbm", "xgboost-cpu"),
    *("xgboost", "catboost"),
)
_SAME = ("data_hash", "outer_folds", "inner_folds", "trials", "max_epochs", "seed", "threads")
_KEY = ("task", "repeat", "fold", "cell")


def _field(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    return pa.field(name, kind, metadata={"doc": doc})


CELLS = pa.schema(
    [
        _field("task", pa.string(), "binary, multiclass, faults7, or a table of scikit-learn."),
        _field("repeat", pa.int32(), "Number of the outer cross-validation."),
        _field("fold", pa.int32(), "Number of the outer fold."),
        _field("cell", pa.string(), "What ran; tune_steel gives several rows."),
        _field("method", pa.string(), "Whose probabilities they are."),
        _field("data_source", pa.string(), "file, cache, openml, stand-in or scikit-learn."),
        _field("data_hash", pa.string(), "Content hash of the table."),
        _field("train_rows", pa.int32(), "Outer training rows."),
        _field("test_rows", pa.int32(), "Outer test rows."),
        _field("outer_folds", pa.int32(), "Outer folds of a repeat."),
        _field("inner_folds", pa.int32(), "Folds inside the outer training rows."),
        _field("trials", pa.int32(), "Trials that a search may have."),
        _field("max_epochs", pa.int32(), "Epochs of a trial of the product."),
        _field("threads", pa.int32(), "CPUs."),
        _field("seed", pa.int64(), "Seed of the benchmark."),
        _field("fold_seed", pa.int64(), "Seed of the task, repeat and fold."),
        _field("seconds", pa.float64(), "Wall time of the whole cell: search, refit, prediction."),
        _field("epochs", pa.int64(), "Epochs that all trials of the product trained."),
        *(_field(name, pa.float64(), doc) for name, doc in SCORES.items()),
        _field("notes", pa.string(), "What the method says about itself."),
        _field("error", pa.string(), "Why there are no scores; null where there are."),
        _field("versions", pa.string(), "Packages as JSON."),
        _field("git_commit", pa.string(), "Of this project, with +changes if it had any."),
    ]
)


def predictions_schema(classes: int) -> pa.Schema:
    """A row for each task, repeat, fold, method and test row."""
    return pa.schema(
        [
            *(CELLS.field(name) for name in ("task", "repeat", "fold", "cell", "method")),
            _field("row", pa.int32(), "Index of the row in the table, from 0."),
            _field("y", pa.int32(), "Class index."),
            *(_field(f"p{c}", pa.float64(), f"Probability of class {c}.") for c in range(classes)),
        ]
    )


@dataclass(frozen=True)
class Cell:
    """A method on an outer fold of a task."""

    task: str
    repeat: int
    fold: int
    cell: str

    @property
    def key(self) -> tuple[str, int, int, str]:
        """As in the columns of the tables."""
        return self.task, self.repeat, self.fold, self.cell


class Store:
    """The two published tables; each is whole at every moment.

    Predictions are written before the row that says that the cell is finished, so a cell that is
    finished has them; what a killed process left is replaced when the cell runs again.
    """

    def __init__(self, folder: Path) -> None:
        self._cells = folder / "quality.parquet"
        self._predictions = folder / "quality-predictions.parquet"
        self.rows: list[dict[str, Any]] = (
            pq.read_table(self._cells).to_pylist() if self._cells.exists() else []
        )

    @property
    def done(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """A row of each finished cell."""
        return {_key(row): row for row in self.rows if row.get("error") is None}

    def put(self, cell: Cell, rows: list[dict[str, Any]], predictions: pa.Table | None) -> None:
        """Takes what a cell gave, in the place of what it gave before."""
        parts = [*self._predictions_without(cell), *([] if predictions is None else [predictions])]
        if parts:
            whole = pa.concat_tables(parts, promote_options="default")
            with replacing(self._predictions) as temporary:
                pq.write_table(whole, temporary, compression="zstd")
        self.rows = [row for row in self.rows if _key(row) != cell.key] + rows
        write_table(self._cells, self.rows, CELLS)

    def _predictions_without(self, cell: Cell) -> list[pa.Table]:
        if not self._predictions.exists():
            return []
        table = pq.read_table(self._predictions)
        cells = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
        return [table.filter(pa.array([key != cell.key for key in cells], pa.bool_()))]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def load(name: str, source: Literal["auto", "stand-in"]) -> tuple[Table, Task]:
    """A table and its task by the task's name."""
    if name in STEEL_TASKS:
        table = load_steel(None, source)
        return table, steel_task(table, name)
    bunch = getattr(datasets, f"load_{name}")(as_frame=True)
    frame = bunch.frame.reset_index(drop=True)
    table = Table(name, frame, "file", hash_frame(frame), "target")
    return table, own_task(table, "target")


def outer_folds(task: Task, folds: int, repeat: int, seed: int) -> list[tuple[Any, Any]]:
    """Training and test positions of each outer fold of a repeat, stratified."""
    cutter = StratifiedKFold(
        folds, shuffle=True, random_state=derive(seed, task.name, "outer", repeat)
    )
    return list(cutter.split(np.arange(len(task.y)), task.y))


def measure(
    cell: Cell, fold: Fold, base: dict[str, Any]
) -> tuple[list[dict[str, Any]], pa.Table | None]:
    """Runs a cell; returns its rows of both tables. What fails is a row with an error."""
    started = time.monotonic()
    outcome, error = Outcome({}), None
    try:
        outcome = METHODS[cell.cell](fold)
        for name, p in outcome.probabilities.items():
            _check(name, p, fold)
    except MissingError as missing:
        error = str(missing)
    except Exception as failure:  # of whatever library; the other cells go on
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    common = {
        **base,
        **dict(zip(_KEY, cell.key, strict=True)),
        "train_rows": len(fold.train),
        "test_rows": len(fold.test),
        "fold_seed": fold.seed,
        "seconds": time.monotonic() - started,
        "epochs": outcome.epochs,
        "notes": outcome.notes,
        "versions": json.dumps(_versions()),
        "git_commit": git_commit(),
    }
    if error is not None:
        return [{**common, "method": cell.cell, "error": error}], None
    y, index = fold.task.y[fold.test], fold.task.rows[fold.test]
    counts = np.bincount(fold.y, minlength=fold.classes)
    weights = len(fold.y) / (fold.classes * counts)
    rows, predictions = [], []
    for name, p in outcome.probabilities.items():
        rows.append({**common, "method": name, **score(p, y, weights)})
        columns = {
            **dict(zip(_KEY, cell.key, strict=True)),
            "method": name,
            "row": index,
            "y": y,
            **{f"p{c}": p[:, c] for c in range(fold.classes)},
        }
        frame = pd.DataFrame(columns)
        predictions.append(pa.Table.from_pandas(frame, predictions_schema(fold.classes)))
    return rows, pa.concat_tables(predictions).replace_schema_metadata()


def _check(name: str, p: Floats, fold: Fold) -> None:
    good = p.shape == (len(fold.test), fold.classes) and np.isfinite(p).all() and (p >= 0).all()
    if not good or not np.allclose(p.sum(axis=1), 1, atol=1e-5):
        raise ValueError(f"{name} gave no probabilities of {len(fold.test)} rows")


def _versions() -> dict[str, str]:
    out = {}
    for name in _PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _chosen(given: str, allowed: list[str], option: str) -> list[str]:
    wanted = [part.strip() for part in given.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in allowed]
    if unknown or not wanted:
        raise OptionError(
            f"{option} {given}: {unknown[0] if unknown else 'nothing'} is unknown; allowed, with "
            f"commas between them: {', '.join(allowed)}"
        )
    return [name for name in allowed if name in wanted]


def run(
    cells: list[Cell],
    settings: Settings,
    folds: int,
    source: Literal["auto", "stand-in"],
    store: Store,
    *,
    redo: bool,
) -> Iterator[str]:
    """Runs the cells that are not finished, or all of them; yields a line for each."""
    loaded = {name: load(name, source) for name in dict.fromkeys(cell.task for cell in cells)}
    bases = {}
    for name, (table, _) in loaded.items():
        bases[name] = {
            "data_source": "scikit-learn" if name in OWN else table.source,
            "data_hash": table.content_hash,
            "outer_folds": folds,
            "inner_folds": settings.inner_folds,
            "trials": settings.trials,
            "max_epochs": settings.max_epochs,
            "threads": settings.threads,
            "seed": settings.seed,
        }
        _same(name, bases[name], store, {cell.key for cell in cells} if redo else set())
    cuts: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
    for number, cell in enumerate(cells, start=1):
        done = store.done
        if cell.key in done and not redo:
            continue
        table, task = loaded[cell.task]
        place = cell.task, cell.repeat
        if place not in cuts:
            cuts[place] = outer_folds(task, folds, cell.repeat, settings.seed)
        train, test = cuts[place][cell.fold]
        ours = done.get(replace(cell, cell="tune_steel").key)
        fold = Fold(
            table,
            task,
            train,
            test,
            derive(settings.seed, cell.task, cell.repeat, cell.fold),
            settings,
            {} if ours is None else {"epochs": ours["epochs"], "seconds": ours["seconds"]},
        )
        rows, predictions = measure(cell, fold, bases[cell.task])
        store.put(cell, rows, predictions)
        where = f"{cell.task}, repeat {cell.repeat}, fold {cell.fold}"
        for row in rows:
            if "error" in row:
                what = f"NOT measured: {row['error']}"
            else:
                what = (
                    f"accuracy {row['accuracy']:.3f}, balanced {row['macro_accuracy']:.3f}, "
                    f"log-loss {row['log_loss']:.3f}"
                )
            took = f"{row['seconds']:.1f} s"
            yield f"[{number}/{len(cells)}] {where}: {row['method']}: {what} ({took})"


def _same(task: str, base: dict[str, Any], store: Store, leaving: set[tuple[Any, ...]]) -> None:
    """Cells of other settings are no rows of one table, but for those that are replaced."""
    for key, row in store.done.items():
        if key in leaving:
            continue
        changed = [k for k in _SAME if row["task"] == task and row[k] != base[k]]
        if changed:
            said = ", ".join(f"{k} {row[k]}, here {base[k]}" for k in changed)
            raise OptionError(
                f"the table has cells of {task} with other settings ({said}); name another "
                "--output, or take the same settings"
            )


def main(
    tasks: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(
        (*STEEL_TASKS, *OWN)
    ),
    methods: Annotated[
        str, typer.Option(help="Which, with commas.", show_default="all")
    ] = ",".join(METHODS),
    folds: Annotated[
        str, typer.Option(help="Outer folds to run, like 0,1,2.", show_default="all")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Outer cross-validations.", min=1)] = 1,
    trials: Annotated[int, typer.Option(help="Trials of each search.", min=1)] = 50,
    max_epochs: Annotated[int, typer.Option(help="Epochs of the product's trials.", min=1)] = 50,
    outer: Annotated[int, typer.Option(help="Outer folds there are.", min=2)] = 10,
    inner: Annotated[int, typer.Option(help="Folds inside each.", min=2)] = 5,
    threads: Annotated[int, typer.Option(help="CPUs of every method.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Every other seed is derived from it.")] = 0,
    rivals_python: Annotated[
        Path | None, typer.Option(help="Interpreter that has pytabkit and AutoGluon.")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="The product's space.", show_default="the task's")
    ] = None,
    source: Annotated[
        Literal["auto", "stand-in"], typer.Option(help="Of the steel table.")
    ] = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the two tables.")] = PUBLISHED,
    redo: Annotated[bool, typer.Option("--redo", help="Run finished cells too.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Only render the table, into the README too.")
    ] = False,
) -> None:
    """Runs what is missing, or renders the table."""
    if table:
        quality_table.publish(output)
        return
    every = [str(fold) for fold in range(outer)]
    numbers = _chosen(folds, every, "--folds") if folds else every
    cells = [
        Cell(task, repeat, int(fold), method)
        for repeat, fold, task, method in product(
            range(repeats),
            numbers,
            _chosen(tasks, [*STEEL_TASKS, *OWN], "--tasks"),
            _chosen(methods, list(METHODS), "--methods"),
        )
    ]
    if space is not None and output == PUBLISHED:
        raise OptionError(
            "--space: the published table is of the tasks' own spaces; name another --output"
        )
    settings = Settings(trials, max_epochs, inner, seed, threads, rivals_python, space)
    output.mkdir(parents=True, exist_ok=True)
    with run_lock(output / ".quality.lock"):
        for line in run(cells, settings, outer, source, Store(output), redo=redo):
            print(line, flush=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except TuneSteelError as error:
        print(f"quality: {error}", file=sys.stderr)
        sys.exit(2)
