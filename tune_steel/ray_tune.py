"""Ray: start a private one or join a cluster, and run the trials of a study through Tune."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import copy
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.exceptions import AuthenticationError, RayError, WorkerCrashedError

from tune_steel.budget import Stop
from tune_steel.errors import OptionError, SearchFailedError
from tune_steel.fit import prepare_process
from tune_steel.limits import limit_memory, watched
from tune_steel.options import Resources
from tune_steel.progress import ProgressLine
from tune_steel.refit import Plan, Refit, refit
from tune_steel.scheduler import KeepsReference
from tune_steel.searcher import ErrorKeeper, StopWhenTold, StudySearcher
from tune_steel.splits import Development
from tune_steel.terminal import say
from tune_steel.trainable import train_trial


@contextmanager
def ray_session(address: str | None, resources: Resources) -> Iterator[int]:
    """Starts a private Ray, or joins the cluster at an address; yields the concurrency.

    Raises:
        OptionError: The cluster cannot be joined, or no trial fits on this machine.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address is None:
        # Without "local", Ray would join whatever cluster it finds.
        ray.init(address="local", include_dashboard=False, **quiet)
    else:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OptionError(
                f"--address {address}: no Ray cluster can be joined there ({reason}); start one "
                "with `ray up cluster.yaml` or `ray start --head`, or leave --address out"
            ) from None
    try:
        yield _concurrency(address, resources)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fails at once where nobody listens; `ray.init` would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("allowed are host:port of the head, and auto on a node of the cluster")
    with socket.create_connection((host, int(port)), timeout=10):
        pass


def _concurrency(address: str | None, resources: Resources) -> int:
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if address is None:  # a cluster may grow, a machine does not
        if resources.cpus_per_trial > cpus:
            raise OptionError(
                f"--cpus-per-trial {resources.cpus_per_trial:g}: this machine has {cpus:g}"
            )
        if resources.gpus_per_trial > gpus:
            raise OptionError(
                f"--gpus-per-trial {resources.gpus_per_trial:g}: this machine has {gpus:g}"
            )
    if resources.concurrency is not None:
        return resources.concurrency
    slots = cpus / resources.cpus_per_trial
    if resources.gpus_per_trial > 0:
        slots = min(slots, gpus / resources.gpus_per_trial)
    return max(1, int(slots))


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


def refit_trials(
    plans: list[Plan],
    development: Development,
    *,
    resources: Resources,
    max_failures: int,
    concurrency: int,
) -> list[Refit | str]:
    """Trains the folds of trials again, side by side; what each gave, or why it gave nothing.

    Each takes what a trial takes. Workers get the development rows and nothing else.
    """
    rows = ray.put(development)
    task = ray.remote(_refit_trial).options(
        num_cpus=resources.cpus_per_trial,
        num_gpus=resources.gpus_per_trial,
        max_retries=max_failures,
    )
    # The longest first, so that no worker begins one when the others are done.
    waiting = sorted(range(len(plans)), key=lambda i: plans[i].seconds)
    running: dict[ray.ObjectRef[Refit], int] = {}
    out: list[Refit | str] = [""] * len(plans)
    while waiting or running:
        while waiting and len(running) < concurrency:
            i = waiting.pop()
            running[task.remote(plans[i], rows, resources)] = i
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


def _refit_trial(plan: Plan, development: Development, resources: Resources) -> Refit:
    prepare_process(resources.threads)
    device = "cuda" if resources.gpus_per_trial > 0 else "cpu"
    limit_memory(resources.memory)
    try:
        *_, last = watched(refit(plan, development, device), resources.epoch_timeout)
    finally:
        limit_memory(None)  # Ray needs memory to tell what came of it
    assert last is not None
    return last


def check_ray() -> None:
    """Notices that a private Ray has died; Ray itself would end this process without a word.

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
