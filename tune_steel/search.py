"""The command line: `python -m tune_steel.search`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from tune_steel.errors import OptionError, SearchFailedError, TuneSteelError
from tune_steel.terminal import replace_closed_streams, say

# Imports that take seconds (torch, Ray, pandas) wait until the options are known to be possible.

EXIT_USAGE = 2
EXIT_CUT_SHORT = 130

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def search(
    context: typer.Context,
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
    scheduler: Annotated[
        Literal["asha", "median", "none"], typer.Option(help="What stops bad trials early.")
    ] = "asha",
    search: Annotated[
        Literal["tpe", "random", "gp", "grid"],
        typer.Option(help="How configs are found; grid is for spaces without floats."),
    ] = "tpe",
    time_budget: Annotated[
        str | None, typer.Option(help="Ends the search after 90s, 10m or 1h30m.")
    ] = None,
    epochs_budget: Annotated[
        int | None, typer.Option(help="Ends the search after so many epochs of all trials.")
    ] = None,
    until_stalled: Annotated[
        int | None, typer.Option(help="Ends the search when so many trials found nothing better.")
    ] = None,
    max_failures: Annotated[
        int, typer.Option(help="How often a config is tried again when its worker dies.")
    ] = 2,
    give_up_after: Annotated[
        int, typer.Option(help="Ends the search when so many trials in a row failed.")
    ] = 10,
    memory: Annotated[
        str | None,
        typer.Option(help="What a trial may allocate, like 2GB.", show_default="no limit"),
    ] = None,
    epoch_timeout: Annotated[
        str, typer.Option(help="A worker whose epoch takes longer is given up.")
    ] = "15m",
    warm_start: Annotated[
        list[Path] | None,
        typer.Option(help="An earlier run's folder or trials.parquet; may be given again."),
    ] = None,
    try_: Annotated[
        list[str] | None,
        typer.Option("--try", help="A config to try first, as JSON: '{\"optimizer.lr\": 0.003}'."),
    ] = None,
    threshold: Annotated[
        Literal["none", "balanced", "f1"],
        typer.Option(
            help="Two classes: chooses the ensemble's decision threshold out of fold, for "
            "balanced accuracy or for the F1 of the second class; none is 0.5."
        ),
    ] = "none",
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
            help="A Ray cluster to join, host:port or auto; local is a private Ray.",
            show_default="local",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder; it has to stay the same search."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print space, splits and first configs; run nothing.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print at the end where the time went.")
    ] = False,
) -> int:
    """Search the best networks for a table, make an ensemble, score it once on unseen rows."""
    from tune_steel.budget import Budget
    from tune_steel.options import (
        Options,
        Resources,
        default_grace_period,
        parse_duration,
        parse_memory,
    )

    budget: dict[str, Any] = {
        "samples": samples,
        "seconds": parse_duration("--time-budget", time_budget) if time_budget else None,
        "epochs": epochs_budget,
        "stalled": until_stalled,
        "give_up_after": give_up_after,
    }
    resources: dict[str, Any] = {
        "cpus_per_trial": cpus_per_trial,
        "gpus_per_trial": gpus_per_trial,
        "concurrency": concurrency,
        "memory": parse_memory("--memory", memory) if memory else None,
        "epoch_timeout": parse_duration("--epoch-timeout", epoch_timeout),
    }
    others: dict[str, Any] = {
        "task": task,
        "data": data,
        "target": target,
        "openml_id": openml_id,
        "source": source,
        "folds": folds,
        "split": split,
        "space": space,
        "max_epochs": max_epochs,
        "grace_period": default_grace_period(max_epochs) if grace_period is None else grace_period,
        "reduction_factor": reduction_factor,
        "scheduler": scheduler,
        "search": search,
        "max_failures": max_failures,
        "warm_start": tuple(warm_start or ()),
        "tries": tuple(try_ or ()),
        "threshold": threshold,
        "seed": seed,
        "output": output,
        "address": address,
        "dry_run": dry_run,
        "profile": profile,
    }
    if resume is not None:
        given = {
            _FIELDS.get(name, name)
            for name in context.params
            if (origin := context.get_parameter_source(name)) and origin.name == "COMMANDLINE"
        }
        for option in ("output", "dry_run"):
            if option in given:
                raise OptionError(
                    f"--{option.replace('_', '-')}: a run is resumed in its own folder; leave the "
                    "option out"
                )
        from tune_steel.job import resume_search

        anew = (
            {name: value for name, value in group.items() if name in given}
            for group in (others, budget, resources)
        )
        return _unless_interrupted(lambda: resume_search(resume, *anew))
    options = Options(budget=Budget(**budget), resources=Resources(**resources), **others)
    options.check()
    from tune_steel.job import run_search

    return _unless_interrupted(lambda: run_search(options))


def _unless_interrupted(job: Callable[[], int]) -> int:
    """The job's exit code; Typer would end an interrupted one without a word."""
    try:
        return job()
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_CUT_SHORT


_FIELDS = {
    "try_": "tries",
    "time_budget": "seconds",
    "epochs_budget": "epochs",
    "until_stalled": "stalled",
}
"""Options that are called otherwise in `Options`."""


def main() -> None:
    """The `tune-steel` command."""
    replace_closed_streams()
    if not sys.platform.startswith("linux"):
        say("error: tune_steel needs Linux; on Windows that is WSL, on a Mac a container")
        sys.exit(EXIT_USAGE)
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
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # or the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    main()
