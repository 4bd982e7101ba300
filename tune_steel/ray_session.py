"""A Ray for one run: a private one or a cluster, started while the driver does something else."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import signal
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import ray
from ray._private.node import Node
from ray.exceptions import AuthenticationError

from tune_steel.errors import OptionError
from tune_steel.options import Resources


class RaySession:
    """Starts a private Ray, or joins the cluster at an address, in a thread; ends it at its exit.

    A private Ray's processes die with the thread that started them, so that a driver that is
    killed leaves none behind: the thread lives as long as the session.
    """

    def __init__(self, address: str | None, resources: Resources) -> None:
        self._address = None if address == "local" else address
        self._resources = resources
        self._thread = ThreadPoolExecutor(1)
        self._starting: Future[int] | None = None

    def start(self) -> None:
        """Begins to start Ray."""
        if self._starting is None:
            # Ray does this too, but only where it is started in the main thread.
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            self._starting = self._thread.submit(self._start)

    def concurrency(self) -> int:
        """How many trials run at once; waits until Ray runs.

        Raises:
            OptionError: The cluster cannot be joined, or no trial fits on this machine.
        """
        self.start()
        assert self._starting is not None
        return self._starting.result()

    def __enter__(self) -> RaySession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Ends Ray, if it has begun to start; not the cluster."""
        if self._starting is not None:
            self._thread.submit(ray.shutdown).result()  # after the start, should that still run
            self._starting = None
        self._thread.shutdown()

    def _start(self) -> int:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
        if self._address is None:
            _leave_out_helpers()
            # Without "local", Ray would join whatever cluster it finds.
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            try:
                _knock(self._address)
                ray.init(address=self._address, **quiet)
            except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
                reason = str(error).strip().splitlines()[0]
                raise OptionError(
                    f"--address {self._address}: no Ray cluster can be joined there ({reason}); "
                    "start one with `ray up cluster.yaml` or `ray start --head`, or give "
                    "--address local to use this machine alone"
                ) from None
        return _concurrency(self._address, self._resources)


def _leave_out_helpers() -> None:
    """Keeps Ray from starting processes that a private one has no use for.

    They scale a cluster, carry workers' output here and answer a browser. Each takes a second of
    CPU time at the very moment at which workers start.
    """
    for name in ("start_monitor", "start_log_monitor", "start_api_server"):
        assert hasattr(Node, name), name
        setattr(Node, name, lambda self, **given: None)


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
