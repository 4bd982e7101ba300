"""Our TPE is Optuna's: the same study and seed give the same densities and the same values."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import TPESampler
from optuna.samplers._tpe import parzen_estimator
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_steel.space import load_space, spaces_folder
from tune_steel.study import open_study
from tune_steel.tpe import TPE, History, densities

optuna.logging.set_verbosity(optuna.logging.ERROR)

RANGES: dict[str, BaseDistribution] = {
    "kind": CategoricalDistribution(["a", "b", "c"]),
    "flag": CategoricalDistribution([True, False]),
    "float": FloatDistribution(0.0, 0.6),
    "log_float": FloatDistribution(1e-4, 3e-2, log=True),
    "int": IntDistribution(2, 15),
    "log_int": IntDistribution(1, 500, log=True),
    "only_a": FloatDistribution(-1.0, 1.0),
    "never_before": FloatDistribution(0.0, 1.0),
}


class StableNumpy:
    """Which of equal values comes first, Optuna leaves to the machine."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def argsort(self, values: Any) -> Any:
        return np.argsort(values, kind="stable")


@pytest.fixture(autouse=True)
def stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parzen_estimator, "np", StableNumpy())


def sampled(rng: np.random.Generator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, one in RANGES.items():
        if name == "never_before" or (name == "only_a" and out["kind"] != "a"):
            continue
        if isinstance(one, CategoricalDistribution):
            out[name] = one.choices[rng.integers(len(one.choices))]
        elif isinstance(one, IntDistribution | FloatDistribution):
            ends = np.array([one.low, one.high], dtype=float)
            x = np.exp(rng.uniform(*np.log(ends))) if one.log else rng.uniform(*ends)
            out[name] = round(x) if isinstance(one, IntDistribution) else float(x)
    return out


def trials(count: int, seed: int) -> Iterator[FrozenTrial]:
    """Of every state, some of them equal, stopped ones with and without a report or with NaN."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        params = sampled(rng)
        state = TrialState[rng.choice(["COMPLETE", "PRUNED", "FAIL", "RUNNING"], p=CHANCES)]
        loss = round(params["float"] + 0.1 * rng.normal(), 2)
        reports = {step: loss + 1 / step for step in range(1, int(rng.integers(1, 6)))}
        if reports and rng.random() < 0.1:
            reports[max(reports)] = math.nan
        yield create_trial(
            state=state,
            value=loss if state == TrialState.COMPLETE else None,
            params=params,
            distributions={name: RANGES[name] for name in params},
            intermediate_values=reports,
        )


CHANCES = [0.4, 0.45, 0.05, 0.1]


def study_of(count: int, seed: int) -> optuna.Study:
    study = optuna.create_study()
    study.add_trials(trials(count, seed))
    return study


def asked(study: optuna.Study) -> FrozenTrial:
    number = study.ask().number
    return study.get_trials()[number]


class Recorder(parzen_estimator._ParzenEstimator):
    """Keeps the densities that Optuna's sampler makes, the good trials' before the others'."""

    made: list["Recorder"]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.made.append(self)


@pytest.mark.parametrize("count", [16, 25, 60, 150, 1200])
def test_the_densities_are_optunas(count: int) -> None:
    study = study_of(count, seed=count)
    trial = asked(study)
    history = History()
    history.update(study)
    theirs = TPESampler(seed=0, multivariate=False)
    theirs._parzen_estimator_cls = Recorder
    for name, one in RANGES.items():
        Recorder.made = []
        theirs.sample_independent(study, trial, name, one)
        ours = densities(history.split(trial.number), name, one)
        if isinstance(one, CategoricalDistribution):
            grid = np.arange(len(one.choices), dtype=float)
        elif isinstance(one, IntDistribution):
            grid = np.arange(one.low, one.high + 1, dtype=float)
        else:
            assert isinstance(one, FloatDistribution)
            grid = (np.geomspace if one.log else np.linspace)(one.low, one.high, 301)[1:-1]
        for optunas, own in zip(Recorder.made, ours, strict=True):
            expected = optunas.log_pdf({name: grid})
            np.testing.assert_allclose(np.log(own.density(grid)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [0, 5, 15, 40, 120, 400])
def test_the_same_seed_proposes_what_optuna_proposes(count: int) -> None:
    for seed in range(8):
        study = study_of(count, seed)
        trial = asked(study)
        theirs, ours = TPESampler(seed=seed, multivariate=False), TPE(seed)
        for name, one in RANGES.items():
            expected = theirs.sample_independent(study, trial, name, one)
            found = ours.sample_independent(study, trial, name, one)
            assert type(found) is type(expected)
            if isinstance(one, FloatDistribution):
                assert found == pytest.approx(expected, rel=1e-7)
            else:
                assert found == expected, (seed, name)


def test_what_is_kept_between_trials_changes_nothing(tmp_path: Path) -> None:
    """A sampler in a process that saw every change, and one in a process that begins now."""
    space = load_space(spaces_folder() / "binary.toml")
    rng = np.random.default_rng(0)
    study = open_study(tmp_path / "j", "run")
    running: list[optuna.Trial] = []
    for number in range(30):
        study.sampler = TPE(number)
        trial = study.ask()
        running.append(trial)
        again = open_study(tmp_path / "j", "run")
        params = space.suggest(trial)
        fresh = TPE(number)
        frozen = again.get_trials()[trial.number]
        proposed = {
            name: fresh.sample_independent(again, frozen, name, trial.distributions[name])
            for name in params
        }
        assert proposed == params
        if len(running) < 4:
            continue
        ended = running.pop(int(rng.integers(4)))  # not in the order of their numbers
        ended.report(float(rng.random()), int(rng.integers(1, 4)))
        state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)[number % 3]
        complete = state == TrialState.COMPLETE
        study.tell(ended, float(rng.random()) if complete else None, state)
