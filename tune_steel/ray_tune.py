"""The trials of a study through Ray Tune, and what is trained again beside it."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import copy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import tune
from ray.exceptions import RayError, WorkerCrashedError
from ray.tune.execution import class_cache

from tune_steel.budget import Stop
from tune_steel.errors import SearchFailedError
from tune_steel.options import Resources
from tune_steel.progress import ProgressLine
from tune_steel.scheduler import KeepsReference
from tune_steel.searcher import ErrorKeeper, StopWhenTold, StudySearcher
from tune_steel.splits import Development
from tune_steel.terminal import say
from tune_steel.trainable import train_trial

if TYPE_CHECKING:
    from tune_steel.refit import Plan

T = TypeVar("T")

# Tune wants other environment variables for its workers than Ray has, so that each would be a new
# process, whose start waits for Ray's agent; `ray_environment` sets those that matter.
class_cache.DEFAULT_ENV_VARS.clear()
class_cache.ENV_VARS_TO_PROPAGATE.clear()


def run_trials(
    searcher: StudySearcher,
    scheduler: KeepsReference,
    development: Development,
    *,
    max_epochs: int,
    resources: Resources,
    concurrency: int,
) -> None:
    """Runs the trials that the searcher asks for, until it ends the search.

    Workers get the development rows and nothing else. Every trial of `searcher.records` has
    ended when this returns.
    """
    trainable = tune.with_resources(
        tune.with_parameters(
            train_trial,
            development=development,
            max_epochs=max_epochs,
            decisive=scheduler.decisive,
            threads=resources.threads,
            device="cuda" if resources.gpus_per_trial > 0 else "cpu",
            memory=resources.memory,
            epoch_timeout=resources.epoch_timeout,
        ),
        {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial},
    )
    progress = ProgressLine(searcher)
    with tempfile.TemporaryDirectory(prefix="tune_steel-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=-1,  # the searcher says when there are enough
                search_alg=searcher,
                scheduler=scheduler,
                max_concurrent_trials=concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                stop=StopWhenTold(searcher.stop, check_ray),
                callbacks=[ErrorKeeper(searcher), progress],
                # Retries are the searcher's: Tune would try again what a trial itself raised.
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            with signals_end(searcher.stop):
                tuner.fit()
        finally:
            searcher.close()
            progress.close()


def train_again(
    how: Callable[[Plan, Development, str], Iterator[T | None]],
    plans: Sequence[Plan],
    rows: ray.ObjectRef[Development],
    *,
    resources: Resources,
    max_failures: int,
    concurrency: int,
) -> list[T | str]:
    """A `finalists.Trainer`, with Ray: each task takes what a trial takes.

    Args:
        how: As of `Trainer`.
        plans: The trials.
        rows: The development rows; workers get nothing else.
        resources: What a trial takes.
        max_failures: How often a task whose worker died is tried again.
        concurrency: Tasks at once.
    """
    # What workers run is in a room without Ray Tune, which would take them a second to import.
    from tune_steel.refit import train_in_worker

    task: Any = ray.remote(train_in_worker).options(
        num_cpus=resources.cpus_per_trial,
        num_gpus=resources.gpus_per_trial,
        max_retries=max_failures,
    )
    # The longest first, so that no worker begins one when the others are done.
    waiting = sorted(range(len(plans)), key=lambda i: plans[i].seconds)
    running: dict[ray.ObjectRef[T], int] = {}
    out: list[T | str] = [""] * len(plans)
    # Where a task's worker dies, Ray says so on standard output, which is for the report.
    with redirect_stdout(sys.stderr):
        while waiting or running:
            while waiting and len(running) < concurrency:
                i = waiting.pop()
                running[task.remote(how, plans[i], rows, resources)] = i
            done, _ = ray.wait(list(running), timeout=1)
            check_ray()
            for reference in done:
                i = running.pop(reference)
                try:
                    # A copy, because what Ray shares is gone when its session ends.
                    out[i] = copy.deepcopy(ray.get(reference))
                except WorkerCrashedError:
                    out[i] = "its worker died"
                except RayError as error:
                    out[i] = str(error).strip().splitlines()[-1]
    return out


def check_ray() -> None:
    """Notices that a private Ray has died; Ray itself would end this process without a word.

    Where Ray notices first, it does.

    Raises:
        SearchFailedError: One of its processes is gone.
    """
    node = ray._private.worker._global_node
    dead: list[str] = [kind for kind, _ in node.dead_processes()] if node is not None else []
    if dead:
        raise SearchFailedError(f"a process of Ray ended ({', '.join(dead)})")


@contextmanager
def signals_end(stop: Stop) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the search, the second one the process."""

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.signal is not None:
            stop.interrupt()
        stop.signal = name
        stop.end(f"{name} came", now=True)
        say(f"{name}: ending the search and scoring what there is; once more to stop at once")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
