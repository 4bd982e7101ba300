"""The nested benchmark's tables, in Markdown, from its published rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.page import put, row
from tune_steel.insight import corrected_interval
from tune_steel.tasks import STEEL_TASKS

ROOT = Path(__file__).parents[1]
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- quality: benchmarks/quality.py -->", "<!-- end of quality -->"
_SHOWN = {
    "accuracy": "accuracy",
    "macro_accuracy": "balanced",
    "macro_f1": "macro F1",
    "macro_precision": "macro precision",
    "log_loss": "log-loss",
    "auroc": "AUROC",
}
_COMPARED = ("accuracy", "macro_accuracy", "log_loss")
_OURS = ("ensemble", "bagged", "tuned")
"""The product's models; the first one that is there is what a user gets."""
_TITLES = {
    "ensemble": "**tune_steel: ensemble**",
    "bagged": "tune_steel: bagged",
    "tuned": "tune_steel: tuned",
    "default": "tune_steel: default config",
    "without try: ensemble": "tune_steel without placed configs: ensemble",
    "without try: bagged": "tune_steel without placed configs: bagged",
    "without try: tuned": "tune_steel without placed configs: tuned",
    "boosting": "scikit-learn boosting default",
}
_ENOUGH = 5
"""Folds below which a difference gets no interval: with two of them it says next to nothing."""
_ENSEMBLES = {"ensemble": "as shipped", "without try: ensemble": "without placed configs"}
_TUNED_BOOSTERS = ("LightGBM tuned", "XGBoost tuned", "CatBoost tuned")


def publish(folder: Path) -> None:
    """Puts the tables between their markers, short in the README, whole in docs/; prints them."""
    rows = pd.read_parquet(folder / "quality.parquet")
    for path, text in ((README, brief(rows)), (DOCUMENT, render(rows))):
        print(text)
        put(path, BEGIN, END, text)


def brief(rows: pd.DataFrame) -> str:
    """One table of the steel table's tasks, and the final model beside each tuned booster.

    Args:
        rows: `quality.parquet`.
    """
    scored = rows[rows["error"].isna() & rows["task"].isin(STEEL_TASKS)]
    if scored.empty:
        return "Nothing was measured on the steel table."
    tasks = list(scored["task"].unique())
    folds = scored.groupby(["task", "method"]).size()
    most = {task: int(folds[task].max()) for task in tasks}
    means = scored.groupby(["task", "method"])[[*_COMPARED]].mean()
    first = scored.iloc[0]
    of = f"{first['outer_folds']} outer folds"
    stand_in = "; STAND-IN data" if (scored["data_source"] == "stand-in").any() else ""
    lines = [
        f"Accuracy / balanced accuracy / log-loss, means over {of} ({first['trials']} trials, "
        f"seed {first['seed']}{stand_in}); where a method ran on fewer, their number is said:",
        "",
        row("method", *tasks),
        row("---", *["---"] * len(tasks)),
    ]
    ranks = means["log_loss"].groupby("task").rank().groupby("method").mean()
    # Who was not everywhere comes last: their means are of other rows.
    whole = scored.groupby("method").size() == sum(most.values())
    order = sorted(ranks.index, key=lambda method: (not whole[method], ranks[method]))
    for method in order:
        cells = []
        for task in tasks:
            if (task, method) not in means.index:
                cells.append("")
                continue
            count = int(folds[task, method])
            few = "" if count == most[task] == first["outer_folds"] else f" ({count})"
            scores = means.loc[(task, method)]
            cells.append(" / ".join(f"{scores[name]:.3f}" for name in _COMPARED) + few)
        lines.append(row(_TITLES.get(method, method), *cells))
    against = [line for task in tasks for line in _against(task, scored[scored["task"] == task])]
    if against:
        lines += [
            "",
            "The ensemble, and that of searches without placed configs, less each tuned "
            "booster on the folds that both have, with the corrected 95 % interval (Nadeau & "
            f"Bengio), from {_ENOUGH} folds on; a tie is one whose interval holds 0:",
            "",
            row("task", "search", "booster", "folds", *(_SHOWN[name] for name in _COMPARED)),
            row("---", "---", "---", "---:", *["---:"] * len(_COMPARED)),
            *against,
        ]
    return "\n".join(lines)


def _against(task: str, scored: pd.DataFrame) -> Iterator[str]:
    for rival in _TUNED_BOOSTERS:
        for method, folds, cells in _paired(rival, [*_ENSEMBLES], scored):
            yield row(task, _ENSEMBLES[method], rival, str(folds), *cells)


def render(rows: pd.DataFrame) -> str:
    """Every task's table.

    Args:
        rows: `quality.parquet`.
    """
    return "\n".join(
        line
        for task in rows["task"].unique()
        for line in _task(str(task), rows[rows["task"] == task])
    )


def _task(task: str, rows: pd.DataFrame) -> Iterator[str]:
    failed = rows[rows["error"].notna()]
    scored = rows[rows["error"].isna()]
    first = rows.iloc[0]
    stand_in = ", STAND-IN data" if (rows["data_source"] == "stand-in").any() else ""
    yield (
        f"**{task}**{stand_in}: means over outer folds of {first['outer_folds']} "
        f"({first['trials']} trials, {first['inner_folds']} inner folds, "
        f"{first['threads']} CPUs, seed {first['seed']})"
    )
    yield ""
    if len(scored):
        means = scored.groupby("method")[[*_SHOWN, "seconds"]].mean()
        means["folds"] = scored.groupby("method").size()
        means = means.sort_values("log_loss")
        ours = next((name for name in _OURS if name in means.index), None)
        boosters = [
            name
            for name in means.index
            if name in _TUNED_BOOSTERS and means["folds"][name] >= _ENOUGH
        ]
        against = [name for name in (*boosters[:1], ours) if name is not None]
        yield row("method", "folds", *_SHOWN.values(), "seconds")
        yield row("---", *["---:"] * (len(_SHOWN) + 2))
        for method, mean in means.iterrows():
            scores = [f"{mean[name]:.3f}" for name in _SHOWN]
            yield row(str(method), f"{mean['folds']:.0f}", *scores, f"{mean['seconds']:.0f}")
        yield ""
        for rival in against:
            yield from _differences(rival, list(means.index), scored)
    for cell, part in failed.groupby("cell", sort=False):
        folds = ", ".join(f"{r.repeat}/{r.fold}" for r in part.itertuples())
        yield f"- {cell} was not measured (repeat/fold {folds}): {part['error'].iloc[-1]}"
    if len(failed):
        yield ""


def _differences(rival: str, methods: Sequence[str], scored: pd.DataFrame) -> Iterator[str]:
    """Paired differences to one method."""
    why = ", the tuned booster with the lowest log-loss here," if rival in _TUNED_BOOSTERS else ""
    rows = list(_paired(rival, methods, scored))
    if not rows:
        return
    yield (
        f"Difference to {rival}{why} on the folds that both have, with the corrected 95 % "
        f"interval (Nadeau & Bengio), from {_ENOUGH} folds on; a tie is one whose interval holds "
        "0:"
    )
    yield ""
    yield row("method", "folds", *(_SHOWN[name] for name in _COMPARED))
    yield row("---", *["---:"] * (len(_COMPARED) + 1))
    for method, folds, cells in rows:
        yield row(method, str(folds), *cells)
    yield ""


def _paired(
    rival: str, methods: Sequence[str], scored: pd.DataFrame
) -> Iterator[tuple[str, int, list[str]]]:
    """Each method, its folds in common with the rival, and its differences, if these are two."""
    place = ["repeat", "fold"]
    theirs = scored[scored["method"] == rival].set_index(place)
    for method in methods:
        mine = scored[scored["method"] == method].set_index(place)
        both = mine.index.intersection(theirs.index)
        if method == rival or len(both) < 2:
            continue
        ratio = float(theirs["test_rows"].sum() / theirs["train_rows"].sum())
        cells = []
        for name in _COMPARED:
            gaps = (mine.loc[both, name] - theirs.loc[both, name]).to_numpy(dtype=np.float64)
            cells.append(_difference(gaps, ratio, lower=name == "log_loss"))
        yield method, len(both), cells


def _difference(gaps: np.ndarray, ratio: float, *, lower: bool) -> str:
    """A mean difference in words: better and worse only where the interval leaves 0 out."""
    mean = float(gaps.mean())
    if len(gaps) < _ENOUGH:
        return f"{mean:+.3f}"
    low, high = corrected_interval(gaps, ratio)
    verdict = "tie" if low <= 0 <= high else "better" if (mean < 0) == lower else "worse"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}"
