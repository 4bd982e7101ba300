"""The trials that the final model and its rivals are made of, trained again.

First the members of the ensemble on their folds, which gives their weights; then those that got a
weight, the best trial and the default config on all development rows. Nothing here sees the test
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from tune_steel.ensemble import (
    Calibration,
    Combination,
    ThresholdRule,
    combine,
    cross_fit,
    log_loss,
)
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Floats, Ints
from tune_steel.loss import class_weights
from tune_steel.refit import Networks, Plan, Refit, refit, retrain, validation_rows
from tune_steel.splits import Development

T = TypeVar("T")


class Trainer(Protocol):
    """Trains trials again, side by side."""

    def __call__(
        self, how: Callable[[Plan, Development, str], Iterator[T | None]], plans: Sequence[Plan]
    ) -> list[T | str]:
        """What each gave, or why it gave nothing.

        Args:
            how: Trains a plan on the development rows on a device; yields None after each epoch,
                and at the end what it gave.
            plans: The trials.
        """
        ...


@dataclass(frozen=True)
class Membership:
    """A trial that was refitted for the ensemble.

    Attributes:
        trial: Its number.
        family: Its family of networks.
        weight: Its weight in the ensemble; 0 where the selection left it out.
        calibration: What is done to its logits.
        log_loss: Out-of-fold log-loss of its fold models, calibrated on the same rows.
    """

    trial: int
    family: str
    weight: float
    calibration: Calibration
    log_loss: float


@dataclass(frozen=True)
class EnsembleFacts:
    """How the ensemble came about; `ensemble` in `run.json`.

    Attributes:
        members: Every trial that was weighed, best validation loss first.
        calibration: What is done to the logits of the weighted average.
        threshold: Two classes: above which probability a row counts as of the second one.
        log_loss: Of the out-of-fold predictions that weights and calibration were fitted to.
        cross_fitted_log_loss: Of weights and calibration that were fitted to the other folds.
        cross_fitted: False with a single split, where no other rows are left: then the two are
            the same, and the validation scores flatter.
    """

    members: tuple[Membership, ...]
    calibration: Calibration
    threshold: float | None
    log_loss: float
    cross_fitted_log_loss: float
    cross_fitted: bool


@dataclass(frozen=True)
class OutOfFold:
    """A model's predictions of the validation rows of one fold.

    Attributes:
        model: `ensemble`, `bagged` or `tuned`.
        fold: The fold, from 0.
        rows: Indices in the original table [N].
        y: Classes [N].
        probabilities: By models that did not see these rows [N, C].
    """

    model: str
    fold: int
    rows: Ints
    y: Ints
    probabilities: Floats


class Ensemble:
    """Members that were trained again on their folds, and their combination.

    Attributes:
        p: Out-of-fold probabilities of the members as they give them [M, n, C].
        cross_fitted: Of each fold, the probabilities and threshold that the other folds gave.
    """

    def __init__(
        self, kept: list[tuple[Plan, Refit]], development: Development, rule: ThresholdRule
    ) -> None:
        self._kept = kept
        self._development = development
        self._positions, self._fold = validation_rows(development)
        self._y = development.y[self._positions]
        self.p = np.stack([again.probabilities() for _, again in kept])
        weights = np.stack([class_weights(plan.config, development) for plan, _ in kept])
        self._combination = combine(self.p, self._y, weights, rule)
        self.cross_fitted = cross_fit(self.p, self._y, weights, self._fold, rule)

    def used(self) -> Combination:
        """The combination of the members with a weight."""
        whole = self._combination
        used = whole.weights > 0
        of_members = tuple(c for c, weight in zip(whole.of_members, used, strict=True) if weight)
        return Combination(whole.weights[used], of_members, whole.calibration, whole.threshold)

    def chosen(self) -> list[Plan]:
        """The members with a weight."""
        weights = self._combination.weights
        return [plan for (plan, _), weight in zip(self._kept, weights, strict=True) if weight > 0]

    def out_of_fold(self) -> list[OutOfFold]:
        """The cross-fitted predictions."""
        return self.blocks("ensemble", np.concatenate([p for p, _ in self.cross_fitted]))

    def alone(self, model: str, plan: Plan, again: Refit) -> tuple[Combination, list[OutOfFold]]:
        """A single member, calibrated as it is in the ensemble, and its cross-fitted predictions.

        Args:
            model: The name of these predictions.
            plan: Its trial.
            again: What training it on its folds again gave.
        """
        p = again.probabilities()[np.newaxis]
        weights = class_weights(plan.config, self._development)[np.newaxis]
        crossed = cross_fit(p, self._y, weights, self._fold)
        parts = self.blocks(model, np.concatenate([of_fold for of_fold, _ in crossed]))
        return combine(p, self._y, weights), parts

    def blocks(self, model: str, p: Floats) -> list[OutOfFold]:
        """Probabilities [n, C] of all validation rows, cut into folds."""
        return [
            OutOfFold(model, fold, self._development.rows[val], self._development.y[val], p[part])
            for fold, (_, val) in enumerate(self._development.folds)
            for part in [self._fold == fold]
        ]

    def facts(self) -> EnsembleFacts:
        """How it came about."""
        whole = self._combination
        crossed = np.concatenate([p for p, _ in self.cross_fitted])
        return EnsembleFacts(
            members=tuple(
                Membership(
                    plan.trial,
                    plan.config.model.family,
                    float(weight),
                    calibration,
                    log_loss(calibration.apply(p), self._y),
                )
                for (plan, _), weight, calibration, p in zip(
                    self._kept, whole.weights, whole.of_members, self.p, strict=True
                )
            ),
            calibration=whole.calibration,
            threshold=whole.threshold,
            log_loss=log_loss(whole.apply(self.p), self._y),
            cross_fitted_log_loss=log_loss(crossed, self._y),
            cross_fitted=len(self._development.folds) > 1,
        )


@dataclass(frozen=True)
class Finalists:
    """All that was trained again.

    Attributes:
        refits: The members that could be trained on their folds.
        ensemble: Their combination, without those that got a weight and could not be trained on
            all rows.
        networks: On all rows, by the number of the trial: of those with a weight, and of rivals.
        left_out: Why others are no members, by the number of the trial.
        without_networks: Why there are no networks on all rows, by the number of the trial.
    """

    refits: list[tuple[Plan, Refit]]
    ensemble: Ensemble
    networks: dict[int, Networks]
    left_out: dict[int, str]
    without_networks: dict[int, str]


def train_finalists(
    plans: Sequence[Plan],
    rivals: Sequence[Plan],
    development: Development,
    seed: int,
    rule: ThresholdRule,
    train: Trainer,
) -> Finalists:
    """Trains members and rivals again.

    Args:
        plans: The members, best validation loss first.
        rivals: Trials whose networks on all rows are wanted too.
        development: The rows that the search saw.
        seed: Seed of the run.
        rule: How the ensemble's decision threshold is chosen.
        train: How they are trained side by side.

    Raises:
        NonFiniteLossError: No member is left.
    """
    refits: list[tuple[Plan, Refit]] = []
    left_out: dict[int, str] = {}
    for plan, again in zip(plans, train(refit, plans), strict=True):
        if isinstance(again, Refit):
            refits.append((plan, again))
        else:
            left_out[plan.trial] = again
    networks: dict[int, Networks] = {}
    without: dict[int, str] = {}
    pool = refits
    while pool:
        ensemble = Ensemble(pool, development, rule)
        chosen = ensemble.chosen()
        wanted = {
            plan.trial: plan
            for plan in (*chosen, *rivals)
            if plan.trial not in networks and plan.trial not in without
        }
        results = train(partial(retrain, seed=seed), list(wanted.values()))
        for trial, found in zip(wanted, results, strict=True):
            if isinstance(found, Networks):
                networks[trial] = found
            else:
                without[trial] = found
        lost = {plan.trial: without[plan.trial] for plan in chosen if plan.trial in without}
        if not lost:
            return Finalists(refits, ensemble, networks, left_out, without)
        # A member without networks on all rows cannot predict: the others are weighted anew.
        left_out |= lost
        pool = [(plan, again) for plan, again in pool if plan.trial not in lost]
    first, why = next(iter(left_out.items()))
    raise NonFiniteLossError(
        f"no member of the ensemble could be trained again; trial {first}: {why}"
    )
