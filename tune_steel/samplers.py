"""How the next config is found: samplers of Optuna's interface, and a grid.

A sampler is made anew for every trial from the run's seed and the trial's slot, so what is sampled
depends on what the study holds and on nothing that dies with the process.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from tune_steel.errors import OptionError
from tune_steel.seeds import derive
from tune_steel.space import Leaf, Params, Space, Value
from tune_steel.tpe import TPE

SearchName: TypeAlias = Literal["tpe", "random", "gp", "grid"]

_MOST_GRID_POINTS = 100_000


def make_sampler(name: SearchName, seed: int, slot: int) -> BaseSampler:
    """The sampler of one trial.

    Args:
        name: `tpe`, `random` or `gp`; of a grid, what samples a config that is not fixed.
        seed: Seed of the run.
        slot: How many configs were sampled before this one.
    """
    trial_seed = derive(seed, "sampler", slot)
    if name == "tpe":
        # Optuna's default, all parameters together, found worse configs (docs/defaults.md).
        return TPE(trial_seed)
    if name == "gp":
        return StoppedTrialsGP(
            seed=trial_seed,
            independent_sampler=RandomSampler(seed=derive(seed, "independent", slot)),
            # Validation losses are noisy: the same config with another seed has another loss.
            deterministic_objective=False,
        )
    return RandomSampler(seed=trial_seed)


class StoppedTrialsGP(GPSampler):
    """Optuna's Gaussian process, which by itself knows nothing of PRUNED trials.

    A trial that the scheduler stopped counts with the lowest loss that it had by then. That is too
    high for what it would have become, but such trials are the bad ones; without them the process
    would model a third of what was trained, and only the good part of it.
    """

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that all finished trials have; the rest is sampled at random."""
        return super().infer_relative_search_space(_study_for_gp(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Samples those parameters together."""
        return super().sample_relative(_study_for_gp(study), trial, search_space)


def _study_for_gp(study: optuna.Study) -> Any:
    return _StoppedAsComplete(study)


class _StoppedAsComplete:
    """A study that shows PRUNED trials as COMPLETE; everything else is the study's own."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: tuple[TrialState, ...] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        if states is not None and TrialState.COMPLETE in states:
            states = (*states, TrialState.PRUNED)
        trials = self._study._get_trials(deepcopy, states, use_cache)
        return [_completed(trial) for trial in trials]


def _completed(trial: FrozenTrial) -> FrozenTrial:
    """A copy that ended with its last reported value, which is its lowest, if it was stopped."""
    if trial.state != TrialState.PRUNED:
        return trial
    out = copy.copy(trial)
    out.state = TrialState.COMPLETE
    return out


def grid(space: Space, seed: int) -> list[Params]:
    """Every config of a finite space, the default first, the others in a seeded random order.

    Raises:
        OptionError: The space has a range of floats, or too many configs.
    """
    endless = [leaf.key for leaf in space.leaves if leaf.kind == "float"]
    if endless:
        raise OptionError(
            f"--search grid: {space.name} has ranges of floats ({', '.join(endless)}); give them "
            "as choices or int, or use --search tpe, random or gp"
        )
    points: list[Params] = [{}]
    for leaf in space.leaves:
        longer: list[Params] = []
        for point in points:
            if not space.active(leaf, point):
                longer.append(point)
                continue
            values = _values(leaf)
            if len(longer) + len(values) > _MOST_GRID_POINTS:
                raise OptionError(
                    f"--search grid: {space.name} has more than {_MOST_GRID_POINTS} configs; give "
                    "fewer choices, or use --search tpe, random or gp"
                )
            longer += [{**point, leaf.key: value} for value in values]
        points = longer
    default = space.defaults()
    points.remove(default)
    random.Random(derive(seed, "grid")).shuffle(points)
    return [default, *points]


def _values(leaf: Leaf) -> Sequence[Value]:
    if leaf.kind == "choices":
        return leaf.values
    low, high = leaf.values
    return range(int(low), int(high) + 1)
