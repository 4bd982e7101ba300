"""The main job: search, retrain the best trials, score on test, write the tables; and resume."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from tune_steel.errors import NonFiniteLossError, RunError, SearchFailedError
from tune_steel.options import Options
from tune_steel.problem import STAND_IN, Problem, announce, load, resolve, warn_of_stand_in
from tune_steel.profile import breakdown, process_age, profile_table
from tune_steel.ray_session import RaySession
from tune_steel.run_folder import (
    RunFolder,
    make_folder,
    other_looks,
    read_record,
    said_if_unwritable,
)
from tune_steel.splits import Development
from tune_steel.study import (
    SCORED,
    begin,
    has_begun,
    heal_journal,
    open_study,
    run_lock,
)
from tune_steel.terminal import say, show
from tune_steel.warm_start import beginning, check_beginning

if TYPE_CHECKING:
    from tune_steel.finalists import Finalists
    from tune_steel.searcher import StudySearcher

# The driver imports Ray Tune while Ray starts, and torch when the search has ended.

_EXIT_SIGNAL = {"SIGINT": 130, "SIGTERM": 143}


def run_search(options: Options) -> int:
    """Runs the whole job; returns the exit code.

    Raises:
        TuneSteelError: Something the user can mend.
        SearchFailedError: The search cannot go on, or every trial failed.
    """
    question = load(options)
    check_beginning(options, question.space)
    if options.dry_run:
        from tune_steel.dry_run import dry_run

        dry_run(options, resolve(options, question))
        return 0
    with RaySession(options.address, options.resources) as session:
        session.start()  # while the rows are cut: scikit-learn takes a second to import
        problem = resolve(options, question)
        folder = make_folder(options.output, problem.task.name)
        return run_problem(options, problem, folder, session)


def run_problem(options: Options, problem: Problem, path: Path, session: RaySession) -> int:
    """Runs the job on a resolved problem in an empty folder; returns the exit code.

    Raises:
        TuneSteelError: Something the user can mend.
        SearchFailedError: The search cannot go on, or every trial failed.
    """
    folder = RunFolder(path, options, problem)
    try:
        with said_if_unwritable(path), run_lock(folder.journal):
            return _run(options, problem, folder, session)
    except BaseException:
        if not (path / "run.json").exists():  # nothing has begun
            shutil.rmtree(path, ignore_errors=True)
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
    with said_if_unwritable(path), run_lock(path / "study.journal"):
        before = read_record(path)
        options = Options.from_dict(before["options"]).resumed(others, budget, resources)
        options.check()
        problem = resolve(options, load(options))
        folder = RunFolder(path, options, problem, before)
        folder.clean()
        healed = heal_journal(folder.journal)
        if healed:
            say(healed)
        # Ray is not started yet: there may be nothing left to run.
        with RaySession(options.address, options.resources) as session:
            return _run(options, problem, folder, session, before)


def _run(
    options: Options,
    problem: Problem,
    folder: RunFolder,
    session: RaySession,
    before: Mapping[str, Any] | None = None,
) -> int:
    """Searches while there is something to search, then evaluates."""
    study = _open(options, problem, folder, before)
    from tune_steel.searcher import StudySearcher

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
            f"resuming {folder.path}: {searcher.ended} of {searcher.samples} trials have "
            f"ended, {searcher.queued} are tried again"
        )
    if searcher.ended >= searcher.samples and before and before["state"] == "finished":
        if folder.is_whole():
            say("all of them are scored: nothing to do; more --samples would go on")
            return 0
        say("a result of it is missing or damaged: all are made again, with another look at test")
    try:
        concurrency = session.concurrency()
        if searcher.ended < searcher.samples:
            announce(options, problem, searcher.samples, folder.path)
            folder.write_record(concurrency=concurrency)
            # Of the problem, the search gets what it may see.
            _search(options, searcher, problem.development, folder, concurrency)
        with searcher.times.measure("tables"):
            folder.write_trials(searcher.records)
        finalists = _train_again(options, searcher, problem.development, folder, concurrency)
        session.end()
        return _finish(options, problem, folder, searcher, finalists)
    except BaseException as error:
        if (folder.path / "run.json").exists():
            # SIGTERM raises SystemExit while no trial runs.
            cut_short = isinstance(error, (KeyboardInterrupt, SystemExit))
            _record_end(
                folder, "cut short" if cut_short else "failed", f"{type(error).__name__}: {error}"
            )
            if cut_short:
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
    if has_begun(study):
        return study
    if before is not None and before.get("trials"):
        raise RunError(
            f"{folder.journal}: it is empty, but run.json tells of trials; put a backup of it in "
            "its place"
        )
    first = beginning(options, problem.space, folder.record)
    folder.record["notes"] = [*problem.notes, *first.notes]
    for note in folder.record["notes"]:
        say(note)
    os.truncate(folder.journal, 0)  # a process may have been killed while it did this
    study = open_study(folder.journal, folder.record["run"])
    begin(study, first.configs, first.trials)
    return study


def _search(
    options: Options,
    searcher: StudySearcher,
    development: Development,
    folder: RunFolder,
    concurrency: int,
) -> None:
    """Runs the trials and writes their tables, also when it is cut short."""
    from tune_steel.ray_tune import run_trials
    from tune_steel.scheduler import make_scheduler

    scheduler = make_scheduler(
        options.scheduler, options.max_epochs, options.grace_period, options.reduction_factor
    )
    scheduler.refill(r for r in searcher.records if r.state in SCORED)
    # At one trial at once nobody waits for the sampler.
    searcher.background = options.search == "gp" and concurrency > 1
    times = searcher.times
    times.start, times.slots = process_age(), concurrency
    try:
        with times.measure("search"):
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
            with times.measure("tables"):
                folder.write_trials(searcher.records)
    stop = searcher.stop
    if stop.failed:
        raise SearchFailedError(
            f"the search ended because {stop.reason}; go on with --resume {folder.path}"
        )
    folder.write_record(
        state="searched",
        search_seconds=folder.record.get("search_seconds", 0.0) + times.search,
        ended_by=stop.reason or "all samples have ended",
    )
    if stop.reason:
        say(
            f"the search ended because {stop.reason}; {searcher.ended} of {searcher.samples} "
            "trials have ended"
        )


def _train_again(
    options: Options,
    searcher: StudySearcher,
    development: Development,
    folder: RunFolder,
    concurrency: int,
) -> Finalists | None:
    """Trains members and rivals again; None where no trial has a score."""
    from tune_steel.choice import candidates, default_trial, members

    records = searcher.records
    ranked = candidates(records, options)
    if not ranked:
        return None
    import ray

    from tune_steel.ensemble import MEMBERS
    from tune_steel.finalists import train_finalists
    from tune_steel.ray_tune import train_again
    from tune_steel.refit import SEEDS, SEEDS_A_MEMBER, Plan, seconds_again

    plans = [Plan.of(record) for record in members(ranked, MEMBERS)]
    default = default_trial(records)
    rivals = [Plan.of(record) for record in (ranked[0], default) if record is not None]
    seconds = seconds_again(plans, rivals, len(development.folds), concurrency)
    say(
        f"retraining: the {len(plans)} best trials for the ensemble on the folds, with "
        f"{SEEDS_A_MEMBER} seeds; those with a weight in it, the best one and the default config "
        f"on all rows, with {SEEDS}; boosting; then one look at the test rows; at most about "
        f"{seconds:.0f} s and the boosting"
    )
    train = partial(
        train_again,
        rows=ray.put(development),
        resources=options.resources,
        max_failures=options.max_failures,
        concurrency=concurrency,
    )
    try:
        with searcher.times.measure("retraining"):
            return train_finalists(
                plans, rivals, development, options.seed, options.threshold, train
            )
    except (SearchFailedError, NonFiniteLossError) as error:
        raise SearchFailedError(f"{error}; go on with --resume {folder.path}") from error


def _finish(
    options: Options,
    problem: Problem,
    folder: RunFolder,
    searcher: StudySearcher,
    finalists: Finalists | None,
) -> int:
    """Evaluates what was refitted, writes everything, then prints it; returns the exit code."""
    from tune_steel.choice import choose, default_trial

    records, signal, times = searcher.records, searcher.stop.signal, searcher.times
    best = choose(records, options)
    if best is None or finalists is None:
        return _nothing_to_score(folder, searcher)
    from tune_steel.evaluate import evaluate
    from tune_steel.fit import prepare_process
    from tune_steel.insight import insight_lines, study_insight
    from tune_steel.summary import evaluation_summary, looked_before, render, search_summary

    # As many threads as a trial had: their number changes the last bits.
    prepare_process(options.resources.threads)
    # Counted before it is done: a run that is killed here may have seen them.
    looks = folder.record.get("looks_at_test", 0) + 1
    folder.write_record(
        looks_at_test=looks, looks_of_other_runs=other_looks(folder.path, folder.record)
    )
    with times.measure("test"):
        evaluation = evaluate(
            finalists,
            best,
            default_trial(records),
            problem.development,
            problem.sealed,
            seed=options.seed,
            data_source=problem.table.source,
        )
    with times.measure("tables"):
        folder.write_evaluation(evaluation)
    profile = breakdown(times)
    insight = study_insight(
        records,
        best,
        problem.space,
        options.max_epochs,
        adaptive=options.search in ("tpe", "gp"),
    )
    folder.write_record(
        best_trial=best.number,
        insight=insight.as_dict(),
        evaluate_seconds=times.retraining + times.test,
        profile=profile,
    )
    report = (
        *([STAND_IN] if problem.table.source == "stand-in" else []),
        *folder.record["notes"],
        search_summary(records, best),
        *insight_lines(insight),
        *evaluation_summary(evaluation, problem.task.classes),
        *looked_before(looks, folder.record["looks_of_other_runs"]),
    )
    folder.write_report(render(*report, terminal=False))
    folder.write_record(state="finished" if signal is None else "cut short")
    show(render(*report, terminal=sys.stdout.isatty()))
    if options.profile:
        show(render(profile_table(profile), terminal=sys.stdout.isatty()))
    show(f"\nresults: {folder.path}\n")
    warn_of_stand_in(problem)
    if signal is not None:
        say(f"cut short: go on with --resume {folder.path}")
    return _EXIT_SIGNAL[signal] if signal else 0


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
