from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tune_steel.scheduler import make_scheduler, rungs
from tune_steel.searcher import StudySearcher, open_study
from tune_steel.space import load_space, spaces_folder

MOST = 9


@pytest.fixture
def searcher(tmp_path: Path) -> StudySearcher:
    space = load_space(spaces_folder() / "binary.toml")
    return StudySearcher(space, open_study(tmp_path / "j", "run", seed=3), seed=3, max_epochs=MOST)


def result(epoch: int, losses: list[float], *, converged: bool = False) -> dict[str, Any]:
    best = min(losses[:epoch])
    return {
        "epoch": epoch,
        "training_iteration": epoch,
        "val_loss": losses[epoch - 1],
        "best_val_loss": best,
        "best_epoch": losses.index(best) + 1,
        "converged": converged,
        "node": "here",
        "time_total_s": float(epoch),
        "config/seed": 1,
    }


def play(searcher: StudySearcher, losses: list[float], *, converged: bool = False) -> None:
    """One trial as Tune plays it: the last result comes with the end only."""
    name = f"t{len(searcher.records)}"
    searcher.suggest(name)
    for epoch in range(1, len(losses)):
        searcher.on_trial_result(name, result(epoch, losses))
    last = result(len(losses), losses, converged=converged)
    searcher.on_trial_complete(name, last)


def stored(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    return open_study(tmp_path / "j", "run", seed=3).trials


def test_the_first_trial_is_the_default_of_the_space(searcher: StudySearcher) -> None:
    first = searcher.suggest("a")
    space = load_space(spaces_folder() / "binary.toml")
    assert first["number"] == 0
    assert first["config"] == space.config(space.defaults()).as_dict()
    assert searcher.suggest("b")["config"] != first["config"]


def test_every_trial_has_its_own_seed_and_a_run_seed_gives_the_same_ones(tmp_path: Path) -> None:
    space = load_space(spaces_folder() / "binary.toml")

    def seeds(name: str, seed: int) -> list[int]:
        study = open_study(tmp_path / name, "run", seed)
        made = StudySearcher(space, study, seed, MOST)
        return [made.suggest(str(i))["seed"] for i in range(5)]

    assert len(set(seeds("a", 0))) == 5
    assert seeds("b", 0) == seeds("c", 0)
    assert not set(seeds("d", 0)) & set(seeds("e", 1))


def test_a_trial_that_ran_to_its_end_is_complete_with_its_best_loss(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    play(searcher, [0.9, 0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8])
    (trial,) = stored(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert trial.value == 0.5
    assert trial.intermediate_values == {1: 0.9, **dict.fromkeys(range(2, 10), 0.5)}
    assert trial.user_attrs["best_epoch"] == 2
    assert trial.user_attrs["seconds"] == 9.0


def test_a_trial_that_stopped_itself_early_is_complete(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    play(searcher, [0.9, 0.5, 0.7], converged=True)
    assert stored(tmp_path)[0].state == TrialState.COMPLETE


def test_a_trial_that_the_scheduler_stopped_is_pruned_with_its_step_and_no_final_value(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    play(searcher, [0.9, 0.8, 0.7])
    (trial,) = stored(tmp_path)
    assert trial.state == TrialState.PRUNED
    assert trial.last_step == 3
    # Optuna shows a pruned trial's last intermediate value as its value.
    assert trial.intermediate_values[3] == 0.7


def test_a_trial_that_raised_fails_with_its_reason_and_keeps_its_epochs(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, [0.9]))
    searcher.on_trial_complete("a", error=True)
    searcher.fail("a", "NonFiniteLossError: the loss of epoch 2 is not finite")
    (trial,) = stored(tmp_path)
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["error"].startswith("NonFiniteLossError")
    assert [row["epoch"] for row in searcher.records[0].epochs] == [1]


def test_closing_leaves_no_trial_running_in_the_study(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, [0.9]))
    searcher.suggest("b")
    searcher.close()
    assert [t.state for t in stored(tmp_path)] == [TrialState.FAIL, TrialState.FAIL]
    assert [r.state for r in searcher.records] == ["INTERRUPTED", "INTERRUPTED"]


def test_an_epoch_that_tune_brings_twice_counts_once(searcher: StudySearcher) -> None:
    play(searcher, [0.9, 0.8])
    searcher.suggest("b")
    searcher.on_trial_result("b", result(1, [0.9, 0.8]))
    searcher.on_trial_result("b", result(1, [0.9, 0.8]))
    assert len(searcher.records[1].epochs) == 1


@pytest.mark.parametrize(
    ("most", "grace"),
    [(m, g) for m in (1, 2, 5, 9, 18, 27, 50, 100) for g in (1, 3, 6) if g <= m],
)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_rungs_are_those_of_rays_asha(most: int, grace: int, factor: int) -> None:
    scheduler = ASHAScheduler(max_t=most, grace_period=grace, reduction_factor=factor)
    theirs = sorted(milestone for milestone, _ in scheduler._brackets[0]._rungs)
    # A milestone at the last epoch stops nothing.
    assert list(rungs(most, grace, factor)) == ([m for m in theirs if m < most] or [grace])


class _Trial:
    def __init__(self, number: int) -> None:
        self.trial_id = f"t{number}"
        self.config = {"number": number}


def test_asha_stops_the_worse_trials_but_never_the_default_config() -> None:
    scheduler: Any = make_scheduler(max_epochs=9, grace_period=3, reduction_factor=3)
    decisions = {}
    for number, loss in [(1, 0.1), (2, 0.2), (0, 0.9), (3, 0.8)]:
        trial = _Trial(number)
        scheduler.on_trial_add(None, trial)
        decisions[number] = scheduler.on_trial_result(
            None, trial, {"training_iteration": 3, "best_val_loss": loss}
        )
    stop, go_on = TrialScheduler.STOP, TrialScheduler.CONTINUE
    assert decisions == {1: go_on, 2: stop, 0: go_on, 3: stop}
    assert len(scheduler._brackets[0]._rungs[-1][1]) == 4
    last = {"training_iteration": 9, "best_val_loss": 0.9}
    assert scheduler.on_trial_result(None, _Trial(0), last) == stop
