"""Training a trial's config again: on its folds, or on all development rows.

Either way for the trial's best epoch count and with the learning rates that it had in those
epochs, so that nothing is decided anew. The folds' networks give the out-of-fold predictions that
weights and calibration are fitted to; those on all rows predict new rows, because they do it
better (docs/quality.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from tune_steel.config import TrialConfig
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Floats, Ints
from tune_steel.fit import Fit, prepare_process
from tune_steel.limits import limit_memory, watched
from tune_steel.networks import log_probabilities
from tune_steel.predict import Member, rebuild
from tune_steel.preprocess import Preprocessing
from tune_steel.seeds import derive, replica_seeds
from tune_steel.splits import Development

if TYPE_CHECKING:
    from tune_steel.options import Resources
    from tune_steel.study import TrialRecord

T = TypeVar("T")

SEEDS = 5
"""Networks that are trained on all development rows in lock-step and averaged."""

SEEDS_A_MEMBER = 2
"""How often each fold of a member is trained: with the trial's own seeds, then with others."""


@dataclass(frozen=True)
class Plan:
    """All that it takes to train a trial again; workers get it.

    Attributes:
        trial: Number of the trial.
        config: Its config.
        seed: Its seed.
        learning_rates: Those of its epochs up to the best one.
        val_loss: Its validation loss there.
        seconds: What these epochs took in the search, scoring included.
    """

    trial: int
    config: TrialConfig
    seed: int
    learning_rates: tuple[float, ...]
    val_loss: float
    seconds: float

    @classmethod
    def of(cls, record: TrialRecord) -> Plan:
        """The plan of a trial that has got past an epoch."""
        best = record.best
        assert best is not None
        rows = record.epochs[: best["epoch"]]
        return cls(
            record.number,
            record.config,
            record.seed,
            tuple(row["learning_rate"] for row in rows),
            best["val_loss"],
            sum(row["seconds"] for row in rows),
        )


@dataclass(frozen=True)
class Networks:
    """Trained networks as a worker sends them.

    Attributes:
        preprocessing: The feature transforms, [R] replicas.
        states: State of the stacked network of [R] replicas, for each seed that was a stack of
            its own.
    """

    preprocessing: Preprocessing
    states: tuple[dict[str, Tensor], ...]


@dataclass(frozen=True)
class Refit:
    """What training a trial again on its folds gave.

    Attributes:
        networks: Of [k] replicas, for each seed.
        out_of_fold: Log-probabilities of the validation rows as the networks give them, fold
            after fold, [S, n, C].
        val_loss: Validation loss with the trial's own seeds; the search's, bit for bit, on the
            same kind of machine.
    """

    networks: Networks
    out_of_fold: Floats
    val_loss: float

    def probabilities(self) -> Floats:
        """Out-of-fold probabilities as the networks give them, mean of the seeds [n, C]."""
        mean: Floats = np.exp(self.out_of_fold).mean(axis=0)
        return mean


def refit(plan: Plan, development: Development, device: str) -> Iterator[Refit | None]:
    """Trains a trial again on its folds; yields None after each epoch, and at the end the result.

    Each seed is a stack of its own: with more replicas in one, matrix products may round
    differently, and the trial's own curve would not come out bit for bit. It takes as long.

    Args:
        plan: The trial.
        development: The development rows.
        device: A torch device.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite.
    """
    folds = development.folds
    states, out_of_fold, losses = [], [], []
    for i in range(SEEDS_A_MEMBER):
        own = plan.seed if i == 0 else derive(plan.seed, "refit", i)
        fit = Fit(plan.config, development, folds, replica_seeds(own, len(folds)), device)
        yield from _train(plan, fit)
        log_p = [log_probabilities(torch.tensor(part)) for part in fit.validation_logits()]
        losses.append(float(fit.score()["loss"].mean()))
        if not np.isfinite(losses[-1]):
            raise NonFiniteLossError(f"trial {plan.trial} again: the loss is not finite")
        states.append(_state(fit))
        out_of_fold.append(torch.cat(log_p).numpy())
        preprocessing = fit.preprocessing  # of the folds, whatever the seed
        del fit  # two at once would need more memory than the trial did
    yield Refit(Networks(preprocessing, tuple(states)), np.stack(out_of_fold), losses[0])


def retrain(
    plan: Plan, development: Development, device: str, *, seed: int
) -> Iterator[Networks | None]:
    """Trains a trial's config on all rows, as `refit` does on the folds.

    Several seeds in lock-step; no validation rows are left that a plateau could be seen on.

    Args:
        plan: The trial.
        development: The development rows.
        device: A torch device.
        seed: Seed of the run.

    Raises:
        NonFiniteLossError: The training loss is NaN or infinite.
    """
    everything = np.arange(len(development.y))
    fit = Fit(
        plan.config,
        development,
        [(everything, everything[:0])] * SEEDS,
        [derive(seed, "retrain", i) for i in range(SEEDS)],
        device,
    )
    yield from _train(plan, fit)
    yield Networks(fit.preprocessing, (_state(fit),))


def train_in_worker(
    how: Callable[[Plan, Development, str], Iterator[T | None]],
    plan: Plan,
    development: Development,
    resources: Resources,
) -> T:
    """Trains a trial again within limits; what `how` gave at the end.

    The limits are a trial's, times how much more the networks on all rows are than its folds'.

    Args:
        how: `refit`, or `retrain` of a seed.
        plan: The trial.
        development: The development rows.
        resources: What a trial takes.
    """
    prepare_process(resources.threads)
    device = "cuda" if resources.gpus_per_trial > 0 else "cpu"
    more = max(_whole(len(development.folds)), 1.0)
    limit_memory(None if resources.memory is None else int(resources.memory * more))
    try:
        *_, last = watched(how(plan, development, device), resources.epoch_timeout * more)
    finally:
        limit_memory(None)  # Ray needs memory to tell what came of it
    assert last is not None
    return last


def member(plan: Plan, networks: Networks, development: Development) -> Member:
    """The networks of a trial, on the CPU, ready to predict."""
    return Member(
        plan.trial,
        plan.config,
        networks.preprocessing,
        tuple(
            rebuild(plan.config, networks.preprocessing, len(development.classes), state)
            for state in networks.states
        ),
    )


def _state(fit: Fit) -> dict[str, Tensor]:
    # Copies: parameters are views of one flat buffer, and each would be sent with all of it.
    return {name: tensor.cpu().clone() for name, tensor in fit.network.state_dict().items()}


def _train(plan: Plan, fit: Fit) -> Iterator[None]:
    for rate in plan.learning_rates:
        if not np.isfinite(fit.train_epoch(rate)).all():
            raise NonFiniteLossError(f"trial {plan.trial} again: the loss is not finite")
        yield None


def validation_rows(development: Development) -> tuple[Ints, Ints]:
    """Positions of the validation rows, fold after fold, and the fold of each [n]."""
    parts = [val for _, val in development.folds]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def seconds_again(plans: list[Plan], rivals: list[Plan], folds: int, concurrency: int) -> float:
    """What it takes at most to train members and rivals again, from what the trials took.

    Args:
        plans: The members: on their folds, and if all of them get a weight, on all rows.
        rivals: Trials that are trained on all rows too, members or not.
        folds: Folds k of the search.
        concurrency: Trials at once.
    """
    each = {plan.trial: plan.seconds for plan in (*plans, *rivals)}
    on_folds = _side_by_side([plan.seconds for plan in plans], concurrency)
    on_all_rows = _side_by_side(each.values(), concurrency)
    return SEEDS_A_MEMBER * on_folds + _whole(folds) * on_all_rows


def _whole(folds: int) -> float:
    """Networks on all rows for those of k folds, each of which trains on k - 1 of k parts."""
    return SEEDS / max(folds - 1, 1)


def _side_by_side(seconds: Iterable[float], workers: int) -> float:
    """Until all are done, the longest first."""
    busy = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)
