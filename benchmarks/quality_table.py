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
    "without try: ensemble": "tune_steel without `[[try]]`: ensemble",
    "without try: bagged": "tune_steel without `[[try]]`: bagged",
    "without try: tuned": "tune_steel without `[[try]]`: tuned",
    "boosting": "scikit-learn boosting default",
    "reference": "the reference solution's recipe",
}
_ENOUGH = 5
"""Folds below which a difference gets no interval: with two of them it says next to nothing."""
_INTERVALS = (
    "The 95 % intervals are corrected for training rows that folds share (Nadeau & Bengio) and "
    f"given from {_ENOUGH} folds on; open is a difference whose interval holds 0"
)
_PLACE = ["repeat", "fold"]
_ENSEMBLES = {"ensemble": "as shipped", "without try: ensemble": "without `[[try]]`"}
_TUNED_BOOSTERS = ("LightGBM tuned", "XGBoost tuned", "CatBoost tuned")


def publish(folder: Path) -> None:
    """Puts the tables between their markers, short in the README, whole in docs/; prints them."""
    rows = pd.read_parquet(folder / "quality.parquet")
    for path, text in ((README, brief(rows)), (DOCUMENT, render(rows))):
        print(text)
        put(path, BEGIN, END, text)


def brief(rows: pd.DataFrame) -> str:
    """Tables of the steel table's tasks.

    For each repeat the methods that ran on all its folds of a task, and those that ran on a part
    of them, beside the final model on the same part; then the final model less each tuned booster.

    Args:
        rows: `quality.parquet`.
    """
    scored = rows[rows["error"].isna() & rows["task"].isin(STEEL_TASKS)]
    if scored.empty:
        return "Nothing was measured on the steel table."
    lines = [
        line
        for repeat in sorted(scored["repeat"].unique())
        for line in _repeat(repeat, scored[scored["repeat"] == repeat])
    ]
    tasks = scored["task"].unique()
    against = [line for task in tasks for line in _against(task, scored[scored["task"] == task])]
    if against:
        lines += [
            "",
            "The ensemble's scores, with and without `[[try]]`, minus those of each tuned "
            f"booster on the folds that both ran on. {_INTERVALS}:",
            "",
            row("task", "search", "booster", "folds", *(_SHOWN[name] for name in _COMPARED)),
            row("---", "---", "---", "---:", *["---:"] * len(_COMPARED)),
            *against,
        ]
    return "\n".join(lines)


def _repeat(repeat: int, scored: pd.DataFrame) -> Iterator[str]:
    """The methods on the outer folds of one repeat."""
    tasks = list(scored["task"].unique())
    folds = scored.groupby(["task", "method"]).size()
    most = folds.groupby("task").transform("max")
    whole, first = folds == most, scored.iloc[0]
    ran = sorted(set(most))
    final = set(
        scored.groupby("cell")["method"].first()
    )  # the others come with it, in its seconds
    stand_in = "; STAND-IN data" if (scored["data_source"] == "stand-in").any() else ""
    means = scored.groupby(["task", "method"])[[*_COMPARED, "seconds"]].mean()
    ranks = means[whole]["log_loss"].groupby("task").rank().groupby("method").mean()
    about = (
        f"means over {' or '.join(map(str, ran))} of {first['outer_folds']} outer folds "
        f"({first['trials']} trials, {first['threads']} CPUs, seed {first['seed']}{stand_in}); "
        "the lowest log-loss first, by the mean of its ranks:"
    )
    if repeat:
        yield ""
        yield f"The same with the rows cut into other outer folds (repeat {repeat}): {about}"
    else:
        yield (
            "Accuracy / balanced accuracy / log-loss, and seconds of the whole job (a run of "
            f"tune_steel's with its ensemble); {about}"
        )
    yield ""
    yield row("method", *tasks)
    yield row("---", *["---"] * len(tasks))
    for method in ranks.sort_values(kind="stable").index:
        cells = []
        for task in tasks:
            if not whole.get((task, method), False):
                cells.append("")
                continue
            mean = means.loc[(task, method)]
            seconds = f", {mean['seconds']:.0f} s" if method in final else ""
            cells.append(_scores(mean) + seconds)
        yield row(_TITLES.get(method, method), *cells)
    finals = scored[scored["method"].isin(final)]
    if parts := [line for task in tasks for line in _parts(task, finals, whole)]:
        yield ""
        yield "On a part of the folds, where the means above are no measure:"
        yield ""
        yield row("task", "method", "folds", "its scores", "the ensemble's on the same folds")
        yield row("---", "---", "---", "---", "---")
        yield from parts


def _scores(means: pd.Series[float]) -> str:
    return " / ".join(f"{means[name]:.3f}" for name in _COMPARED)


def _parts(task: str, scored: pd.DataFrame, whole: pd.Series[bool]) -> Iterator[str]:
    """A row for each final model that ran on some folds of a task only."""
    here = scored[scored["task"] == task]
    ours = here[here["method"] == "ensemble"]
    for name, theirs in here.groupby("method"):
        method = str(name)
        if whole[(task, method)]:
            continue
        same = ours.merge(theirs[_PLACE], on=_PLACE)
        if len(same) == len(theirs):
            scores = [_scores(part[[*_COMPARED]].mean()) for part in (theirs, same)]
            yield row(task, _TITLES.get(method, method), str(len(theirs)), *scores)


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
    for repeat in sorted(rows["repeat"].unique()):
        title = f"**{task}, repeat {repeat}**" if repeat else f"**{task}**"
        yield from _means(title, rows[rows["repeat"] == repeat])
    # Means of other folds are no measure of which one is the lowest.
    boosters = scored[scored["method"].isin(_TUNED_BOOSTERS)].groupby("method")["log_loss"]
    ranked = boosters.agg(["size", "mean"]).query(f"size == size.max() and size >= {_ENOUGH}")
    means = scored.groupby("method")["log_loss"].mean().sort_values()
    ours = next((name for name in _OURS if name in means.index), None)
    for rival in [*ranked.sort_values("mean").index[:1].astype(str), ours]:
        if rival is not None:
            yield from _differences(rival, list(means.index), scored)
    for cell, part in failed.groupby("cell", sort=False):
        folds = ", ".join(f"{r.repeat}/{r.fold}" for r in part.itertuples())
        yield f"- {cell} was not measured (repeat/fold {folds}): {part['error'].iloc[-1]}"
    if len(failed):
        yield ""


def _means(title: str, rows: pd.DataFrame) -> Iterator[str]:
    """Every method's mean scores on the folds of one repeat."""
    scored, first = rows[rows["error"].isna()], rows.iloc[0]
    stand_in = ", STAND-IN data" if (rows["data_source"] == "stand-in").any() else ""
    ran = rows.groupby("method").size().max()
    yield (
        f"{title}{stand_in}: means over {ran} of {first['outer_folds']} outer folds "
        f"({first['trials']} trials, {first['inner_folds']} inner folds, "
        f"{first['threads']} CPUs, seed {first['seed']})"
    )
    yield ""
    if scored.empty:
        return
    means = scored.groupby("method")[[*_SHOWN, "seconds"]].mean()
    means["folds"] = scored.groupby("method").size()
    yield row("method", "folds", *_SHOWN.values(), "seconds")
    yield row("---", *["---:"] * (len(_SHOWN) + 2))
    for method, mean in means.sort_values("log_loss").iterrows():
        scores = [f"{mean[name]:.3f}" for name in _SHOWN]
        yield row(str(method), f"{mean['folds']:.0f}", *scores, f"{mean['seconds']:.0f}")
    yield ""


def _differences(rival: str, methods: Sequence[str], scored: pd.DataFrame) -> Iterator[str]:
    """Paired differences to one method."""
    why = (
        ", the tuned booster with the lowest log-loss of those on most folds,"
        if rival in _TUNED_BOOSTERS
        else ""
    )
    rows = list(_paired(rival, methods, scored))
    if not rows:
        return
    yield (
        f"Each method's scores minus those of {rival}{why} on the folds that both ran on. "
        f"{_INTERVALS}:"
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
    theirs = scored[scored["method"] == rival].set_index(_PLACE)
    for method in methods:
        mine = scored[scored["method"] == method].set_index(_PLACE)
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
    verdict = "open" if low <= 0 <= high else "better" if (mean < 0) == lower else "worse"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}"
