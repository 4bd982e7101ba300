"""The main job and its command line: search, retrain the best, score on test, write the tables."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.exceptions import TyperException

from tune_steel.errors import NonFiniteLossError, SearchFailedError, TuneSteelError
from tune_steel.terminal import say, show

if TYPE_CHECKING:
    from tune_steel.options import Options
    from tune_steel.problem import Problem
    from tune_steel.run_folder import RunFolder
    from tune_steel.searcher import TrialRecord
    from tune_steel.space import Space
    from tune_steel.splits import Development

# Imports that take seconds (torch, Ray, pandas) wait until the options are known to be possible.

EXIT_USAGE = 2
EXIT_CUT_SHORT = 130
_FIRST_CONFIGS = 5


def run_search(options: Options) -> int:
    """Runs the whole job; returns the exit code.

    Raises:
        TuneSteelError: Something the user can mend.
        SearchFailedError: Every trial failed.
    """
    from tune_steel.problem import resolve
    from tune_steel.ray_tune import ray_session
    from tune_steel.run_folder import RunFolder, make_folder

    problem = resolve(options)
    for note in problem.notes:
        say(note)
    if options.dry_run:
        _dry_run(options, problem)
        return 0
    folder = RunFolder(make_folder(options.output, problem.task.name), options, problem)
    with ExitStack() as stack:
        try:
            concurrency = stack.enter_context(ray_session(options.address, options.resources))
        except BaseException:
            folder.path.rmdir()  # still empty
            raise
        _announce(options, problem, folder)
        folder.write_record(concurrency=concurrency)
        try:
            # Of the problem, the search gets what it may see.
            records = _search(options, problem.space, problem.development, folder, concurrency)
            stack.close()  # Ray's processes end before the retraining begins
            return _finish(options, problem, folder, records)
        except BaseException as error:
            state = "cut short" if isinstance(error, KeyboardInterrupt) else "failed"
            folder.write_record(state=state, error=f"{type(error).__name__}: {error}")
            raise


def choose(records: list[TrialRecord], options: Options) -> TrialRecord | None:
    """The trial with the lowest validation loss among those that had a full chance.

    Candidates ran to their end, or were stopped at the top rung. Where none did, because the
    search was cut short, those that the scheduler stopped earlier stand in.
    """
    from tune_steel.scheduler import METRIC, rungs

    top = rungs(options.max_epochs, options.grace_period, options.reduction_factor)[-1]
    stopped = [r for r in records if r.state in ("COMPLETE", "PRUNED")]
    full = [r for r in stopped if r.state == "COMPLETE" or len(r.epochs) >= top]
    return min(full or stopped, key=lambda record: record.epochs[-1][METRIC], default=None)


def _search(
    options: Options,
    space: Space,
    development: Development,
    folder: RunFolder,
    concurrency: int,
) -> list[TrialRecord]:
    """Runs the trials and writes their tables, also when it is cut short."""
    from tune_steel.ray_tune import run_trials
    from tune_steel.searcher import StudySearcher, open_study

    study = open_study(folder.path / "study.journal", folder.path.name, options.seed)
    searcher = StudySearcher(space, study, options.seed, options.max_epochs)
    started = time.monotonic()
    try:
        run_trials(
            searcher,
            development,
            samples=options.samples,
            max_epochs=options.max_epochs,
            grace_period=options.grace_period,
            reduction_factor=options.reduction_factor,
            resources=options.resources,
            concurrency=concurrency,
        )
    except KeyboardInterrupt:
        pass  # what has ended is written and scored all the same
    finally:
        folder.write_trials(searcher.records)
    folder.write_record(state="searched", search_seconds=time.monotonic() - started)
    return searcher.records


def _ended(records: list[TrialRecord]) -> int:
    return sum(record.state != "INTERRUPTED" for record in records)


def _finish(
    options: Options, problem: Problem, folder: RunFolder, records: list[TrialRecord]
) -> int:
    """Evaluates the best trial, writes everything, then prints it; returns the exit code."""
    from tune_steel.evaluate import SEEDS, evaluate
    from tune_steel.fit import prepare_process
    from tune_steel.summary import evaluation_summary, render, search_summary

    finished = _ended(records) >= options.samples
    best = choose(records, options)
    if best is None:
        return _nothing_to_score(records, folder, finished=finished)
    assert best.best is not None
    say(
        f"retraining: {SEEDS} seeds of trial {best.number} for {best.best['epoch']} epochs, the "
        "default config, and boosting; then one look at the test rows"
    )
    started = time.monotonic()
    # As many threads as a trial had, so that the best trial's curve comes out bit for bit.
    prepare_process(options.resources.threads)
    try:
        evaluation = evaluate(
            best,
            next((record for record in records if record.number == 0), None),
            problem.development,
            problem.sealed,
            options.seed,
            problem.table.source,
            "cuda" if options.resources.gpus_per_trial > 0 and options.address is None else "cpu",
        )
    except NonFiniteLossError as error:
        raise SearchFailedError(f"the best trial cannot be retrained: {error}") from error
    folder.write_evaluation(evaluation)
    folder.write_record(
        best_trial=best.number,
        evaluate_seconds=time.monotonic() - started,
        state="finished" if finished else "cut short",
    )
    report = (
        search_summary(records, best),
        *evaluation_summary(evaluation, problem.task.classes),
    )
    folder.write_report(render(*report, terminal=False))
    show(render(*report, terminal=sys.stdout.isatty()))
    show(f"\nresults: {folder.path}\n")
    _warn_of_stand_in(problem)
    if not finished:
        say(f"cut short: {_ended(records)} of {options.samples} trials ended")
    return 0 if finished else EXIT_CUT_SHORT


def _nothing_to_score(records: list[TrialRecord], folder: RunFolder, *, finished: bool) -> int:
    """Says why there is no best trial."""
    failures = [record for record in records if record.state == "FAIL"]
    why = f"; {len(failures)} failed, the first one with {failures[0].error}" if failures else ""
    if not finished:
        folder.write_record(state="cut short")
        say(f"cut short before any trial could be scored{why}; results: {folder.path}")
        return EXIT_CUT_SHORT
    raise SearchFailedError(
        f"every trial failed ({len(failures)}); the first one with {failures[0].error}; "
        f"all of them: {folder.path / 'trials.parquet'}"
    )


def _announce(options: Options, problem: Problem, folder: RunFolder) -> None:
    splits, schema = problem.splits, problem.development.schema
    columns = len(schema.numeric) + len(schema.categorical)
    say(
        f"{problem.task.name}: {len(problem.task.y)} rows ({problem.table.source}), "
        f"{len(problem.task.classes)} classes, {columns} features; "
        f"{len(splits.development)} rows to search on, {len(splits.test)} test rows kept apart"
    )
    replicas = f"{options.folds} folds" if options.folds > 1 else "one validation split"
    say(
        f"{options.samples} trials of at most {options.max_epochs} epochs, {replicas}, "
        f"space {problem.space.name}, seed {options.seed}; results in {folder.path}"
    )
    _warn_of_stand_in(problem)


def _warn_of_stand_in(problem: Problem) -> None:
    if problem.table.source == "stand-in":
        say("STAND-IN data: these scores say nothing about real steel plates")


def _dry_run(options: Options, problem: Problem) -> None:
    """Prints the resolved space, the splits and the first configs; trains nothing."""
    import optuna

    from tune_steel.scheduler import rungs
    from tune_steel.searcher import ask, make_sampler
    from tune_steel.splits import split_hash

    splits, task = problem.splits, problem.task
    stops = rungs(options.max_epochs, options.grace_period, options.reduction_factor)
    folds = ", ".join(f"{len(train)}+{len(val)}" for train, val in splits.folds)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=make_sampler(options.seed))
    study.enqueue_trial(problem.space.defaults())
    first = [
        ask(study, problem.space, options.seed)[1]
        for _ in range(min(_FIRST_CONFIGS, options.samples))
    ]
    lines = [
        f"data: {problem.table.source}, {len(problem.table.frame)} rows",
        f"task: {task.name}; classes: {', '.join(task.classes)}",
        f"splits: train {len(splits.train)}, val {len(splits.val)}, test {len(splits.test)} "
        f"(test hash {split_hash(task.rows[splits.test])[:12]}); folds: {folds}",
        f"ASHA may stop trials after epochs {', '.join(map(str, stops))} of {options.max_epochs}",
        f"space {problem.space.name}:",
        *(f"  {key} = {json.dumps(v)}" for key, v in sorted(problem.space.as_dict().items())),
        "first configs:",
        *(f"  {record.number}: {json.dumps(record.params)}" for record in first),
    ]
    show("\n".join(lines) + "\n")
    _warn_of_stand_in(problem)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def search(
    task: Annotated[
        str | None, typer.Option(help="binary, multiclass or faults7 of the steel table.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Trials to run.")] = 200,
    data: Annotated[
        Path | None,
        typer.Option(help="The table: CSV, Parquet or ARFF. Also TUNE_STEEL_DATA, for --task."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The label column; makes --data a table of your own.")
    ] = None,
    openml_id: Annotated[
        int | None, typer.Option(help="An OpenML dataset as a table of your own.")
    ] = None,
    source: Annotated[
        Literal["auto", "openml", "stand-in"],
        typer.Option(
            help="Where the steel table comes from; auto is file, cache, OpenML, stand-in."
        ),
    ] = "auto",
    folds: Annotated[
        int, typer.Option(help="Folds a trial trains in lock-step; 1 is one validation split.")
    ] = 5,
    split: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Shares of train, validation and test.", metavar="TRAIN VAL TEST"),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="Search space, a TOML file like search_spaces/*.toml.")
    ] = None,
    max_epochs: Annotated[int, typer.Option(help="The most epochs of a trial.")] = 50,
    grace_period: Annotated[
        int | None,
        typer.Option(
            help="Epochs before ASHA may stop a trial.", show_default="a ninth of --max-epochs"
        ),
    ] = None,
    reduction_factor: Annotated[
        int, typer.Option(help="ASHA goes on with the best one in so many.")
    ] = 3,
    cpus_per_trial: Annotated[float, typer.Option(help="CPUs, and threads, of a trial.")] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option(help="GPUs of a trial; may be a fraction.")
    ] = 0.0,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Trials at once; say it on a cluster that grows.", show_default="as many as fit"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Every other seed is derived from it.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path(
        "results"
    ),
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster to join, host:port or auto.", show_default="a private Ray"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print space, splits and first configs; run nothing.")
    ] = False,
) -> int:
    """Search the best network for a table, retrain it, score it once on unseen test rows."""
    from tune_steel.options import Options, Resources, default_grace_period

    options = Options(
        task=task,
        samples=samples,
        data=data,
        target=target,
        openml_id=openml_id,
        source=source,
        folds=folds,
        split=split,
        space=space,
        max_epochs=max_epochs,
        grace_period=default_grace_period(max_epochs) if grace_period is None else grace_period,
        reduction_factor=reduction_factor,
        resources=Resources(cpus_per_trial, gpus_per_trial, concurrency),
        seed=seed,
        output=output,
        address=address,
        dry_run=dry_run,
    )
    options.check()
    return run_search(options)


def main() -> None:
    """The `tune-steel` command."""
    try:
        code = app(standalone_mode=False)
    except TuneSteelError as error:
        say(f"error: {error}")
        code = EXIT_USAGE
    except TyperException as error:
        say(f"error: {error.format_message()}")
        code = EXIT_USAGE
    except SearchFailedError as error:
        say(f"error: {error}")
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        code = EXIT_CUT_SHORT
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # or the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    main()
