"""Schedulers and searchers, compared by the thousand on recorded learning curves.

    python -m tune_steel.search --task binary --space benchmarks/spaces/binary.toml \
        --search random --scheduler none --samples 300 \
        --output runs
    python -m benchmarks.simulate record --from runs/binary-...
    python -m benchmarks.simulate compare
    python -m benchmarks.simulate document

The first command trains random configs, each to its own end; `record` keeps their curves in
`benchmarks/curves/`, about a hundred kilobytes a task and no row of the data table. `compare`
plays searches over them with the scheduler and searcher classes of the product, called as Ray
Tune calls them, with two virtual workers whose epochs take the recorded time; only the training
is not done. `document` puts the published figures into `docs/defaults.md`.

Regret is the lowest loss of the whole curve of the trial that the product would choose by then,
minus the lowest of all recorded curves, in validation loss.

Replay compares schedulers. The recorded configs come in a random order, each once: nothing is
modelled, and all settings of one repeat have the same order. It ends when all configs have been
tried (`exhausted` is the share of the repeats in which they had): from there on a setting that
spends fewer epochs on a config is shown too bad.

Surrogate compares searchers, which ask for configs that were never trained: see `surrogate.py`.

What can be concluded: which scheduler finds the better ones of these configs for the same epochs;
which searcher does so on a function of about this shape and noise. What cannot: how much a
setting gains on another table, and by the surrogate small differences, because what the process
does not explain is drawn at random, so that no searcher can learn it, while some of it could be
learned. There `expected` is the regret of what the process expects of the chosen config, as if
all of the rest were luck; the truth lies between the two. The chosen trial counts with its own
curve, whose luck it was chosen for, as is usual with recorded curves; it is not a test score.
Intervals are over random orders and seeds, for the recorded configs as they are.
"""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from scipy.stats import t as student

from benchmarks.page import put
from benchmarks.surrogate import Curve, Surrogate
from benchmarks.virtual import BUDGETS, Mark, Setting, model, replay
from tune_steel.space import load_space
from tune_steel.tables import write_table

CURVES = Path(__file__).parent / "curves"
SPACES = Path(__file__).parent / "spaces"
PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "simulator.parquet"
PAGE = Path(__file__).parents[1] / "docs" / "defaults.md"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_CURVES = pa.schema(
    [
        pa.field("params", pa.string()),
        pa.field("val_loss", pa.list_(pa.float64())),
        pa.field("converged", pa.bool_()),
        pa.field("seconds", pa.float32()),
    ]
)
_RESULTS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("task", "part", "setting")),
        pa.field("epochs", pa.int32()),
        *(
            pa.field(name, pa.float64())
            for name in (
                *("regret", "se", "difference", "low", "high", "expected"),
                *("expected_difference", "expected_low", "expected_high", "trials", "exhausted"),
            )
        ),
        pa.field("repeats", pa.int32()),
    ]
)


def asha(grace: int, factor: int, **changed: Any) -> Setting:
    """ASHA with random search."""
    return Setting(f"asha {grace}/{factor}", grace=grace, factor=factor, **changed)


DEFAULT = asha(6, 3)
OTHER = asha(2, 3)
"""The best of the short replays."""

LEAST_SPEARMAN = 0.6

REPLAYED = [
    DEFAULT,
    Setting("none", "none"),
    Setting("median 6", "median"),
    *(asha(g, f) for g in (1, 2, 3, 6, 9, 17) for f in (2, 3, 4) if (g, f) != (6, 3)),
    Setting("asha 6/3 on the epoch's own loss", metric="val_loss"),
]

_ALONE: dict[str, Any] = {"multivariate": False}
_TPE: dict[str, dict[str, Any]] = {
    "tpe": {},
    "tpe, multivariate": {"multivariate": True},
    "tpe, multivariate, grouped": {"multivariate": True, "group": True},
    "tpe, 20 start-up trials": {**_ALONE, "n_startup_trials": 20},
    "tpe, 40 start-up trials": {**_ALONE, "n_startup_trials": 40},
    "tpe, 64 candidates": {**_ALONE, "n_ei_candidates": 64},
    "tpe, no constant liar": {**_ALONE, "constant_liar": False},
}


def modelled() -> list[Setting]:
    """What is compared on the surrogate, the default first."""
    mine: dict[str, Any] = {"grace": DEFAULT.grace, "factor": DEFAULT.factor}
    other: dict[str, Any] = {"grace": OTHER.grace, "factor": OTHER.factor}
    return [
        *(Setting(f"{n}, {DEFAULT.name}", search="tpe", tpe=o, **mine) for n, o in _TPE.items()),
        Setting(f"random, {DEFAULT.name}", **mine),
        Setting(f"tpe, {OTHER.name}", search="tpe", **other),
        Setting(f"random, {OTHER.name}", **other),
        Setting("tpe, none", "none", search="tpe"),
        Setting("random, none", "none"),
    ]


@app.command()
def record(
    folder: Annotated[Path, typer.Option("--from", help="A finished run without a scheduler.")],
    output: Annotated[Path, typer.Option(help="Where the table is written.")] = CURVES,
) -> None:
    """Keeps the curves of a run's trials, in the order of the trials."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    losses: dict[int, list[tuple[int, float, float]]] = {}
    columns = ["trial", "epoch", "val_loss", "seconds"]
    for row in pq.read_table(folder / "epochs.parquet", columns=columns).to_pylist():
        losses.setdefault(row["trial"], []).append((row["epoch"], row["val_loss"], row["seconds"]))
    rows = []
    left_out = 0
    for trial in pq.read_table(folder / "trials.parquet").to_pylist():
        if trial["state"] != "COMPLETE":
            left_out += 1
            continue
        epochs = sorted(losses[trial["trial"]])
        params = {key: v for key, v in trial.items() if "." in key and v is not None}
        rows.append(
            {
                "params": json.dumps(params),
                "val_loss": [round(loss, 6) for _, loss, _ in epochs],
                # Nothing else ends a trial before its last epoch.
                "converged": len(epochs) < run["options"]["max_epochs"],
                "seconds": float(np.mean([seconds for _, _, seconds in epochs])),
            }
        )
    about = {key: run[key] for key in ("run", "task", "space", "versions")}
    about |= {"max_epochs": run["options"]["max_epochs"], "folds": run["options"]["folds"]}
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{run['task']}.parquet"
    write_table(path, rows, _CURVES.with_metadata({"about": json.dumps(about)}))
    typer.echo(f"{path}: {len(rows)} curves; {left_out} trials were cut short and are left out")


def read_curves(path: Path) -> tuple[list[Curve], int]:
    """The recorded curves and the most epochs that they could have."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"about"])
    curves = [
        Curve(json.loads(r["params"]), tuple(r["val_loss"]), r["converged"], r["seconds"])
        for r in table.to_pylist()
    ]
    return curves, about["max_epochs"]


@app.command()
def compare(
    task: Annotated[list[str] | None, typer.Option(help="By default, all that are there.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="replay, surrogate or both.")] = None,
    repeats: Annotated[int, typer.Option(help="Of a setting on the surrogate.")] = 20,
    replays: Annotated[int, typer.Option(help="Of a setting in the replay.")] = 60,
    output: Annotated[Path, typer.Option(help="The table; other rows of it stay.")] = PUBLISHED,
) -> None:
    """Compares all settings and prints a table; each one is written as soon as it is done."""
    for name in task or sorted(path.stem for path in CURVES.glob("*.parquet")):
        space = load_space(SPACES / f"{name}.toml")
        curves, most = read_curves(CURVES / f"{name}.parquet")
        lowest = min(curve.final for curve in curves)
        if "replay" in (part or ["replay"]):
            play = partial(replay, space=space, curves=curves, max_epochs=most)
            _compare(name, "replay", REPLAYED, play, replays, lowest, output)
        if "surrogate" in (part or ["surrogate"]):
            surrogate = Surrogate(space, curves, most)
            quality = surrogate.quality(curves, DEFAULT.grace)
            typer.echo(f"{name}: surrogate " + _words(quality))
            if quality["spearman"] < LEAST_SPEARMAN:
                typer.echo(f"{name}: THE SURROGATE IS POOR; what it says of searchers is nothing")
            play = partial(model, space=space, surrogate=surrogate, max_epochs=most)
            _compare(name, "surrogate", modelled(), play, repeats, lowest, output)


@app.command()
def document() -> None:
    """Writes the published figures between the marks of the page."""
    for part in ("replay", "surrogate"):
        put(PAGE, f"<!-- {part} -->", "<!-- end -->", markdown(part))


def markdown(part: str) -> str:
    """The published regrets of a part, in thousandths: settings down, task and epochs across."""
    rows = [row for row in pq.read_table(PUBLISHED).to_pylist() if row["part"] == part]
    columns = list(dict.fromkeys((row["task"], row["epochs"]) for row in rows))
    heads = [f"{task} {epochs}" for task, epochs in columns]
    lines = ["| setting | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    cells = {(r["setting"], r["task"], r["epochs"]): r for r in rows}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        line = [setting]
        for column in columns:
            row = cells.get((setting, *column))
            line.append("" if row is None else _cell(row))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any]) -> str:
    """The regret with its standard error; in bold where it differs from the default's."""
    text = f"{1000 * row['regret']:.1f} ± {1000 * row['se']:.1f}"
    if row["low"] > 0 or row["high"] < 0:
        text = f"**{text}**"
    return text + (" *" if row["exhausted"] > 0.5 else "")


def _compare(
    task: str,
    part: str,
    settings: Sequence[Setting],
    play: Callable[..., list[Mark]],
    repeats: int,
    lowest: float,
    output: Path,
) -> None:
    """Plays all settings, the first one of which the others are compared with."""
    old = pq.read_table(output).to_pylist() if output.exists() else []
    old = [row for row in old if (row["task"], row["part"]) != (task, part)]
    rows: list[dict[str, Any]] = []
    default: list[list[Mark]] = []
    for setting in settings:
        started = time.monotonic()
        marks = [play(setting, repeat=repeat) for repeat in range(repeats)]
        default = default or marks
        found = summarize(marks, default, lowest)
        rows += [{"task": task, "part": part, "setting": setting.name, **row} for row in found]
        write_table(output, old + rows, _RESULTS)
        seconds = time.monotonic() - started
        print(f"{task} {part} {setting.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    typer.echo(_table(rows))


def summarize(
    marks: Sequence[Sequence[Mark]],
    default: Sequence[Sequence[Mark]],
    lowest: float,
    budgets: Sequence[int] = BUDGETS,
) -> Iterable[dict[str, Any]]:
    """A row for each budget.

    Args:
        marks: Of each repeat, at each budget.
        default: The same of the setting to compare with.
        lowest: The lowest of all recorded losses.
        budgets: Epochs.
    """
    for i, epochs in enumerate(budgets):
        mine = [repeat[i] for repeat in marks]
        theirs = [repeat[i] for repeat in default]
        loss, other = (np.array([m.loss for m in side]) for side in (mine, theirs))
        expected, others = (np.array([m.expected for m in side]) for side in (mine, theirs))
        difference, low, high = _interval(loss - other)
        expected_difference, expected_low, expected_high = _interval(expected - others)
        yield {
            "epochs": epochs,
            "regret": float(loss.mean() - lowest),
            "se": float(loss.std(ddof=1) / np.sqrt(len(loss))),
            "difference": difference,
            "low": low,
            "high": high,
            "expected": float(expected.mean() - lowest),
            "expected_difference": expected_difference,
            "expected_low": expected_low,
            "expected_high": expected_high,
            "trials": float(np.mean([m.trials for m in mine])),
            "exhausted": float(np.mean([m.exhausted for m in mine])),
            "repeats": len(mine),
        }


def _interval(differences: Any) -> tuple[float, float, float]:
    """The mean with its 95 % interval."""
    mean, count = float(differences.mean()), len(differences)
    half = float(student.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def _words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in values.items())


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Regrets and differences in thousandths."""
    out = []
    for epochs in sorted({row["epochs"] for row in rows}):
        out.append(f"{rows[0]['task']} {rows[0]['part']}, {epochs} epochs, in thousandths")
        for r in (row for row in rows if row["epochs"] == epochs):
            line = f"{r['setting']:38}{1000 * r['regret']:6.1f} ±{1000 * r['se']:4.1f}"
            line += _thousandths(r["difference"], r["low"], r["high"])
            if not np.isnan(r["expected"]):
                line += f"  expected {1000 * r['expected']:6.1f}"
                line += _thousandths(*(r[f"expected_{e}"] for e in ("difference", "low", "high")))
            line += f"{r['trials']:7.0f} trials"
            out.append(line + (f", {r['exhausted']:.0%} exhausted" if r["exhausted"] else ""))
        out.append("")
    return "\n".join(out)


def _thousandths(mean: float, low: float, high: float) -> str:
    return f"{1000 * mean:+7.1f} [{1000 * low:+6.1f},{1000 * high:+6.1f}]"


if __name__ == "__main__":
    app()
