"""The text that a search ends with."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tune_steel.evaluate import Evaluation, Scored
from tune_steel.finalists import EnsembleFacts
from tune_steel.study import TrialRecord

_LABELS = {"default": "default config"}
_BESIDE = "bagged"
"""The model that the table of test scores leaves out: five do not fit."""
_COMPARED = ("log_loss", "accuracy", "macro_accuracy")

_WIDTH_WITHOUT_TERMINAL = 118
_MOST_CLASSES_SHOWN = 10
_NAMED = 3
_SAME_CURVE = 1e-9


def render(*parts: RenderableType, terminal: bool) -> str:
    """Text for a terminal of this width, or plain text that is wide enough for the tables."""
    text = io.StringIO()
    console = Console(
        file=text,
        highlight=False,
        markup=False,
        force_terminal=terminal,
        width=None if terminal else _WIDTH_WITHOUT_TERMINAL,
    )
    for part in parts:
        console.print(part)
    return text.getvalue()


def search_summary(records: list[TrialRecord], best: TrialRecord) -> str:
    """How the trials ended, and the chosen one."""
    states = Counter(record.state for record in records)
    epochs = sum(len(record.epochs) for record in records)
    ends = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    lines = [f"{len(records)} trials ({ends}), {epochs} epochs"]
    failed = Counter(record.error for record in records if record.state == "FAIL")
    lines += [f"  failed {count} times: {error}" for error, count in failed.most_common(3)]
    assert best.best is not None
    params = "  ".join(f"{key}={_short(value)}" for key, value in best.params.items())
    lines += [
        f"best: trial {best.number}, validation loss {best.best['val_loss']:.4f} "
        f"at epoch {best.best['epoch']} of {len(best.epochs)}",
        f"  {params}",
    ]
    return "\n".join(lines)


def evaluation_summary(
    evaluation: Evaluation, classes: tuple[str, ...]
) -> Iterator[RenderableType]:
    """Test scores beside validation scores, the confusion matrix, and what they can say."""
    first = evaluation.models[0]
    rows = len(evaluation.y)
    yield from evaluation.notes
    yield _ensemble_line(evaluation.ensemble)
    table = _table(f"Test scores on {rows} rows, 95 % interval")
    table.add_column("score", no_wrap=True)
    shown = [model for model in evaluation.models if model.name != _BESIDE]
    for model in shown:
        seeds = len(model.probabilities)
        averaged = f"\n{seeds} seeds averaged" if seeds > 1 else "\n"
        table.add_column(_label(model) + averaged, justify="right")
    for name in first.intervals:
        table.add_row(name, *(Text(model.intervals[name].said()) for model in shown))
    yield table
    if len(evaluation.models) > 1:
        yield _differences_table(evaluation.models[1:])
    if any(own.low is None for model in shown for own in model.intervals.values()):
        yield (
            "[-]: no draw of the test rows changes the score, as where no row is wrong; they are "
            "too few, or too easy, for an interval"
        )
    yield _validation_table(evaluation.models)
    yield _confusion_table(evaluation, classes)
    if (evaluation.reproduction_gap or 0) > _SAME_CURVE:
        yield (
            f"Training the best trial again gave a validation loss that differs by "
            f"{evaluation.reproduction_gap:.2g}, as another machine or device may; the "
            "out-of-fold predictions are those of this second training."
        )
    if evaluation.ensemble.threshold is not None:
        yield "The ensemble decides by its threshold, the other models by the likeliest class."
    yield (
        f"One test row is {100 / rows:.1f} points of accuracy. The ensemble is better or worse "
        "than another model where the interval of their difference leaves 0 out; another "
        "training set would give another difference. Validation losses chose the trials, so they "
        "flatter them; the test rows chose nothing. "
        + (
            "The validation scores of the ensemble and of bagged are cross-fitted: weights and "
            "calibrations were chosen on the other folds. "
            if evaluation.ensemble.cross_fitted
            else "The weights and calibrations of the ensemble and of bagged were fitted to the "
            "validation rows themselves, which flatters their validation scores further. "
        )
        + "`loss` favours models trained with class weights, `log_loss` models that know the "
        "classes' frequencies, as the ensemble, bagged and boosting do."
    )


def _label(model: Scored) -> str:
    return _LABELS.get(model.name, model.name)


def _ensemble_line(ensemble: EnsembleFacts) -> str:
    """Who is in it, the heaviest first."""
    used = sorted((m for m in ensemble.members if m.weight > 0), key=lambda m: -m.weight)
    who = ", ".join(f"trial {m.trial} ({m.family}) {m.weight:.2f}" for m in used)
    calibration, bias = ensemble.calibration, ""
    if calibration.bias is not None:
        bias = f", bias {min(calibration.bias):.2f} to {max(calibration.bias):.2f}"
    threshold = "" if ensemble.threshold is None else f", threshold {ensemble.threshold:.3f}"
    return (
        f"ensemble of {len(used)} of {len(ensemble.members)}: {who}; "
        f"temperature {calibration.temperature:.2f}{bias}{threshold}; out-of-fold "
        f"log_loss {ensemble.cross_fitted_log_loss:.4f}"
    )


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", min_width=len(title))


def _differences_table(others: list[Scored]) -> Table:
    table = _table("The ensemble's scores minus theirs, on the same draws of rows")
    table.add_column("model", no_wrap=True)
    for name in _COMPARED:
        table.add_column(name, justify="right")
    for model in others:
        cells = [Text(model.behind[name].said("+")) for name in _COMPARED]
        table.add_row(_label(model), *cells)
    return table


def _validation_table(models: list[Scored]) -> Table:
    table = _table("Validation scores, mean over the folds")
    table.add_column("score")
    for model in models:
        table.add_column(_label(model), justify="right")
    for name in models[0].intervals:
        table.add_row(name, *(f"{model.validation[name]:.3f}" for model in models))
    return table


def _confusion_table(evaluation: Evaluation, classes: tuple[str, ...]) -> RenderableType:
    if len(classes) > _MOST_CLASSES_SHOWN:
        return f"Confusion matrix of {len(classes)} classes: see test.confusion in run.json"
    intervals = len(classes) == 2
    title = "Confusion matrix of the ensemble on the test rows"
    table = _table(title + (", 95 % interval" if intervals else ""))
    table.add_column("true \\ predicted")
    for name in classes:
        table.add_column(Text(name), justify="right")
    low, high = evaluation.confusion_interval
    for i, name in enumerate(classes):
        cells = [
            f"{count} [{low[i, j]}, {high[i, j]}]" if intervals else str(count)
            for j, count in enumerate(evaluation.confusion[i])
        ]
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    return table


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def looked_before(looks: int, others: list[str]) -> Iterator[str]:
    """Warnings where the test rows have been opened before.

    Args:
        looks: Looks of this run, the present one included.
        others: Other runs that have opened the same rows.
    """
    if looks > 1:
        yield (
            f"This is look number {looks} of this run at its test rows. Whoever goes on with a "
            "search because of what the earlier look showed has chosen by a test score."
        )
    if others:
        named = ", ".join(others[-_NAMED:])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        yield (
            f"These test rows were opened before, by {named}{more}, in folders beside this run's. "
            "Whoever picks one of the runs, or changes a space, by their test scores has chosen "
            "by a test score: the one that is picked is flattered. Another --seed cuts other rows."
        )
