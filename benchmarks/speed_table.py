"""The speed benchmarks' tables, in Markdown, from the rows of their files.

`python -m benchmarks.speed table` puts the published ones into the README.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.page import put, row
from benchmarks.quality_in_time import AUTOGLUON, LIGHTGBM, OURS, at

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: benchmarks/speed_table.py -->", "<!-- end of speed -->"
TITLES = {
    OURS: "tune_steel",
    "ray": "Ray Tune's documented script",
    "optuna": "plain Optuna, processes",
    "syne": "Syne Tune, local backend",
    LIGHTGBM: "LightGBM tuned by Optuna",
    AUTOGLUON: "AutoGluon",
}
_COLUMNS = {
    "trials_per_minute": ("trials / min", 1),
    "epochs_per_minute": ("epochs / min", 0),
    "wall_s": ("whole process, s", 0),
    "peak_mb": ("peak MB", 0),
    "target_s": ("to the target, s", 0),
    "judged_loss": ("loss on other folds", 4),
}
_LOOPS = {
    "reference": "reference's loop",
    "plain": "plain loop",
    "stacked": "tune_steel",
    "mkl": "without oneDNN",
    "floor": "its training's matmuls alone",
}
_SHARES = (1 / 4, 1 / 2, 1.0, 5 / 4)


def publish(searches_file: Path, in_time_file: Path, epochs_file: Path) -> None:
    """Puts the tables between their markers in the README; prints them."""
    tables = ((searches, searches_file), (in_time, in_time_file), (epochs, epochs_file))
    text = "\n\n".join(table(pd.read_parquet(file)) for table, file in tables)
    print(text)
    put(README, BEGIN, END, text)


def searches(rows: pd.DataFrame) -> str:
    """A table for each number of folds in `speed.parquet`."""
    parts = [_search(part) for _, part in rows.groupby("folds", sort=False)]
    return "\n".join(line for part in parts for line in part).strip()


def _search(rows: pd.DataFrame) -> Iterator[str]:
    """One table for a number of folds: medians, and the ends of what was seen."""
    first = rows.iloc[0]
    folds = "one validation split" if first["folds"] == 1 else f"{first['folds']} folds"
    repeats = rows["repeat"].nunique()
    yield (
        f"**{folds}**: {first['samples']} trials of at most {first['max_epochs']} epochs, "
        f"{first['workers']} at once, {repeats} repeat{'s' if repeats > 1 else ''}"
        f"{_stand_in(rows)}; {first['machine']}"
    )
    yield ""
    yield row("method", *(title for title, _ in _COLUMNS.values()), "ours is")
    yield row("---", *["---:"] * (len(_COLUMNS) + 1))
    ours = rows[rows["method"] == OURS].set_index("repeat")["trials_per_minute"]
    for method in rows["method"].unique():
        mine = rows[(rows["method"] == method) & rows["note"].isna()]
        if mine.empty:
            continue
        cells = []
        for column, (_, digits) in _COLUMNS.items():
            values = mine[column].dropna().to_numpy(dtype=np.float64)
            missing = len(values) < len(mine)
            cells.append("-" if missing else _spread(values, digits))
        ratios = (ours / mine.set_index("repeat")["trials_per_minute"]).dropna().to_numpy()
        times = "" if method == OURS else f"{_spread(ratios, 1)} x"
        yield row(TITLES[method], *cells, times)
    yield ""
    for absent in rows[rows["note"].notna()].itertuples():
        yield f"- {TITLES[str(absent.method)]} was not measured: {absent.note}"


def in_time(rows: pd.DataFrame) -> str:
    """The lowest log-loss of each method at some times, from `quality_in_time.parquet`."""
    return "\n".join(_in_time(rows)).strip()


def _in_time(rows: pd.DataFrame) -> Iterator[str]:
    done = rows[rows["note"].isna()]
    most = rows["given_s"].max()
    yield (
        f"**Lowest out-of-fold log_loss** by seconds since the process began; each method was "
        f"given {most:.0f} s, AutoGluon (`best_quality`) also shares of it, a run each"
        f"{_stand_in(rows)}. The other two show the lowest of many trials on these folds, which "
        "flatters them; AutoGluon did not see the folds"
    )
    yield ""
    yield row("method", *(f"{most * share:.0f} s" for share in _SHARES))
    yield row("---", *["---:"] * len(_SHARES))
    for method in done["method"].unique():
        cells = []
        for share in _SHARES:
            found = [
                at(part, most * share)
                for _, part in done[done["method"] == method].groupby("repeat")
            ]
            known = [loss for loss in found if loss is not None]
            cells.append(f"{np.median(known):.4f}" if len(known) == len(found) else "-")
        yield row(TITLES[method], *cells)
    yield ""
    last = most * _SHARES[-1]
    for late in done[done["seconds"] > last].itertuples():
        yield (
            f"- {TITLES[str(late.method)]}, given {late.given_s:.0f} s, ended after "
            f"{late.seconds:.0f} s with {late.log_loss:.4f}"
        )
    for missing in rows[rows["note"].notna()].itertuples():
        yield f"- {TITLES[str(missing.method)]}, given {missing.given_s:.0f} s: {missing.note}"


def epochs(rows: pd.DataFrame) -> str:
    """What an epoch of all folds takes each loop, from `fit.parquet`."""
    first = rows.iloc[0]
    lines = [
        f"**An epoch of {first['folds']} folds** with its validation scores on one core, ms of "
        f"CPU time, median of {first['repeats']}{_stand_in(rows)}; {first['machine']}; as many "
        "single networks in the reference's loop (DataLoader, scores of each batch) and in a "
        "plain loop, one stacked network here; `neighbours` has the size of a config that a "
        "search of `binary` led to",
        "",
        row("network", *_LOOPS.values(), "reference is", "plain is"),
        row("---", *["---:"] * (len(_LOOPS) + 2)),
    ]
    for network, part in rows.groupby("network", sort=False):
        by_loop = part.set_index("loop")
        known = [by_loop["epoch_ms"].get(loop) for loop in _LOOPS]
        ours = by_loop.loc["stacked"]
        ratios = [ours["reference_over_epoch"], ours["plain_over_epoch"]]
        lines.append(
            row(
                str(network),
                *("-" if ms is None else f"{ms:.0f}" for ms in known),
                *("-" if pd.isna(ratio) else f"{ratio:.1f} x" for ratio in ratios),
            )
        )
    return "\n".join(lines)


def _stand_in(rows: pd.DataFrame) -> str:
    return ", STAND-IN data" if (rows["data_source"] == "stand-in").any() else ""


def _spread(values: np.ndarray, digits: int) -> str:
    """The median, and the lowest and highest where there are several."""
    middle = f"{np.median(values):.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ({values.min():.{digits}f}, {values.max():.{digits}f})"
