"""The text that a search ends with."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from tune_steel.evaluate import Evaluation, Scored
from tune_steel.scores import Interval
from tune_steel.searcher import TrialRecord

_LABELS = {"tuned": "tuned", "default": "default config", "boosting": "boosting"}
_WIDTH_WITHOUT_TERMINAL = 118


def make_console() -> Console:
    """Standard output; wide enough for the table where there is no terminal to ask."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    return console


def print_search(console: Console, records: list[TrialRecord], best: TrialRecord | None) -> None:
    """How the trials ended, and the chosen one."""
    states = Counter(record.state for record in records)
    epochs = sum(len(record.epochs) for record in records)
    ends = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    console.print(f"{len(records)} trials ({ends}), {epochs} epochs")
    failed = Counter(record.error for record in records if record.state == "FAIL")
    for error, count in failed.most_common(3):
        console.print(f"  failed {count} times: {error}", markup=False)
    if best is None or best.best is None:
        return
    params = "  ".join(f"{key}={_short(value)}" for key, value in best.params.items())
    console.print(
        f"best: trial {best.number}, validation loss {best.best['val_loss']:.4f} "
        f"at epoch {best.best['epoch']} of {len(best.epochs)}"
    )
    console.print(f"  {params}", markup=False)


def print_evaluation(console: Console, evaluation: Evaluation, classes: tuple[str, ...]) -> None:
    """Test scores beside validation scores, the confusion matrix, and what they can say."""
    tuned = evaluation.models[0]
    rows = len(evaluation.y)
    seeds = len(tuned.probabilities)
    table = Table(title=f"Test scores on {rows} rows, 95 % interval", title_justify="left")
    table.add_column("score")
    for model in evaluation.models:
        averaged = f"\n{seeds} seeds averaged" if len(model.probabilities) > 1 else "\n"
        table.add_column(_LABELS[model.name] + averaged, justify="right", no_wrap=True)
        if model is tuned:
            table.add_column("tuned, one seed\nmean ± sd", justify="right", no_wrap=True)
    for name in tuned.intervals:
        cells = []
        for model in evaluation.models:
            cells.append(_interval(model.intervals[name]))
            if model is tuned:
                spread = model.seed_scores[name]
                cells.append(f"{spread.mean():.3f} ± {spread.std(ddof=1):.3f}")
        table.add_row(name, *cells)
    console.print(table)
    console.print(_validation_table(evaluation.models))
    console.print(_confusion_table(evaluation, classes))
    accuracy = tuned.intervals["accuracy"]
    console.print(
        f"One test row is {100 / rows:.1f} points of accuracy, and the tuned model's interval is "
        f"{100 * (accuracy.high - accuracy.low):.0f} points wide: smaller differences between the "
        "columns say nothing. Validation losses chose the trial, so they flatter it; the test "
        "rows chose nothing. `loss` favours models trained with class weights, `log_loss` models "
        "trained without, as boosting is.",
    )


def _validation_table(models: list[Scored]) -> Table:
    table = Table(title="Validation scores, mean over the folds", title_justify="left")
    table.add_column("score")
    for model in models:
        table.add_column(_LABELS[model.name], justify="right")
    for name in models[0].intervals:
        table.add_row(name, *(f"{model.validation[name]:.3f}" for model in models))
    return table


def _confusion_table(evaluation: Evaluation, classes: tuple[str, ...]) -> Table:
    table = Table(
        title="Confusion matrix of the tuned model on the test rows, 95 % interval"
        if len(classes) == 2
        else "Confusion matrix of the tuned model on the test rows",
        title_justify="left",
    )
    table.add_column("true \\ predicted")
    for name in classes:
        table.add_column(name, justify="right")
    low, high = evaluation.confusion_interval
    for i, name in enumerate(classes):
        cells = [
            f"{count} [{low[i, j]}, {high[i, j]}]" if len(classes) == 2 else str(count)
            for j, count in enumerate(evaluation.confusion[i])
        ]
        table.add_row(name, *(cell.replace("[", "\\[") for cell in cells))
    return table


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f} \\[{interval.low:.3f}, {interval.high:.3f}]"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
