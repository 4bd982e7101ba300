"""Which networks of a member predict new rows best: those of its folds, or new ones on all rows.

    python -m benchmarks.refit results/<run> results/<run> ...

takes the heaviest members of finished runs and sees development rows only: each fold's validation
rows are held out once, the other rows are cut into as many folds again, and the members are
trained on those folds and on all of these rows, as a run does it. The weights and the calibration
come from the folds' out-of-fold predictions, for all three ways the same; what differs is which
networks predict the rows held out: `folds`, `all`, or the mean of `both`. The members were chosen
by a search that saw all development rows, which flatters all ways alike. The runs are of the
steel table and a task's own space; `TUNE_STEEL_DATA` names the table.

`results/published/refit.parquet` holds a row for each run, held fold and way. `folds` are two
seeds of each fold, `all` five seeds on all rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import typer

from benchmarks.page import put, row
from tune_steel.data import load_steel
from tune_steel.ensemble import combine
from tune_steel.features import Floats
from tune_steel.fit import prepare_process
from tune_steel.insight import corrected_interval
from tune_steel.loss import class_weights
from tune_steel.provenance import git_commit
from tune_steel.refit import Networks, Plan, Refit, member, refit, retrain, validation_rows
from tune_steel.scores import score
from tune_steel.space import load_space, spaces_folder
from tune_steel.splits import cut, freeze, prepare
from tune_steel.study import copy_of_study, read_records
from tune_steel.tables import write_table
from tune_steel.tasks import STEEL_TASKS, Task, steel_task

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "refit.parquet"
PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
BEGIN, END = "<!-- refit: benchmarks/refit.py -->", "<!-- end of refit -->"
SCORES = ("log_loss", "accuracy", "macro_accuracy", "auroc")
TITLES = {"folds": "the folds' networks", "all": "networks on all rows", "both": "both, averaged"}
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("run", "task", "data_source", "git_commit")),
        *(pa.field(name, pa.int32()) for name in ("fold", "members", "rows")),
        pa.field("networks", pa.string(), metadata={"doc": "folds, all, or both."}),
        *(pa.field(name, pa.float64()) for name in SCORES),
    ]
)


def measure(
    task: Task, held: int, plans: list[Plan], seed: int, folds: int
) -> list[dict[str, Any]]:
    """The rows of one held fold."""
    outer = freeze(task, seed=seed, split=task.split, folds=folds)
    train, val = outer.folds[held]
    inner = cut(task, train, val, seed=seed, validation=len(val), folds=folds)
    development, sealed, _ = prepare(task, inner)
    features, y = sealed.open()  # of development rows of the run
    positions, _ = validation_rows(development)
    out_of_fold: list[Floats] = []
    predicted: dict[str, list[Floats]] = {"folds": [], "all": [], "both": []}
    for plan in plans:
        *_, again = refit(plan, development, "cpu")
        *_, whole = retrain(plan, development, "cpu", seed=seed)
        assert isinstance(again, Refit)
        assert isinstance(whole, Networks)
        out_of_fold.append(again.probabilities())
        of_folds, of_all = (
            member(plan, networks, development).stacks(features).mean(axis=0)
            for networks in (again.networks, whole)
        )
        predicted["folds"].append(of_folds)
        predicted["all"].append(of_all)
        predicted["both"].append((of_folds + of_all) / 2)
    weights = np.stack([class_weights(plan.config, development) for plan in plans])
    combination = combine(np.stack(out_of_fold), development.y[positions], weights)
    rows = []
    for networks, p in predicted.items():
        scores = score(combination.apply(p), y, development.reference_weights)
        rows.append(
            {
                "networks": networks,
                "fold": held,
                "members": len(plans),
                "rows": len(y),
                **{name: scores[name] for name in SCORES},
            }
        )
    return rows


def plans_of(run: Path, record: dict[str, Any], most: int) -> list[Plan]:
    """The heaviest members of a run."""
    space = load_space(spaces_folder() / f"{record['task']}.toml")
    study = copy_of_study(run / "study.journal", record["run"])
    records = {r.number: r for r in read_records(study, space, record["options"]["seed"])}
    found = sorted(record["ensemble"]["members"], key=lambda m: -m["weight"])
    return [Plan.of(records[m["trial"]]) for m in found[:most] if m["weight"] > 0]


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    members: Annotated[int, typer.Option(help="Of each run, at most.", min=1)] = 5,
    output: Annotated[Path, typer.Option(help="The table.")] = PUBLISHED,
) -> None:
    """Measures, prints and publishes."""
    prepare_process(1)
    rows: list[dict[str, Any]] = []
    for run in runs:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if record["task"] not in STEEL_TASKS:
            raise typer.BadParameter(f"{run} is not a run of the steel table")
        table = load_steel()
        task = steel_task(table, record["task"])
        seed, folds = record["options"]["seed"], record["options"]["folds"]
        plans = plans_of(run, record, members)
        base = {
            "run": record["run"],
            "task": record["task"],
            "data_source": table.source,
            "git_commit": git_commit(),
        }
        for held in range(folds):
            rows += [{**base, **found} for found in measure(task, held, plans, seed, folds)]
            write_table(output, rows, SCHEMA)
            print(f"{record['run']}: fold {held + 1} of {folds}", flush=True)
    text = render(pd.read_parquet(output))
    print(text)
    if output == PUBLISHED:
        put(PAGE, BEGIN, END, text)


def render(rows: pd.DataFrame) -> str:
    """A table in Markdown: means over the held folds of each task, and one difference.

    Its 95 % interval is that of Nadeau & Bengio.
    """
    shown = ["log_loss", "accuracy", "macro_accuracy"]
    means = rows.groupby(["networks", "task"], sort=False)[shown].mean()
    tasks = rows["task"].unique()
    lines = [row("log-loss / accuracy / balanced", *tasks), row(*["---"] * (len(tasks) + 1))]
    for networks, title in TITLES.items():
        cells = [means.loc[(networks, task)] for task in tasks]
        lines.append(row(title, *(f"{a:.4f} / {b:.3f} / {c:.3f}" for a, b, c in cells)))
    ways = rows.pivot(index=["task", "fold"], columns="networks", values="log_loss")
    gaps = (ways["all"] - ways["folds"]).unstack("fold")
    found = [gaps.loc[task].dropna().to_numpy() for task in tasks]
    intervals = [(g.mean(), *corrected_interval(g, 1 / (len(g) - 1))) for g in found]
    cells = [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" for mean, low, high in intervals]
    lines.append(row("log-loss, all rows minus folds", *cells))
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
