"""Which few nearest-neighbours configs a search should try first, from tables other than ours.

    apt install r-cran-mlbench r-cran-kernlab
    python -m benchmarks.starts measure
    python -m benchmarks.starts document

A search tries the configs that its space places under `[[try]]` right after the default. They
should come from other tables than the one it is judged on: these are seven public tables of R's
packages mlbench and kernlab, at most `MOST_ROWS` rows of each. Random configs of the space's
nearest neighbours, others with about half of their values from published defaults, and two named
ones are trained on the development folds of every table. The portfolio is built greedily: each
config is the one that lowers the mean over the tables of the lowest regret most (Feurer et al.,
"Auto-Sklearn 2.0", 2022, arXiv 2007.04074). Those wider than `MOST_WIDTH` are too costly to place;
the one that the steel table led to is shown for comparison and is no candidate either.

A config's regret on a table is its validation loss over the lowest one there, in units of what
the median config has over it, at most 1. For a table that the portfolio has not seen there are
two witnesses: portfolios that were chosen without that table, and a second round that trains the
chosen ones again on other folds with other seeds. Class weights are a power of the inverse
frequencies here, so that they mean the same on every table.

`results/published/starts.parquet` holds a row for each round, table and config; a measurement
that was killed goes on.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.page import put, row
from tune_steel.config import LossConfig, TrialConfig
from tune_steel.data import Table, hash_frame
from tune_steel.features import Floats
from tune_steel.fit import Fit, prepare_process
from tune_steel.insight import corrected_interval
from tune_steel.provenance import git_commit
from tune_steel.seeds import derive, replica_seeds
from tune_steel.space import Leaf, Value, load_space, spaces_folder
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tables import write_table
from tune_steel.tasks import own_task

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "starts.parquet"
PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
BEGIN, END = "<!-- starts: benchmarks/starts.py -->", "<!-- end of starts -->"
R_LIBRARY = Path("/usr/lib/R/site-library")

TABLES = {
    "Vehicle": ("mlbench", "Class"),
    "Satellite": ("mlbench", "classes"),
    "Vowel": ("mlbench", "Class"),
    "PimaIndiansDiabetes": ("mlbench", "diabetes"),
    "Ionosphere": ("mlbench", "Class"),
    "spam": ("kernlab", "type"),
    "musk": ("kernlab", "Class"),
}
"""Package and target of each: numeric columns mostly, three of more than two classes."""

MOST_ROWS = 2000
"""As many as the steel table has, about."""

SIZE = 4
"""Configs of the portfolio: less than a tenth of a search of 50 trials."""

MOST_WIDTH = 128
"""Of a config that may be placed: an epoch of a wider one took twice as long, and the sampler
goes where the first good configs are."""

NAMED: dict[str, dict[str, Any]] = {
    # ModernNCA's defaults (Ye et al. 2024, arXiv 2407.03257), the embedding, scaling, smoothing
    # and rate of RealMLP (Holzmueller et al. 2024, arXiv 2407.04491).
    "published": {
        "model.blocks": 0,
        "model.width": 128,
        "model.dropout": 0.1,
        "model.embedding": "pbld",
        "model.embedding_width": 4,
        "model.frequency_scale": 0.1,
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-2,
        "optimizer.weight_decay": 2e-4,
        "loss.label_smoothing": 0.1,
        "preprocessing.scaling": "robust",
        "power": 0.5,
    },
    # What the steel table's own development rows led to, by hand.
    "steel": {
        "model.blocks": 0,
        "model.width": 128,
        "model.dropout": 0.0,
        "model.embedding": "pbld",
        "model.embedding_width": 4,
        "model.frequency_scale": 0.3,
        "loss.label_smoothing": 0.05,
        "optimizer.name": "adamw",
        "optimizer.lr": 4e-3,
        "optimizer.weight_decay": 1e-3,
        "schedule.plateau_factor": 0.3,
        "schedule.plateau_patience": 3,
        "preprocessing.scaling": "quantile",
        "power": 0.8,
    },
}

SCHEMA = pa.schema(
    [
        pa.field("round", pa.int32(), metadata={"doc": "1: all configs; 2: the portfolio again."}),
        *(pa.field(name, pa.string()) for name in ("table", "data_hash", "config", "params")),
        *(pa.field(name, pa.int32()) for name in ("rows", "folds", "epochs")),
        *(pa.field(name, pa.float64()) for name in ("val_loss", "log_loss", "accuracy")),
        pa.field("seconds", pa.float64()),
        pa.field("git_commit", pa.string()),
    ]
)

Start = Mapping[str, Value]
"""Parameters of the nearest neighbours, and `power`, that of the class weights."""


def candidates(count: int, seed: int) -> dict[str, Start]:
    """So many random configs of the family, every other one near the published, and the named."""
    space = load_space(spaces_folder() / "binary.toml")
    rng = random.Random(derive(seed, "starts"))

    def drawn(leaf: Leaf) -> Value:
        if leaf.key == "model.family":
            return "nca"
        if leaf.kind == "choices":
            return rng.choice(leaf.values)
        low, high = (float(value) for value in leaf.values)
        if leaf.kind == "int":
            return rng.randint(int(low), int(high))
        if leaf.log:
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        return rng.uniform(low, high)

    def whole(given: Start, choose: Callable[[Leaf], Value]) -> Start:
        params = space.sample(lambda leaf: given[leaf.key] if leaf.key in given else choose(leaf))
        params["power"] = given["power"] if "power" in given else rng.uniform(0, 1.5)
        del params["loss.pos_weight"]
        return params

    out: dict[str, Start] = {}
    for number in range(count):
        share = 0.5 * (number % 2)
        kept = {key: value for key, value in NAMED["published"].items() if rng.random() < share}
        out[f"{'near ' if share else ''}{number}"] = whole({**kept, "model.family": "nca"}, drawn)
    for name, given in NAMED.items():
        out[name] = whole({**given, "model.family": "nca"}, lambda leaf: leaf.default)
    return out


def config_of(start: Start, development: Development) -> TrialConfig:
    """The config on a table: its class weights follow from the frequencies."""
    power = float(start["power"])
    space = load_space(spaces_folder() / "binary.toml")
    params = {key: value for key, value in start.items() if key != "power"}
    config = space.config({**params, "loss.pos_weight": 1.0})
    smoothing = config.loss.label_smoothing
    if len(development.classes) == 2:
        negative, positive = development.reference_weights
        weight = float((positive / negative) ** power)
        loss = LossConfig(pos_weight=weight, label_smoothing=smoothing)
    else:
        loss = LossConfig(class_weight_power=power, label_smoothing=smoothing)
    return config.model_copy(update={"loss": loss})


@cache
def load(name: str, library: Path, seed: int, folds: int) -> tuple[Development, str]:
    """The development rows of a table, and the table's hash."""
    import pyreadr

    package, target = TABLES[name]
    (frame,) = pyreadr.read_r(str(library / package / "data" / f"{name}.rda")).values()
    frame = frame.sample(min(len(frame), MOST_ROWS), random_state=0).sort_index()
    frame = frame.reset_index(drop=True)
    categories = frame.select_dtypes("category").columns
    frame[categories] = frame[categories].astype(str)
    task = own_task(Table(name, frame, "file", hash_frame(frame), target), target)
    splits = freeze(task, seed=seed, split=task.split, folds=folds)
    development, _, _ = prepare(task, splits)
    return development, hash_frame(frame)


def train(
    job: tuple[int, str, str, Start], library: Path, seed: int, folds: int, epochs: int
) -> dict[str, Any]:
    """A row: the config's best epoch on the folds of a table."""
    number, name, config, start = job
    development, data_hash = load(name, library, seed, folds)
    began = time.monotonic()
    seeds = replica_seeds(derive(seed, "starts", number, name), folds)
    fit = Fit(config_of(start, development), development, development.folds, seeds)
    records = list(fit.epochs(epochs))
    best = min(records, key=lambda record: record.val_loss)
    return {
        "round": number,
        "table": name,
        "data_hash": data_hash,
        "config": config,
        "params": _text(start),
        "rows": len(development.y),
        "folds": folds,
        "epochs": len(records),
        "val_loss": best.val_loss,
        "log_loss": float(best.scores["log_loss"].mean()),
        "accuracy": float(best.scores["accuracy"].mean()),
        "seconds": time.monotonic() - began,
    }


def regret(rows: pd.DataFrame, scale: pd.DataFrame) -> pd.DataFrame:
    """Of each config [configs, tables], from the rows of a round.

    Args:
        rows: The round.
        scale: The round whose lowest and median losses are 0 and 1; of another round's own,
            lower losses are possible, and count as 0.
    """
    losses, of_scale = (
        part.pivot_table(index="config", columns="table", values="val_loss")
        for part in (rows, scale)
    )
    lowest, median = of_scale.min(), of_scale.median()
    out: pd.DataFrame = ((losses - lowest) / (median - lowest)).clip(0, 1)
    return out


def of_candidates(rows: pd.DataFrame) -> pd.DataFrame:
    """The regrets of the first round, of what a portfolio may hold: no wide ones, nor `steel`."""
    first = rows[rows["round"] == 1]
    params = first.drop_duplicates("config").set_index("config")["params"].map(json.loads)
    wide = [name for name, start in params.items() if start["model.width"] > MOST_WIDTH]
    return regret(first, first).drop(index=["steel", *wide])


def portfolio(regrets: pd.DataFrame, size: int) -> list[str]:
    """So many configs whose lowest regret, in the mean over the tables, is low; greedily."""
    chosen: list[str] = []
    for _ in range(size):
        rest = [str(name) for name in regrets.index if name not in chosen]
        means = {name: regrets.loc[[*chosen, name]].min().mean() for name in rest}
        chosen.append(min(rest, key=means.__getitem__))
    return chosen


def unseen(regrets: pd.DataFrame, size: int) -> Floats:
    """Lowest regret on each table of the portfolio that the other tables give [tables]."""
    of = {name: portfolio(regrets.drop(columns=name), size) for name in regrets.columns}
    return np.array([regrets.loc[chosen, name].min() for name, chosen in of.items()])


def of_random(regrets: pd.DataFrame, size: int) -> Floats:
    """Mean lowest regret on each table of so many configs, drawn without replacement [tables]."""
    count = len(regrets)
    ranks = np.arange(count)
    # The chance that the config of a rank is the lowest of those drawn.
    chances = np.array([math.comb(count - 1 - rank, size - 1) for rank in ranks])
    weights = chances / math.comb(count, size)
    lowest = (np.sort(regrets.to_numpy(), axis=0) * weights[:, np.newaxis]).sum(0)
    return np.asarray(lowest)


def measure(
    count: Annotated[int, typer.Option(help="Random configs.", min=1)] = 48,
    size: Annotated[int, typer.Option(help="Of the portfolio.", min=1)] = SIZE,
    folds: Annotated[int, typer.Option(min=2)] = 5,
    epochs: Annotated[int, typer.Option(min=1)] = 50,
    tables: Annotated[str, typer.Option(help="With commas.")] = ",".join(TABLES),
    library: Annotated[Path, typer.Option(help="Where R's packages lie.")] = R_LIBRARY,
    seed: Annotated[int, typer.Option()] = 0,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
    output: Annotated[Path, typer.Option(help="The table.")] = PUBLISHED,
) -> None:
    """Trains all configs on all tables, then the portfolio again."""
    starts, commit = candidates(count, seed), git_commit()
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist() if output.exists() else []
    names = list(starts)
    with ProcessPoolExecutor(workers, initializer=prepare_process, initargs=(1,)) as pool:
        for number in (1, 2):
            done = {(r["table"], r["config"], r["params"]) for r in rows if r["round"] == number}
            jobs = [
                (number, table, name, starts[name])
                for table in tables.split(",")
                for name in names
                if (table, name, _text(starts[name])) not in done
            ]
            cut = derive(seed, "round", number)
            waiting = [pool.submit(train, job, library, cut, folds, epochs) for job in jobs]
            for ended, future in enumerate(waiting, start=1):
                rows.append({**future.result(), "git_commit": commit})
                if ended % 10 == 0 or ended == len(jobs):
                    print(f"round {number}: {ended} of {len(jobs)}", flush=True)
                    write_table(output, rows, SCHEMA)
            chosen = portfolio(of_candidates(pd.DataFrame(rows)), size)
            names = list(dict.fromkeys([*chosen, *NAMED]))
    print(render(pd.read_parquet(output), size))


def _text(start: Start) -> str:
    return json.dumps(dict(start))


def render(rows: pd.DataFrame, size: int = SIZE) -> str:
    """The portfolio and the named configs in Markdown, then what portfolios are worth."""
    first, second = (rows[rows["round"] == number] for number in (1, 2))
    regrets, again = regret(first, first), regret(second, first)
    allowed = of_candidates(rows)
    chosen = portfolio(allowed, size)
    tables = [name for name in TABLES if name in regrets]
    lines = [row("regret on", *tables, "mean", "again"), row(*["---"] * (len(tables) + 3))]
    for title, names in [
        *((name, [name]) for name in dict.fromkeys([*chosen, *NAMED])),
        (f"the best of the {size}", chosen),
    ]:
        lowest = regrets.loc[names].min()
        cells = (f"{lowest[table]:.2f}" for table in tables)
        mean, anew = lowest.mean(), again.loc[names].min().mean()
        lines.append(row(title, *cells, f"{mean:.2f}", f"{anew:.2f}"))
    sizes = range(1, size + 1)
    lines += [
        "",
        row("mean lowest regret of", *(str(k) for k in sizes)),
        row(*["---"] * (size + 1)),
        row("random configs", *(f"{of_random(allowed, k).mean():.2f}" for k in sizes)),
        row(
            "a portfolio, on an unseen table", *(f"{unseen(allowed, k).mean():.2f}" for k in sizes)
        ),
        row("less random configs", *(_gain(allowed, k) for k in sizes)),
    ]
    return "\n".join(lines)


def _gain(regrets: pd.DataFrame, size: int) -> str:
    """Mean over the tables of what a portfolio is below random configs, with its t interval."""
    gaps = unseen(regrets, size) - of_random(regrets, size)
    low, high = corrected_interval(gaps, 0)
    return f"{gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def document() -> None:
    """Puts the published figures into docs/quality.md."""
    put(PAGE, BEGIN, END, render(pd.read_parquet(PUBLISHED)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(measure)
    app.command()(document)
    app()
