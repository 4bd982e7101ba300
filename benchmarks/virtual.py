"""A search in virtual time: the product's scheduler and searcher over known learning curves."""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import heapq
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler
from ray.tune.schedulers import TrialScheduler

from benchmarks.surrogate import Curve, Surrogate
from tune_steel.budget import Budget
from tune_steel.choice import choose
from tune_steel.options import Options
from tune_steel.samplers import SearchName, make_sampler
from tune_steel.scheduler import SchedulerName, make_scheduler
from tune_steel.searcher import StudySearcher
from tune_steel.seeds import derive
from tune_steel.space import Params, Space
from tune_steel.study import METRIC, begin

BUDGETS = (500, 1000, 2000, 3000)
"""Epochs of all trials together, at which searches are compared."""

WORKERS = 2


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
        name: How it is called in the tables.
        scheduler: As on the command line, like the two after it.
        grace: Epochs before a trial may be stopped.
        factor: The reduction factor.
        metric: What the scheduler compares.
        search: How configs are found.
        tpe: Options of Optuna's TPESampler, in the place of the product's.
    """

    name: str
    scheduler: SchedulerName = "asha"
    grace: int = 6
    factor: int = 3
    metric: str = METRIC
    search: SearchName = "random"
    tpe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """A search at a number of epochs.

    Attributes:
        loss: The final loss of the trial that would be chosen.
        expected: The same without its residual, by the surrogate.
        trials: Trials that have ended.
        exhausted: Whether there was no config left.
    """

    loss: float
    expected: float
    trials: int
    exhausted: bool


class _Trial:
    """As much of Tune's trial as schedulers look at."""

    def __init__(self, trial_id: str, number: int, config: dict[str, Any], curve: Curve) -> None:
        self.trial_id = trial_id
        self.number = number
        self.config = config
        self.curve = curve

    def result(self, epoch: int) -> dict[str, Any]:
        """What the trainable reports after an epoch."""
        best = self.curve.best[epoch - 1]
        return {
            "epoch": epoch,
            "training_iteration": epoch,
            "val_loss": self.curve.val_loss[epoch - 1],
            METRIC: best,
            "best_epoch": self.curve.best.index(best) + 1,
            "converged": self.curve.converged and epoch == len(self.curve.best),
            "node": "virtual",
            "time_total_s": epoch * self.curve.seconds,
        }


class Search:
    """One simulated search.

    Attributes:
        scheduler: The product's.
        searcher: The product's.
    """

    def __init__(
        self,
        setting: Setting,
        space: Space,
        curve_of: Callable[[int, Params], Curve],
        *,
        configs: Sequence[Params],
        seed: int,
        max_epochs: int,
        samples: int,
        epochs: int | None = None,
    ) -> None:
        """Begins a study in memory.

        Args:
            setting: How to search.
            space: What to sample.
            curve_of: The curve of a slot and its config.
            configs: What is tried first, the default before all others.
            seed: Seed of the run.
            max_epochs: The most epochs of a trial.
            samples: The most trials.
            epochs: The most epochs of all trials; None is without a limit.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="minimize")
        begin(study, list(configs))
        self.searcher = StudySearcher(
            space,
            study,
            search=setting.search,
            seed=seed,
            max_epochs=max_epochs,
            budget=Budget(samples, epochs=epochs),
        )
        self.scheduler = make_scheduler(
            setting.scheduler, max_epochs, setting.grace, setting.factor
        )
        if setting.scheduler == "asha":
            cast(Any, self.scheduler)._metric = setting.metric
        self._setting = setting
        self._curve_of = curve_of
        # All that `choose` reads of the options.
        self._options = SimpleNamespace(
            max_epochs=max_epochs,
            scheduler=setting.scheduler,
            grace_period=setting.grace,
            reduction_factor=setting.factor,
        )
        # The median rule asks which trials wait for a CPU: here none ever does.
        self._controller: Any = SimpleNamespace(get_live_trials=list)
        self._curves: list[Curve] = []
        self._events: list[tuple[float, int, int, _Trial]] = []
        self.epochs = 0

    def run(self, budgets: Sequence[int]) -> list[Mark]:
        """Plays it to its end; what there is at each of the budgets."""
        marks: list[Mark] = []
        with patch("tune_steel.study.make_sampler", self._sampler):
            for _ in range(WORKERS):
                self._start(0.0)
            while self._events and not self.searcher.stop.now:
                self._epoch()
                if len(marks) < len(budgets) and self.epochs >= budgets[len(marks)]:
                    marks.append(self._mark(exhausted=False))
        return marks + [self._mark(exhausted=True)] * (len(budgets) - len(marks))

    def _start(self, now: float) -> None:
        """A free worker begins a trial, if there is one."""
        trial = self._ask()
        if trial is not None:
            heapq.heappush(self._events, (now + trial.curve.seconds, trial.number, 1, trial))

    def _ask(self) -> _Trial | None:
        """The next trial, if there is one."""
        name = f"t{len(self._curves)}"
        given = self.searcher.suggest(name)
        if not isinstance(given, dict):  # finished, or waiting for a failure that never comes
            return None
        record = self.searcher.records[-1]
        curve = self._curve_of(record.slot, record.params)
        self._curves.append(curve)
        trial = _Trial(name, record.number, given, curve)
        self.scheduler.on_trial_add(self._controller, cast(Any, trial))
        return trial

    def _epoch(self) -> None:
        """The next epoch that ends."""
        now, number, epoch, trial = heapq.heappop(self._events)
        if self._report(trial, epoch):
            self._start(now)
        else:
            event = (now + trial.curve.seconds, number, epoch + 1, trial)
            heapq.heappush(self._events, event)

    def _report(self, trial: _Trial, epoch: int) -> bool:
        """An epoch has ended, in the order of calls of Tune's `_process_trial_result`.

        Returns:
            Whether the trial has.
        """
        result = trial.result(epoch)
        self.epochs += 1
        action = self.scheduler.on_trial_result(self._controller, cast(Any, trial), result)
        ended = action == TrialScheduler.STOP
        if not ended:
            self.searcher.on_trial_result(trial.trial_id, result)
            ended = epoch == len(trial.curve.best)
        if ended:
            self.scheduler.on_trial_complete(self._controller, cast(Any, trial), result)
            self.searcher.on_trial_complete(trial.trial_id, result)
        return ended

    def _mark(self, *, exhausted: bool) -> Mark:
        chosen = choose(self.searcher.records, cast(Options, self._options))
        if chosen is None:
            raise ValueError("no trial had ended at the first budget")
        curve = self._curves[chosen.number]
        expected = float("nan") if curve.expected is None else curve.expected
        return Mark(curve.final, expected, self.searcher.ended, exhausted)

    def _sampler(self, name: SearchName, seed: int, slot: int) -> BaseSampler:
        if name == "tpe" and self._setting.tpe:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # `group`
                return TPESampler(seed=derive(seed, "sampler", slot), **self._setting.tpe)
        return make_sampler(name, seed, slot)


def replay(
    setting: Setting,
    *,
    repeat: int,
    space: Space,
    curves: Sequence[Curve],
    max_epochs: int,
    budgets: Sequence[int] = BUDGETS,
) -> list[Mark]:
    """A search over the recorded configs, the default first, the others in a random order."""
    others = np.random.default_rng(repeat).permutation(len(curves) - 1) + 1
    order = [curves[i] for i in (0, *others)]
    search = Search(
        setting,
        space,
        lambda slot, params: order[slot],
        configs=[curve.params for curve in order],
        seed=repeat,
        max_epochs=max_epochs,
        samples=len(order),
        epochs=budgets[-1],
    )
    return search.run(budgets)


def model(
    setting: Setting,
    *,
    repeat: int,
    space: Space,
    surrogate: Surrogate,
    max_epochs: int,
    budgets: Sequence[int] = BUDGETS,
) -> list[Mark]:
    """A search over the surrogate's configs."""
    search = Search(
        setting,
        space,
        lambda slot, params: surrogate.curve(params),
        configs=[space.defaults()],
        seed=repeat,
        max_epochs=max_epochs,
        samples=10**6,
        epochs=budgets[-1],
    )
    return search.run(budgets)
