"""Training a trial's config again: on its folds for the ensemble, on all rows for one model.

Either way for the trial's best epoch count and with the learning rates that it had in those
epochs, so that nothing is decided anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tune_steel.config import TrialConfig
from tune_steel.ensemble import natural
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Floats, Ints
from tune_steel.fit import Fit
from tune_steel.loss import class_weights
from tune_steel.networks import log_probabilities
from tune_steel.predict import Member, rebuild
from tune_steel.preprocess import Preprocessing
from tune_steel.seeds import derive
from tune_steel.splits import Development
from tune_steel.trainable import replica_seeds

if TYPE_CHECKING:
    from tune_steel.study import TrialRecord

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
class Refit:
    """What training a trial's folds again gave.

    Attributes:
        preprocessing: The feature transforms, [k] replicas.
        states: State of the stacked network of [k] replicas, for each seed.
        out_of_fold: Log-probabilities of the validation rows as the networks give them, fold
            after fold, [S, n, C].
        val_loss: Validation loss with the trial's own seeds; the search's, bit for bit, on the
            same kind of machine.
    """

    preprocessing: Preprocessing
    states: tuple[dict[str, Tensor], ...]
    out_of_fold: Floats
    val_loss: float

    def natural(self, weights: Floats) -> Floats:
        """Out-of-fold probabilities at natural frequencies, mean of the seeds [n, C].

        Args:
            weights: Class weights [C] of the training loss.
        """
        mean: Floats = natural(self.out_of_fold, weights).mean(axis=0)
        return mean


def refit(plan: Plan, development: Development, device: str) -> Iterator[Refit | None]:
    """Trains a trial's folds again; yields None after each epoch, and at the end what it gave.

    Each seed is a stack of its own: with more replicas in one, matrix products may round
    differently, and the trial's own curve would not come out bit for bit. It takes as long.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite.
    """
    folds = development.folds
    states, out_of_fold, losses = [], [], []
    for i in range(SEEDS_A_MEMBER):
        seed = plan.seed if i == 0 else derive(plan.seed, "refit", i)
        fit = Fit(plan.config, development, folds, replica_seeds(seed, len(folds)), device)
        yield from _train(plan, fit)
        log_p = [log_probabilities(torch.tensor(part)) for part in fit.validation_logits()]
        losses.append(float(fit.score()["loss"].mean()))
        if not np.isfinite(losses[-1]):
            raise NonFiniteLossError(f"trial {plan.trial} again: the loss is not finite")
        states.append({name: t.cpu() for name, t in fit.network.state_dict().items()})
        out_of_fold.append(torch.cat(log_p).numpy())
    yield Refit(fit.preprocessing, tuple(states), np.stack(out_of_fold), losses[0])


def member(plan: Plan, again: Refit, development: Development) -> Member:
    """The fold models of a trial, on the CPU."""
    return Member(
        plan.trial,
        plan.config,
        class_weights(plan.config, development),
        again.preprocessing,
        tuple(
            rebuild(plan.config, again.preprocessing, len(development.classes), state)
            for state in again.states
        ),
    )


def retrain(plan: Plan, development: Development, seed: int, device: str) -> Member:
    """Trains a trial's config on all development rows, several seeds in lock-step.

    It takes the trial's best epoch count and, because there are no validation rows left that a
    plateau could be seen on, the learning rate that the trial had in each of those epochs.

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
    for _ in _train(plan, fit):
        pass
    weights = class_weights(plan.config, development)
    return Member(plan.trial, plan.config, weights, fit.preprocessing, (fit.network,))


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
    """What it takes to train members and rivals again, from what the trials took.

    Args:
        plans: The members.
        rivals: The trials that are retrained on all rows, one after the other.
        folds: Folds k of the search.
        concurrency: Members at once.
    """
    seconds = [plan.seconds * SEEDS_A_MEMBER for plan in plans]
    refits = max(sum(seconds) / concurrency, *seconds)
    # Each of k folds trains on k - 1 of k parts of the rows, each seed on all of them.
    return refits + sum(plan.seconds for plan in rivals) * SEEDS / max(folds - 1, 1)
