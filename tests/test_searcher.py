import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

import tune_steel.searcher
import tune_steel.study
from tune_steel.budget import Budget
from tune_steel.errors import RunError
from tune_steel.scheduler import make_scheduler, rungs
from tune_steel.searcher import StudySearcher
from tune_steel.space import load_space, spaces_folder
from tune_steel.study import (
    TrialRecord,
    begin,
    enqueue,
    heal_journal,
    open_study,
    read_records,
    run_lock,
)

MOST = 9


def searcher_of(study: optuna.Study, seed: int = 3, **changed: Any) -> StudySearcher:
    space = load_space(spaces_folder() / "binary.toml")
    if not study.user_attrs:
        begin(study, [space.defaults()])
    given: dict[str, Any] = {"search": "tpe", "max_epochs": MOST, "budget": Budget(100), **changed}
    return StudySearcher(space, study, seed=seed, **given)


@pytest.fixture
def searcher(tmp_path: Path) -> StudySearcher:
    return searcher_of(open_study(tmp_path / "j", "run"))


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
    return open_study(tmp_path / "j", "run").trials


def test_the_first_trial_is_the_default_of_the_space(searcher: StudySearcher) -> None:
    first = searcher.suggest("a")
    space = load_space(spaces_folder() / "binary.toml")
    assert first["number"] == 0
    assert first["config"] == space.config(space.defaults()).as_dict()
    assert searcher.suggest("b")["config"] != first["config"]


def test_every_trial_has_its_own_seed_and_a_run_seed_gives_the_same_ones(tmp_path: Path) -> None:
    def seeds(name: str, seed: int) -> list[int]:
        made = searcher_of(open_study(tmp_path / name, "run"), seed)
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


def test_epochs_are_written_together_and_before_the_end_of_any_trial(
    searcher: StudySearcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report alone costs the journal's lock and file; a kill may lose half a second of them."""
    now = 100.0
    monkeypatch.setattr(tune_steel.searcher.time, "monotonic", lambda: now)
    losses = [0.9, 0.8, 0.7, 0.6, 0.5]
    for name in "ab":
        searcher.suggest(name)

    def written() -> list[list[int]]:
        return [list(trial.intermediate_values) for trial in stored(tmp_path)]

    searcher.on_trial_result("a", result(1, losses))
    assert written() == [[1], []]
    searcher.on_trial_result("a", result(2, losses))
    searcher.on_trial_result("b", result(1, losses))
    assert written() == [[1], []]
    now += 1
    searcher.on_trial_result("b", result(2, losses))
    assert written() == [[1, 2], [1, 2]]
    searcher.on_trial_result("b", result(3, losses))
    searcher.on_trial_complete("a", result(3, losses))
    assert written() == [[1, 2, 3], [1, 2, 3]]
    searcher.on_trial_result("b", result(4, losses))
    searcher.close()
    assert written() == [[1, 2, 3], [1, 2, 3, 4]]


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
    searcher.fail("a", "NonFiniteLossError: the loss of epoch 2 is not finite", lost=False)
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
        self.config = {"number": number, "slot": number}


def test_asha_stops_the_worse_trials_but_never_the_default_config() -> None:
    scheduler: Any = make_scheduler("asha", max_epochs=9, grace_period=3, reduction_factor=3)
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


def random_losses(seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.random() for _ in range(rng.choice([3, MOST]))]


def plain(record: TrialRecord) -> dict[str, Any]:
    return {**vars(record), "config": record.config.as_dict(), "ended": None}


def test_what_the_journal_gives_back_is_what_the_searcher_knew(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    for seed in range(12):
        play(searcher, random_losses(seed))
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, [0.9]))
    searcher.on_trial_complete("a", error=True)
    searcher.fail("a", "ValueError: no", lost=False)
    searcher.close()
    study = open_study(tmp_path / "j", "run")
    read = read_records(study, load_space(spaces_folder() / "binary.toml"), 3)
    assert [plain(r) for r in read] == [plain(r) for r in searcher.records]


def test_a_search_that_is_gone_on_with_samples_what_it_would_have_sampled(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    """Across the end of the start-up points, and with a trial that was running at the kill."""
    other = searcher_of(open_study(tmp_path / "whole", "run"))
    for seed in range(20):
        play(other, random_losses(seed))
    for seed in range(7):
        play(searcher, random_losses(seed))
    searcher.suggest("running")
    searcher.on_trial_result("running", result(1, [0.5]))
    second = searcher_of(open_study(tmp_path / "j", "run"))  # the first one was killed
    assert second.queued == 1
    for seed in range(7, 13):
        play(second, random_losses(seed))
    second.suggest("running")
    second.close()
    third = searcher_of(open_study(tmp_path / "j", "run"))
    for seed in range(13, 20):
        play(third, random_losses(seed))
    ended = [r for r in third.records if r.state != "INTERRUPTED"]
    assert [r.state for r in third.records].count("INTERRUPTED") == 2
    assert [(r.slot, r.seed, r.params) for r in ended] == [
        (r.slot, r.seed, r.params) for r in other.records
    ]
    assert len({tuple(r.params.items()) for r in ended}) == 20


def test_a_lost_worker_costs_nothing_but_time_until_it_happens_too_often(
    tmp_path: Path,
) -> None:
    searcher = searcher_of(open_study(tmp_path / "j", "run"), max_failures=2)
    play(searcher, [0.9] * MOST)
    for name in "abc":
        searcher.suggest(name)
        searcher.on_trial_result(name, result(1, [0.5]))
        searcher.on_trial_complete(name, error=True)
        searcher.fail(name, "ActorDiedError: gone", lost=True)
    tries = searcher.records[1:]
    assert [r.state for r in tries] == ["LOST", "LOST", "FAIL"]
    assert len({(r.seed, tuple(r.params.items())) for r in tries}) == 1
    assert [r.retry_of for r in tries] == [None, 1, 2]
    assert tries[-1].error == "ActorDiedError: gone (3 times)"
    assert searcher.ended == 2


def test_samples_are_the_trials_that_end_and_a_lost_one_comes_again(tmp_path: Path) -> None:
    searcher = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(3), max_failures=1)
    for name in "abc":
        assert searcher.suggest(name) is not None
    assert searcher.suggest("d") is None  # not finished: a worker may die
    searcher.on_trial_complete("b", error=True)
    searcher.fail("b", "ActorDiedError: gone", lost=True)
    again = searcher.suggest("d")
    assert again["seed"] == searcher.records[1].seed
    for name in "acd":
        searcher.on_trial_complete(name, result(1, [0.5], converged=True))
    assert searcher.suggest("e") == Searcher.FINISHED
    assert searcher.ended == 3


def test_a_journal_that_cannot_be_written_ends_the_search(
    searcher: StudySearcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher.suggest("a")
    journal = tmp_path / "j"
    before = journal.read_bytes()
    journal.unlink()
    journal.symlink_to("/dev/full")  # the kernel's own full disk
    searcher.on_trial_result("a", result(1, [0.5]))
    assert searcher.stop.now
    assert searcher.stop.failed
    assert "No space left on device" in str(searcher.stop.reason)
    searcher.on_trial_result("a", result(2, [0.5, 0.4]))
    searcher.close()
    journal.unlink()
    journal.write_bytes(before)
    assert [t.state for t in stored(tmp_path)] == [TrialState.RUNNING]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_journal_whose_last_line_was_cut_off_is_healed_and_loses_no_other_line(
    searcher: StudySearcher, tmp_path: Path, cut: int
) -> None:
    for seed in range(3):
        play(searcher, random_losses(seed))
    journal = tmp_path / "j"
    assert heal_journal(journal) is None
    lines = journal.read_bytes().splitlines(keepends=True)
    curve = next(i for i, line in enumerate(lines) if b'"curve"' in line)
    journal.write_bytes(b"".join(lines[:curve]) + lines[curve][:-cut])
    assert "has been removed" in str(heal_journal(journal))
    assert journal.read_bytes() == b"".join(lines[:curve])
    again = searcher_of(open_study(journal, "run"))
    assert again.queued == 1
    assert again.suggest("a")["config"] == searcher.records[0].config.as_dict()


@pytest.mark.parametrize("damage", [b"\0" * 40, b"5", b"{}", b'[["op_code"]]'])
def test_a_journal_with_a_damaged_line_is_refused_with_its_number(
    searcher: StudySearcher, tmp_path: Path, damage: bytes
) -> None:
    play(searcher, [0.9] * MOST)
    journal = tmp_path / "j"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], damage + b"\n", *lines[6:]]))
    with pytest.raises(RunError, match="line 6 is damaged"):
        heal_journal(journal)


def test_a_lock_that_a_killed_process_left_in_the_journal_is_not_waited_for(
    searcher: StudySearcher, tmp_path: Path
) -> None:
    (tmp_path / "j.lock").symlink_to(tmp_path / "j")
    heal_journal(tmp_path / "j")
    started = time.monotonic()
    play(searcher_of(open_study(tmp_path / "j", "run")), [0.9])
    assert time.monotonic() - started < 10


def test_a_second_process_is_refused_and_a_dead_one_holds_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tune_steel.study import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="another process"), run_lock(tmp_path / "j"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with run_lock(tmp_path / "j"):
        pass


def test_an_epochs_budget_ends_the_search_with_the_epoch_that_uses_it_up(
    tmp_path: Path,
) -> None:
    searcher = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(100, epochs=5))
    play(searcher, [0.9] * 3)
    assert not searcher.stop.now
    play(searcher, [0.9] * 3)
    assert searcher.stop.now
    assert searcher.suggest("x") == Searcher.FINISHED
    # It is of one process.
    again = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(100, epochs=5))
    play(again, [0.9] * 3)
    assert again.stop.reason is None


def test_a_search_without_progress_begins_no_trial_and_lets_the_running_ones_end(
    tmp_path: Path,
) -> None:
    searcher = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(100, stalled=2))
    for loss in (0.9, 0.5, 0.6, 0.4, 0.4):
        play(searcher, [loss] * MOST)
    assert searcher.stop.reason is None
    play(searcher, [0.4] * MOST)
    assert searcher.stop.reason == "2 trials in a row found nothing better"
    assert not searcher.stop.now
    assert searcher.suggest("x") == Searcher.FINISHED
    # A process that goes on has as many trials again, and what was better before is no progress.
    again = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(100, stalled=2))
    play(again, [0.41] * MOST)
    assert again.stop.reason is None
    play(again, [0.42] * MOST)
    assert again.stop.reason == "2 trials in a row found nothing better"


def test_a_given_config_that_was_killed_half_sampled_is_given_again(tmp_path: Path) -> None:
    space = load_space(spaces_folder() / "binary.toml")
    study = open_study(tmp_path / "j", "run")
    begin(study, [space.defaults()])
    enqueue(study, space.defaults(), 0)
    trial = study.ask()
    trial.set_user_attr("slot", 0)
    trial.suggest_float("optimizer.lr", 1e-4, 3e-2, log=True)
    assert len(trial.params) == 1  # the process is killed here
    searcher = searcher_of(open_study(tmp_path / "j", "run"))
    assert searcher.queued == 1
    searcher.suggest("a")
    assert searcher.records[-1].params == space.defaults()


def test_given_configs_keep_their_turn_when_the_first_one_is_killed(tmp_path: Path) -> None:
    space = load_space(spaces_folder() / "binary.toml")
    given = [space.defaults(), *(space.defaults() | {"optimizer.lr": lr} for lr in (0.01, 0.02))]
    begin(open_study(tmp_path / "j", "run"), given)
    searcher_of(open_study(tmp_path / "j", "run")).suggest("killed while it runs")
    searcher = searcher_of(open_study(tmp_path / "j", "run"))
    for name in "abcd":
        searcher.suggest(name)
    again = [r for r in searcher.records if r.state == "RUNNING"]
    assert [r.slot for r in again] == [0, 1, 2, 3]
    assert [r.params for r in again[:3]] == given
    assert [r.retry_of for r in again] == [0, None, None, None]


def test_a_config_queued_again_while_another_is_thought_about_keeps_its_slot_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = searcher_of(open_study(tmp_path / "j", "run"), max_failures=1)
    searcher.suggest("a")
    study = searcher._study
    real = tune_steel.study.make_sampler

    def make_sampler(*given: Any) -> Any:
        searcher.on_trial_complete("a", error=True)
        searcher.fail("a", "ActorDiedError: gone", lost=True)
        monkeypatch.setattr(tune_steel.study, "make_sampler", real)
        return real(*given)

    monkeypatch.setattr(tune_steel.study, "make_sampler", make_sampler)
    _, record = tune_steel.study._ask(study, searcher._space, "random", 3, None)
    first = searcher.records[0]
    assert (record.retry_of, record.slot, record.seed) == (0, first.slot, first.seed)
    assert record.params == first.params
    assert tune_steel.study.next_slot(study) == 1


def test_failures_in_a_row_end_the_search_and_one_success_forgives_them(tmp_path: Path) -> None:
    searcher = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(100, give_up_after=3))

    def fail() -> None:
        name = f"f{len(searcher.records)}"
        searcher.suggest(name)
        searcher.on_trial_complete(name, error=True)
        searcher.fail(name, "ValueError: no", lost=False)

    fail()
    fail()
    play(searcher, [0.9] * 3)
    fail()
    fail()
    assert searcher.stop.reason is None
    fail()
    assert searcher.stop.failed
    assert "3 trials in a row failed, the last one with ValueError: no" in searcher.stop.reason
    again = searcher_of(open_study(tmp_path / "j", "run"), budget=Budget(100, give_up_after=3))
    assert again.stop.reason is None


def test_a_node_that_takes_many_trials_with_it_is_no_row_of_failures(tmp_path: Path) -> None:
    given = {"budget": Budget(100, give_up_after=3), "max_failures": 1}
    searcher = searcher_of(open_study(tmp_path / "j", "run"), **given)

    def lose(names: str) -> None:
        for name in names:
            searcher.suggest(name)
        for name in names:
            searcher.on_trial_complete(name, error=True)
            searcher.fail(name, "ActorDiedError: gone", lost=True)

    lose("abcdefgh")
    assert [record.state for record in searcher.records] == ["LOST"] * 8
    assert searcher.stop.reason is None
    lose("ij")  # the first two configs once more: now they fail
    assert searcher.stop.reason is None
    lose("k")
    assert searcher.stop.failed
    assert "3 trials in a row failed, the last one with ActorDiedError" in searcher.stop.reason


def test_a_slow_sampler_in_a_thread_keeps_no_report_waiting(
    searcher: StudySearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher.suggest("a")
    searcher.background = True
    slow = threading.Event()
    real = tune_steel.searcher.ask

    def ask(*arguments: Any) -> Any:
        assert slow.wait(30)
        return real(*arguments)

    monkeypatch.setattr("tune_steel.searcher.ask", ask)
    assert searcher.suggest("b") is None
    searcher.on_trial_result("a", result(1, [0.5]))
    assert searcher.records[0].epochs
    slow.set()
    deadline = time.monotonic() + 30
    found = None
    while found is None and time.monotonic() < deadline:
        found = searcher.suggest("b")
    assert found["number"] == 1
    assert searcher.suggest("c") is None  # asked for, and not taken before the end
    searcher.close()
    assert [r.state for r in searcher.records] == ["INTERRUPTED", "INTERRUPTED"]
    assert TrialState.RUNNING not in [t.state for t in searcher._study.trials]
