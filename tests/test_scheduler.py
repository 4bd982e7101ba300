"""Which trials stop when: the reference never, failed ones leave no trace, earlier ones count."""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from conftest import SMALL_SPACE
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tune_steel.budget import Budget
from tune_steel.data import load_own
from tune_steel.errors import NonFiniteLossError
from tune_steel.fit import Fit
from tune_steel.scheduler import KeepsReference, SchedulerName, make_scheduler, rungs
from tune_steel.searcher import StudySearcher
from tune_steel.seeds import replica_seeds
from tune_steel.space import parse_space
from tune_steel.splits import Development, freeze, prepare
from tune_steel.study import METRIC, TrialRecord, begin
from tune_steel.tasks import own_task
from tune_steel.trainable import report_row

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = parse_space(tomllib.loads(SMALL_SPACE), name="small.toml")
CONTINUE, STOP, PAUSE = TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.PAUSE


def tune_trial(slot: int, name: str = "", status: str = Trial.RUNNING) -> Trial:
    """Tune's own trial, without the function that it would run."""
    config = {"number": slot, "slot": slot, "seed": 0, "config": {}}
    trial = Trial("train_trial", stub=True, trial_id=name or f"t{slot}", config=config)
    trial.set_status(status)
    return trial


def row(epoch: int, best: float) -> dict[str, Any]:
    return {"training_iteration": epoch, "epoch": epoch, METRIC: best}


NOBODY_WAITS: Any = SimpleNamespace(get_live_trials=list)


def decisions(
    scheduler: KeepsReference, trial: Trial, losses: list[float], controller: Any = NOBODY_WAITS
) -> list[str]:
    """What a scheduler says of each epoch of a trial until it stops it."""
    scheduler.on_trial_add(controller, trial)
    out: list[str] = []
    for epoch in range(1, len(losses) + 1):
        result = row(epoch, min(losses[:epoch]))
        out.append(scheduler.on_trial_result(controller, trial, result))
        if out[-1] == STOP:
            scheduler.on_trial_complete(controller, trial, result)
            break
    return out


def held(scheduler: Any) -> dict[int, dict[str, float]]:
    """ASHA's rungs: the losses at each milestone."""
    return {
        int(milestone): {name: -reward for name, reward in recorded.items()}
        for milestone, recorded in scheduler._brackets[0]._rungs
    }


class Live:
    """A search as Tune conducts it: its trials, in the order of its calls, over known curves.

    `said` are the decisions by slot.
    """

    def __init__(
        self, study: optuna.Study, scheduler: KeepsReference, most: int, samples: int
    ) -> None:
        if not study.user_attrs:
            begin(study, [SPACE.defaults()])
        given: dict[str, Any] = {"search": "random", "seed": 0, "max_epochs": most}
        self.searcher = StudySearcher(SPACE, study, budget=Budget(samples), **given)
        self.scheduler = scheduler
        self.said: dict[int, list[str]] = {}
        self._most = most
        self._running: list[tuple[Trial, Iterator[dict[str, Any]]]] = []

    def run(self, order: random.Random) -> None:
        """Until there are enough; `order` says which of three workers is next."""
        while True:
            while len(self._running) < 3 and self._begin():
                pass
            if not self._running:
                return
            self._epoch(order.randrange(len(self._running)))

    def _begin(self) -> bool:
        name = f"t{len(self.searcher.records)}"
        given = self.searcher.suggest(name)
        if not isinstance(given, dict):
            return False
        trial = Trial("train_trial", stub=True, trial_id=name, config=given)
        trial.set_status(Trial.RUNNING)
        self.said[given["slot"]] = []
        self.scheduler.on_trial_add(NOBODY_WAITS, trial)
        self._running.append((trial, curve(given["slot"], self._most)))
        return True

    def _epoch(self, place: int) -> None:
        trial, rows = self._running[place]
        result = next(rows, None)
        if result is None:
            del self._running[place]
            self.scheduler.on_trial_error(NOBODY_WAITS, trial)
            self.searcher.on_trial_complete(trial.trial_id, error=True)
            self.searcher.fail(trial.trial_id, "ValueError: no", lost=False)
            return
        action = self.scheduler.on_trial_result(NOBODY_WAITS, trial, result)
        self.said[trial.config["slot"]].append(action)
        returns = result["converged"] or result["epoch"] == self._most
        if action == CONTINUE:
            self.searcher.on_trial_result(trial.trial_id, result)
        if action == STOP or returns:
            del self._running[place]
            self.scheduler.on_trial_complete(NOBODY_WAITS, trial, result)
            self.searcher.on_trial_complete(trial.trial_id, result)


def curve(slot: int, most: int) -> Iterator[dict[str, Any]]:
    """A slot's random curve; a few of them converge early, a few end without a word: they fail."""
    rng = random.Random(slot)
    level, length = rng.random(), rng.randint(1, most)
    end = rng.choice(["converged", "failed", *["full"] * 4]) if slot else "full"
    losses: list[float] = []
    for epoch in range(1, most + 1):
        losses.append(level + rng.random() / epoch)
        best = min(losses)
        yield {
            **row(epoch, best),
            "val_loss": losses[-1],
            "best_epoch": losses.index(best) + 1,
            "converged": end == "converged" and epoch == length,
            "node": "here",
            "time_total_s": float(epoch),
        }
        if end != "full" and epoch == length:
            return


SETTINGS = [(27, 1, 3), (50, 6, 3), (9, 1, 3), (20, 3, 2), (5, 5, 3)]


@pytest.mark.parametrize(
    ("most", "grace", "factor", "expected"),
    [
        (50, 6, 3, (6, 18)),
        (27, 1, 3, (1, 3, 9)),
        (28, 1, 3, (1, 3, 9, 27)),
        (20, 3, 2, (3, 6, 12)),
        (5, 5, 3, (5,)),
        (1, 1, 2, (1,)),
    ],
)
def test_rungs_grow_by_the_factor_and_end_before_the_last_epoch(
    most: int, grace: int, factor: int, expected: tuple[int, ...]
) -> None:
    assert rungs(most, grace, factor) == expected


@pytest.mark.parametrize(("most", "grace", "factor"), SETTINGS)
@pytest.mark.parametrize("name", ["asha", "median", "none"])
def test_trials_are_stopped_after_decisive_epochs_and_nowhere_else(
    name: SchedulerName, most: int, grace: int, factor: int
) -> None:
    """Workers do not wait for an answer after any other epoch."""
    scheduler = make_scheduler(name, most, grace, factor)
    stopped_at: list[int] = []
    for slot in range(1, 60):
        losses = [result["val_loss"] for result in curve(slot, most)]
        said = decisions(scheduler, tune_trial(slot), losses)
        assert PAUSE not in said
        if said[-1] == STOP:
            stopped_at.append(len(said))
    assert set(stopped_at) - {most} <= scheduler.decisive
    if name == "asha":
        assert set(stopped_at) - {most} == {r for r in rungs(most, grace, factor) if r < most}
    else:
        assert bool(set(stopped_at) - {most}) == bool(scheduler.decisive)


@pytest.mark.parametrize(("most", "grace", "factor"), SETTINGS)
@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_that_is_refilled_goes_on_as_one_that_saw_all_of_it(
    name: SchedulerName, most: int, grace: int, factor: int
) -> None:
    """Among the earlier trials are some that converged and some that failed."""
    study = optuna.create_study()
    first = Live(study, make_scheduler(name, most, grace, factor), most, 60)
    first.run(random.Random(1))
    states = [r.state for r in first.searcher.records]
    assert {"COMPLETE", "FAIL"} <= set(states)
    assert ("PRUNED" in states) == (grace < most)
    again = optuna.create_study()
    again.add_trials(study.get_trials())
    again.set_user_attr("first", study.user_attrs["first"])
    resumed = Live(again, make_scheduler(name, most, grace, factor), most, 120)
    scored = [r for r in resumed.searcher.records if r.state in ("COMPLETE", "PRUNED")]
    resumed.scheduler.refill(scored)
    if name == "asha":
        assert held(resumed.scheduler) == {
            milestone: {trial.replace("t", "earlier-"): loss for trial, loss in losses.items()}
            for milestone, losses in held(first.scheduler).items()
        }
    undisturbed = Live(study, first.scheduler, most, 120)
    undisturbed.run(random.Random(2))
    resumed.run(random.Random(2))
    assert len(resumed.said) == 60
    assert resumed.said == undisturbed.said


@pytest.mark.parametrize("name", ["asha", "median"])
def test_the_worst_config_runs_to_its_end_where_it_is_the_reference_and_else_is_stopped(
    name: SchedulerName,
) -> None:
    def said_of(slot: int) -> list[str]:
        scheduler = make_scheduler(name, max_epochs=9, grace_period=1, reduction_factor=3)
        for other in range(1, 5):
            decisions(scheduler, tune_trial(other), [0.1 * other] * 9)
        return decisions(scheduler, tune_trial(slot, "worst"), [0.9] * 9)

    assert said_of(0)[:8] == [CONTINUE] * 8
    assert said_of(5) == [STOP]


@pytest.mark.parametrize("name", ["asha", "median"])
def test_the_reference_counts_for_the_others_like_any_other_trial(name: SchedulerName) -> None:
    def said_of_the_last(slot: int) -> list[str]:
        scheduler = make_scheduler(name, max_epochs=9, grace_period=1, reduction_factor=3)
        decisions(scheduler, tune_trial(slot, "first"), [0.1] * 9)
        decisions(scheduler, tune_trial(3), [0.2] * 9)
        decisions(scheduler, tune_trial(4), [0.3] * 9)
        return decisions(scheduler, tune_trial(5), [0.25] * 9)

    assert said_of_the_last(0) == said_of_the_last(7) == [STOP]


def test_the_median_rule_compares_the_lowest_loss_with_the_running_means_of_three_others() -> None:
    scheduler = make_scheduler("median", max_epochs=4, grace_period=2, reduction_factor=3)
    # Their means from the grace period on are .2, .3 and .4; what came before it is left out.
    for slot, loss in ((1, 0.2), (2, 0.3)):
        assert (
            decisions(scheduler, tune_trial(slot), [9.0, loss, loss, loss])[:3] == [CONTINUE] * 3
        )
    assert decisions(scheduler, tune_trial(3), [9.0, 0.4, 0.4, 0.4])[:3] == [CONTINUE] * 3
    assert decisions(scheduler, tune_trial(4), [0.9, 0.31, 0.31]) == [CONTINUE, STOP]
    assert decisions(scheduler, tune_trial(5), [0.9, 0.29, 0.29]) == [CONTINUE] * 3


@pytest.mark.parametrize("refilled", [False, True])
def test_the_median_rule_counts_the_last_epoch_of_a_trial_once(refilled: bool) -> None:
    """Tune brings it twice; after a resume it is there once, and the decision is the same."""
    scheduler = make_scheduler("median", max_epochs=9, grace_period=1, reduction_factor=3)
    losses = [0.9, 0.6, 0.3]
    if refilled:
        config = SPACE.config(SPACE.defaults())
        rows = [row(epoch, loss) for epoch, loss in enumerate(losses, start=1)]
        scheduler.refill(TrialRecord(n, n, 0, {}, config, epochs=rows) for n in (1, 2, 3))
    else:
        for slot in (1, 2, 3):
            trial = tune_trial(slot)
            assert decisions(scheduler, trial, losses) == [CONTINUE] * 3
            scheduler.on_trial_complete(NOBODY_WAITS, trial, row(3, 0.3))  # it converged
    # The mean of what the others had by then is .6.
    assert decisions(scheduler, tune_trial(4), [0.85, 0.58, 0.55]) == [CONTINUE] * 3


@pytest.mark.parametrize("name", ["asha", "median", "none"])
def test_no_scheduler_pauses_a_trial_for_those_that_wait(name: SchedulerName) -> None:
    """A paused function would begin anew: nothing of it is checkpointed."""
    running = [tune_trial(0), tune_trial(1)]
    waiting = tune_trial(2, status=Trial.PENDING)
    controller: Any = SimpleNamespace(get_live_trials=lambda: [*running, waiting])
    scheduler = make_scheduler(name, max_epochs=9, grace_period=1, reduction_factor=3)
    for trial in running:
        assert PAUSE not in decisions(scheduler, trial, [0.5] * 8, controller)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_trial_that_failed_leaves_no_trace_in_later_decisions(name: SchedulerName) -> None:
    def said(*, with_failures: bool) -> list[list[str]]:
        scheduler = make_scheduler(name, max_epochs=27, grace_period=1, reduction_factor=3)
        out = []
        for slot in range(1, 40):
            if with_failures and slot % 3 == 0:
                # So good that it would stop the others if it counted, and never stopped itself.
                failing = tune_trial(slot, f"failing-{slot}")
                assert decisions(scheduler, failing, [0.001 / slot] * 20) == [CONTINUE] * 20
                scheduler.on_trial_error(NOBODY_WAITS, failing)
            losses = [result["val_loss"] for result in curve(slot, 27)]
            out.append(decisions(scheduler, tune_trial(slot), losses))
        return out

    clean = said(with_failures=False)
    assert said(with_failures=True) == clean
    assert len({len(each) for each in clean}) > 3


@pytest.fixture
def development(own_csv: Path) -> Development:
    task = own_task(load_own(own_csv), "verdict")
    return prepare(task, freeze(task, seed=0, split=(0.6, 0.2, 0.2), folds=3))[0]


@pytest.mark.usefixtures("one_thread")
def test_a_loss_that_becomes_nan_never_sits_in_a_rung_and_takes_its_trial_out_of_all(
    development: Development,
) -> None:
    """Any loss would be better than a NaN that is not smaller than the cutoff."""
    scheduler = make_scheduler("asha", max_epochs=9, grace_period=1, reduction_factor=3)
    decisions(scheduler, tune_trial(0), [0.9] * 9)
    before = held(scheduler)
    config = SPACE.config({**SPACE.defaults(), "model.depth": 2, "model.width_2": 8})
    fit = Fit(config, development, development.folds, replica_seeds(1, 3))
    trial = tune_trial(1)
    scheduler.on_trial_add(NOBODY_WAITS, trial)
    reported: list[dict[str, Any]] = []

    def until_it_raises() -> None:
        for record in fit.epochs(9):
            result = {**report_row(record), "training_iteration": record.epoch}
            scheduler.on_trial_result(NOBODY_WAITS, trial, result)
            reported.append(result)
            if record.epoch == 4:
                with torch.no_grad():
                    fit.network.head.bias.fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match="epoch 5 is not finite"):
        until_it_raises()
    assert len(reported) == 4
    inside = held(scheduler)
    assert [len(losses) for losses in inside.values()] == [1, 2, 2]
    assert all(math.isfinite(loss) for losses in inside.values() for loss in losses.values())
    scheduler.on_trial_error(NOBODY_WAITS, trial)
    assert held(scheduler) == before


def test_without_a_scheduler_nothing_is_stopped() -> None:
    scheduler = make_scheduler("none", max_epochs=9, grace_period=1, reduction_factor=3)
    for slot in range(20):
        losses = [float(slot)] * 9
        assert decisions(scheduler, tune_trial(slot), losses) == [CONTINUE] * 9
