"""The main job: search, retrain the best trial, score it on test, write the tables; and resume."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna

from tune_steel.errors import NonFiniteLossError, RunError, SearchFailedError
from tune_steel.evaluate import SEEDS, evaluate
from tune_steel.fit import prepare_process
from tune_steel.insight import insight_lines, study_insight
from tune_steel.options import Options
from tune_steel.problem import Problem, resolve
from tune_steel.ray_tune import ray_session, run_trials
from tune_steel.run_folder import RunFolder, make_folder, read_record
from tune_steel.samplers import grid
from tune_steel.scheduler import make_scheduler, rungs
from tune_steel.searcher import StudySearcher
from tune_steel.splits import Development, split_hash
from tune_steel.study import METRIC, SCORED, TrialRecord, ask, heal_journal, open_study, run_lock
from tune_steel.summary import evaluation_summary, render, search_summary
from tune_steel.terminal import say, show
from tune_steel.warm_start import Beginning, beginning

_EXIT_SIGNAL = {"SIGINT": 130, "SIGTERM": 143}
_FIRST_CONFIGS = 5


def run_search(options: Options) -> int:
    """Runs the whole job; returns the exit code.

    Raises:
        TuneSteelError: Something the user can mend.
        SearchFailedError: The search cannot go on, or every trial failed.
    """
    problem = resolve(options)
    for note in problem.notes:
        say(note)
    if options.dry_run:
        _dry_run(options, problem)
        return 0
    return run_problem(options, problem, make_folder(options.output, problem.task.name))


def run_problem(options: Options, problem: Problem, path: Path) -> int:
    """Runs the job on a resolved problem in an empty folder; returns the exit code.

    Raises:
        TuneSteelError: Something the user can mend.
        SearchFailedError: The search cannot go on, or every trial failed.
    """
    folder = RunFolder(path, options, problem)
    try:
        with run_lock(folder.journal):
            return _run(options, problem, folder)
    except BaseException:
        if not (folder.path / "run.json").exists():  # nothing has begun
            folder.journal.unlink(missing_ok=True)
            folder.path.rmdir()
        raise


def resume_search(
    path: Path,
    others: Mapping[str, Any],
    budget: Mapping[str, Any],
    resources: Mapping[str, Any],
) -> int:
    """Goes on with the run in a folder; returns the exit code.

    Args:
        path: The folder.
        others: Options that were given anew, as in `Options.resumed`.
        budget: The same of the budget.
        resources: The same of the resources.

    Raises:
        TuneSteelError: Something the user can mend.
        SearchFailedError: The search cannot go on, or every trial failed.
    """
    path = path.resolve()
    read_record(path)  # a folder of something else gets no lock
    with run_lock(path / "study.journal"):
        before = read_record(path)
        options = Options.from_dict(before["options"]).resumed(others, budget, resources)
        options.check()
        problem = resolve(options)
        folder = RunFolder(path, options, problem, before)
        folder.clean()
        healed = heal_journal(folder.journal)
        if healed:
            say(healed)
        return _run(options, problem, folder, before)


def _run(
    options: Options, problem: Problem, folder: RunFolder, before: Mapping[str, Any] | None = None
) -> int:
    """Searches while there is something to search, then evaluates."""
    study = _open(options, problem, folder, before)
    searcher = StudySearcher(
        problem.space,
        study,
        search=options.search,
        seed=options.seed,
        max_epochs=options.max_epochs,
        budget=options.budget,
        max_failures=options.max_failures,
    )
    if before is not None:
        say(
            f"resuming {folder.path}: {searcher.ended} of {searcher.samples} trials have ended, "
            f"{searcher.queued} are tried again"
        )
    if searcher.ended >= searcher.samples and before and before["state"] == "finished":
        say("all of them are scored: nothing to do; more --samples would go on")
        return 0
    try:
        if searcher.ended < searcher.samples:
            with ray_session(options.address, options.resources) as concurrency:
                _announce(options, problem, folder, searcher)
                folder.write_record(concurrency=concurrency)
                # Of the problem, the search gets what it may see.
                _search(options, searcher, problem.development, folder, concurrency)
        folder.write_trials(searcher.records)
        return _finish(options, problem, folder, searcher)
    except BaseException as error:
        if (folder.path / "run.json").exists():
            state = "cut short" if isinstance(error, KeyboardInterrupt) else "failed"
            _record_end(folder, state, f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            say(f"go on with --resume {folder.path}")
        raise


def _record_end(folder: RunFolder, state: str, error: str) -> None:
    """Says in `run.json` how the run ended; a full disk must not hide what ended it."""
    with suppress(OSError):
        folder.write_record(state=state, error=error)


def _open(
    options: Options, problem: Problem, folder: RunFolder, before: Mapping[str, Any] | None
) -> optuna.Study:
    """The study of the run, begun."""
    study = open_study(folder.journal, folder.record["run"])
    if study.user_attrs.get("begun"):
        return study
    if before is not None and before.get("trials"):
        raise RunError(
            f"{folder.journal}: it is empty, but run.json tells of trials; put a backup of it in "
            "its place"
        )
    first = beginning(options, problem.space, folder.record)
    for note in first.notes:
        say(note)
    os.truncate(folder.journal, 0)  # a process may have been killed while it did this
    study = open_study(folder.journal, folder.record["run"])
    begin(study, first)
    return study


def begin(study: optuna.Study, first: Beginning) -> None:
    """Puts into a new study what it begins with."""
    first.put(study)
    study.set_user_attr("begun", True)


def choose(records: list[TrialRecord], options: Options) -> TrialRecord | None:
    """The trial with the lowest validation loss among those that had a full chance.

    Candidates ran to their end, or were stopped by ASHA at its top rung. Where none did, because
    the search was cut short, those that the scheduler stopped earlier stand in.
    """
    top = options.max_epochs
    if options.scheduler == "asha":
        top = rungs(options.max_epochs, options.grace_period, options.reduction_factor)[-1]
    stopped = [r for r in records if r.state in SCORED]
    full = [r for r in stopped if r.state == "COMPLETE" or len(r.epochs) >= top]
    return min(full or stopped, key=lambda record: record.epochs[-1][METRIC], default=None)


def _search(
    options: Options,
    searcher: StudySearcher,
    development: Development,
    folder: RunFolder,
    concurrency: int,
) -> None:
    """Runs the trials and writes their tables, also when it is cut short."""
    scheduler = make_scheduler(
        options.scheduler, options.max_epochs, options.grace_period, options.reduction_factor
    )
    scheduler.refill(r for r in searcher.records if r.state in SCORED)
    # At one trial at once nobody waits for the sampler.
    searcher.background = options.search == "gp" and concurrency > 1
    started = time.monotonic()
    try:
        run_trials(
            searcher,
            scheduler,
            development,
            max_epochs=options.max_epochs,
            resources=options.resources,
            concurrency=concurrency,
        )
    except SearchFailedError as error:
        raise SearchFailedError(f"{error}; go on with --resume {folder.path}") from error
    finally:
        if not searcher.unwritable:
            folder.write_trials(searcher.records)
    stop = searcher.stop
    if stop.failed:
        raise SearchFailedError(
            f"the search ended because {stop.reason}; go on with --resume {folder.path}"
        )
    seconds = folder.record.get("search_seconds", 0.0) + time.monotonic() - started
    folder.write_record(
        state="searched",
        search_seconds=seconds,
        ended_by=stop.reason or "all samples have ended",
    )
    if stop.reason:
        say(
            f"the search ended because {stop.reason}; {searcher.ended} of {searcher.samples} "
            "trials have ended"
        )


def _finish(options: Options, problem: Problem, folder: RunFolder, searcher: StudySearcher) -> int:
    """Evaluates the best trial, writes everything, then prints it; returns the exit code."""
    records, signal = searcher.records, searcher.stop.signal
    best = choose(records, options)
    if best is None:
        return _nothing_to_score(folder, searcher)
    assert best.best is not None
    default = next((r for r in reversed(records) if r.slot == 0 and r.state in SCORED), None)
    say(
        f"retraining: {SEEDS} seeds of trial {best.number} for {best.best['epoch']} epochs, the "
        "default config, and boosting; then one look at the test rows; about "
        f"{_retraining_seconds(best, default, options.folds):.0f} s and the boosting"
    )
    started = time.monotonic()
    # As many threads as a trial had, so that the best trial's curve comes out bit for bit.
    prepare_process(options.resources.threads)
    # Counted before it is done: a run that is killed here may have seen them.
    looks = folder.record.get("looks_at_test", 0) + 1
    folder.write_record(looks_at_test=looks)
    try:
        evaluation = evaluate(
            best,
            default,
            problem.development,
            problem.sealed,
            options.seed,
            problem.table.source,
            "cuda" if options.resources.gpus_per_trial > 0 and options.address is None else "cpu",
        )
    except NonFiniteLossError as error:
        raise SearchFailedError(f"the best trial cannot be retrained: {error}") from error
    folder.write_evaluation(evaluation)
    seconds = time.monotonic() - started
    insight = study_insight(records, best, problem.space, options.max_epochs)
    folder.write_record(
        best_trial=best.number,
        insight=insight.as_dict(),
        evaluate_seconds=seconds,
        state="finished" if signal is None else "cut short",
    )
    report = (
        search_summary(records, best),
        *insight_lines(insight),
        *evaluation_summary(evaluation, problem.task.classes),
        *([_looked_before(looks)] if looks > 1 else []),
    )
    folder.write_report(render(*report, terminal=False))
    show(render(*report, terminal=sys.stdout.isatty()))
    show(f"\nresults: {folder.path}\n")
    _warn_of_stand_in(problem)
    if signal is not None:
        say(f"cut short: go on with --resume {folder.path}")
    return _EXIT_SIGNAL[signal] if signal else 0


def _looked_before(looks: int) -> str:
    return (
        f"This is look number {looks} of this run at its test rows. Whoever goes on with a search "
        "because of what the earlier look showed has chosen by a test score."
    )


def _retraining_seconds(best: TrialRecord, default: TrialRecord | None, folds: int) -> float:
    """What retraining takes, from what the trials took in the search."""
    out = 0.0
    for record in {r.number: r for r in (best, default) if r is not None}.values():
        assert record.best is not None
        folds_again = sum(row["seconds"] for row in record.epochs[: record.best["epoch"]])
        # Each of k folds trains on k - 1 of k parts of the rows, each seed on all of them.
        seeds = folds_again * SEEDS / max(folds - 1, 1)
        out += seeds + (folds_again if record is best else 0.0)
    return out


def _nothing_to_score(folder: RunFolder, searcher: StudySearcher) -> int:
    """Says why there is no best trial."""
    failures = [record for record in searcher.records if record.state == "FAIL"]
    why = f"; {len(failures)} failed, the first one with {failures[0].error}" if failures else ""
    reason, signal = searcher.stop.reason, searcher.stop.signal
    if reason is not None:
        folder.write_record(state="cut short")
        say(f"ended before any trial could be scored, because {reason}{why}; {folder.path}")
        return _EXIT_SIGNAL[signal] if signal else 1
    raise SearchFailedError(
        f"every trial failed ({len(failures)}); the first one with {failures[0].error}; "
        f"all of them: {folder.path / 'trials.parquet'}"
    )


def _announce(
    options: Options, problem: Problem, folder: RunFolder, searcher: StudySearcher
) -> None:
    splits, schema = problem.splits, problem.development.schema
    columns = len(schema.numeric) + len(schema.categorical)
    say(
        f"{problem.task.name}: {len(problem.task.y)} rows ({problem.table.source}), "
        f"{len(problem.task.classes)} classes, {columns} features; "
        f"{len(splits.development)} rows to search on, {len(splits.test)} test rows kept apart"
    )
    replicas = f"{options.folds} folds" if options.folds > 1 else "one validation split"
    say(
        f"{searcher.samples} trials of at most {options.max_epochs} epochs, {replicas}, "
        f"space {problem.space.name}, seed {options.seed}; results in {folder.path}"
    )
    if options.budget.seconds is not None:
        say("the time budget is the search's; retraining and scoring come after it")
    _warn_of_stand_in(problem)


def _warn_of_stand_in(problem: Problem) -> None:
    if problem.table.source == "stand-in":
        say("STAND-IN data: these scores say nothing about real steel plates")


def _dry_run(options: Options, problem: Problem) -> None:
    """Prints the resolved space, the splits and the first configs; trains nothing."""
    splits, task, space = problem.splits, problem.task, problem.space
    stops = rungs(options.max_epochs, options.grace_period, options.reduction_factor)
    folds = ", ".join(f"{len(train)}+{len(val)}" for train, val in splits.folds)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    first = beginning(options, space, RunFolder(options.output, options, problem).record)
    for note in first.notes:
        say(note)
    begin(study, first)
    fixed = dict(enumerate(grid(space, options.seed))) if options.search == "grid" else None
    configs = [
        ask(study, space, options.search, options.seed, fixed)[1]
        for _ in range(min(_FIRST_CONFIGS, options.budget.samples, len(fixed or range(99))))
    ]
    lines = [
        f"data: {problem.table.source}, {len(problem.table.frame)} rows",
        f"task: {task.name}; classes: {', '.join(task.classes)}",
        f"splits: train {len(splits.train)}, val {len(splits.val)}, test {len(splits.test)} "
        f"(test hash {split_hash(task.rows[splits.test])[:12]}); folds: {folds}",
        {
            "asha": f"ASHA may stop trials after epochs {', '.join(map(str, stops))} of "
            f"{options.max_epochs}",
            "median": f"the median rule may stop trials from epoch {options.grace_period} of "
            f"{options.max_epochs}",
            "none": f"no trial is stopped before epoch {options.max_epochs}",
        }[options.scheduler],
        f"space {space.name}:",
        *(f"  {key} = {json.dumps(v)}" for key, v in sorted(space.as_dict().items())),
        "first configs:",
        *(f"  {record.slot}: {json.dumps(record.params)}" for record in configs),
    ]
    show("\n".join(lines) + "\n")
    _warn_of_stand_in(problem)
