"""Which trials go on after the search."""

from pathlib import Path

import pytest
from conftest import SMALL_SPACE
from searches import options_of

from tune_steel.choice import candidates, choose, members
from tune_steel.space import Space, load_space
from tune_steel.study import TrialRecord

OPTIONS = options_of(max_epochs=50, grace_period=6)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "s.toml").write_text(SMALL_SPACE)
    return load_space(tmp_path / "s.toml")


def ended(
    number: int, state: str, epochs: int, loss: float, space: Space, family: str = "mlp"
) -> TrialRecord:
    values = space.defaults()
    curve = [{"best_val_loss": loss, "best_epoch": 1} for _ in range(epochs)]
    config = space.config(values)
    model = config.model.model_copy(update={"family": family})
    config = config.model_copy(update={"model": model})
    return TrialRecord(number, number, 0, values, config, state=state, epochs=curve)


def numbers(records: list[TrialRecord]) -> list[int]:
    return [record.number for record in records]


def test_the_lowest_loss_wins_among_trials_that_had_a_full_chance(space: Space) -> None:
    # Rungs are at 6 and 18: a trial that was stopped at 6 had none, however good it looked.
    records = [
        ended(0, "COMPLETE", 50, 0.50, space),
        ended(1, "PRUNED", 6, 0.10, space),
        ended(2, "PRUNED", 18, 0.40, space),
        ended(3, "FAIL", 30, 0.05, space),
        ended(4, "INTERRUPTED", 40, 0.01, space),
        ended(5, "COMPLETE", 12, 0.45, space),
    ]
    assert numbers(candidates(records, OPTIONS)) == [2, 5, 0]
    best = choose(records, OPTIONS)
    assert best is not None
    assert best.number == 2


def test_a_search_that_was_cut_short_takes_the_best_of_what_the_scheduler_stopped(
    space: Space,
) -> None:
    records = [
        ended(0, "INTERRUPTED", 40, 0.1, space),
        ended(1, "PRUNED", 6, 0.4, space),
        ended(2, "PRUNED", 6, 0.3, space),
    ]
    assert numbers(candidates(records, OPTIONS)) == [2, 1]
    assert choose(records[:1], OPTIONS) is None


def test_the_members_are_the_best_and_the_last_place_is_another_familys(space: Space) -> None:
    ranked = [
        ended(i, "COMPLETE", 9, i / 10, space, family)
        for i, family in enumerate(["mlp", "mlp", "mlp", "mlp", "tabm", "resnet", "tabm"])
    ]
    assert numbers(members(ranked, 3)) == [0, 1, 4]
    assert numbers(members(ranked, 5)) == [0, 1, 2, 3, 4]  # it is among the best already
    assert numbers(members(ranked, 1)) == [0]
    assert numbers(members(ranked[:4], 3)) == [0, 1, 2]  # there is one family only
    assert numbers(members(ranked, 99)) == list(range(7))
    assert numbers(members(ranked[:4], 99)) == [0, 1, 2, 3]
    assert numbers(members(ranked[:1], 10)) == [0]
