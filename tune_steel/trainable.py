"""The Ray Tune function: a config in, one fit, a report each epoch."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from tune_steel.config import TrialConfig
from tune_steel.limits import limit_memory, release_memory, watched
from tune_steel.seeds import replica_seeds
from tune_steel.splits import Development

if TYPE_CHECKING:
    from tune_steel.fit import EpochRecord


def report_row(record: EpochRecord) -> dict[str, Any]:
    """An epoch as plain values: means over the folds, and the folds' own losses."""
    return {
        "epoch": record.epoch,
        "train_loss": float(record.train_loss.mean()),
        **{f"val_{name}": float(values.mean()) for name, values in record.scores.items()},
        "fold_val_loss": record.scores["loss"].tolist(),
        "best_val_loss": record.best_val_loss,
        "best_epoch": record.best_epoch,
        "learning_rate": record.learning_rate,
        "seconds": record.seconds,
        "scoring_seconds": record.scoring_seconds,
        "converged": record.converged,
    }


def train_trial(
    trial: dict[str, Any],
    development: Development,
    max_epochs: int,
    decisive: frozenset[int],
    threads: int,
    device: str,
    memory: int | None,
    epoch_timeout: float,
) -> None:
    """Trains one trial and reports every epoch; a non-finite loss raises.

    Args:
        trial: `number`, `slot`, `seed` and `config` of the trial, as the searcher gave them.
        development: The development rows, shared by all trials of a node.
        max_epochs: The most epochs.
        decisive: As of `report_each`.
        threads: Threads of torch.
        device: `cpu` or `cuda`.
        memory: Bytes that the trial may allocate, if there is a limit.
        epoch_timeout: Seconds that an epoch may take before the worker is given up.
    """

    def rows() -> Iterator[dict[str, Any]]:
        from tune_steel.fit import Fit, prepare_process  # torch is the worker's, not the driver's

        def epochs() -> Iterator[EpochRecord]:
            fit = Fit(
                TrialConfig.model_validate(trial["config"]),
                development,
                development.folds,
                replica_seeds(trial["seed"], len(development.folds)),
                device,
            )
            yield from fit.epochs(max_epochs)

        prepare_process(threads)
        release_memory()
        limit_memory(memory)
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        for record in watched(epochs(), epoch_timeout):
            yield {**report_row(record), "node": node}

    report_each(rows(), decisive)


def report_each(rows: Iterable[dict[str, Any]], decisive: frozenset[int]) -> None:
    """Reports epochs to the driver, each while the next one is made.

    Args:
        rows: What is reported, with `epoch` and the `seconds` that it took.
        decisive: Epochs after which the scheduler may stop the trial: the next one is not made
            before the driver has asked for it.
    """
    resumed, waited = time.perf_counter(), 0.0
    answer: Future[None] | None = None
    with ThreadPoolExecutor(1) as thread:
        try:
            for row in rows:
                made = time.perf_counter()
                preparing = made - resumed - row["seconds"]
                row |= {"preparing_seconds": preparing, "waiting_seconds": waited}
                if answer is not None:
                    answer.result()
                # Tune returns when the driver asks for the next epoch. When it stops the trial,
                # it ends the thread instead, which `result` passes on.
                answer = thread.submit(tune.report, row)
                if row["epoch"] in decisive:
                    answer.result()
                resumed = time.perf_counter()
                waited = resumed - made
            if answer is not None:
                answer.result()
        finally:
            # What it raises knows this frame: together they would keep the trial's memory until
            # Python looks for cycles.
            answer = None
