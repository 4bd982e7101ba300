"""Where the time went: from counted seconds to a table."""

import subprocess
import sys
import time
from typing import Any

import pytest

from tune_steel.profile import Times, breakdown, process_age, profile_table
from tune_steel.summary import render


def epoch(**seconds: float) -> dict[str, Any]:
    return {f"{name}_seconds": value for name, value in seconds.items()} | {"epoch": 1}


@pytest.fixture
def times() -> Times:
    times = Times(slots=2, start=5.0, search=10.0, sampling=0.5, retraining=3.0)
    times.add_epoch({"seconds": 8.0, **epoch(scoring=1.0, preparing=2.0, waiting=0.0)})
    times.add_epoch({"seconds": 6.0, **epoch(scoring=2.0, preparing=0.0, waiting=0.5)})
    return times


def test_what_no_epoch_took_of_the_slots_lies_between_trials(times: Times) -> None:
    profile = breakdown(times)
    assert profile["slot_seconds"] == 20.0
    assert profile["slots"] == {
        "training": 11.0,
        "scoring": 3.0,
        "preparing": 2.0,
        "waiting": 0.5,
        "between": 3.5,
    }
    assert sum(profile["slots"].values()) == profile["slot_seconds"]
    assert profile["driver"] == {"sampling": 0.5, "reporting": 0.0}
    assert profile["wall"]["start"] == 5.0


def test_the_first_epoch_is_when_its_training_began() -> None:
    times = Times()
    before = process_age()
    times.add_epoch({"seconds": 2.0})
    first = breakdown(times)["first_epoch"]
    assert before - 2.0 <= first <= process_age() - 2.0
    times.add_epoch({"seconds": 1.0})
    assert breakdown(times)["first_epoch"] == first
    text = render(profile_table(breakdown(times)), terminal=False)
    assert f"first epoch at {first:.1f} s" in text
    assert "first epoch" not in render(profile_table(breakdown(Times())), terminal=False)


def test_shares_are_of_the_slots_and_of_the_search(times: Times) -> None:
    lines = render(profile_table(breakdown(times)), terminal=False).splitlines()
    rows = {line.split()[1]: line.split()[3:] for line in lines if line.startswith("\u2502")}
    assert rows["training"][:3] == ["11.0", "\u2502", "55.0"]
    assert rows["sampling"][:3] == ["0.5", "\u2502", "5.0"]
    assert rows["retraining"][0] == "3.0"


def test_a_run_that_only_retrains_has_no_shares() -> None:
    profile = breakdown(Times(retraining=3.0))
    assert sum(profile["slots"].values()) == 0
    assert "%" not in render(profile_table(profile), terminal=False)


def test_what_happens_inside_is_counted_also_where_it_raises() -> None:
    times = Times()

    def fails() -> None:
        with times.measure("tables"):
            time.sleep(0.01)
            raise ValueError("its own")

    for _ in range(2):
        with pytest.raises(ValueError, match="its own"):
            fails()
    assert times.tables >= 0.02
    assert times.sampling == 0


def test_the_age_of_a_process_counts_from_its_start() -> None:
    script = "import time; time.sleep(0.3); from tune_steel.profile import process_age as age;"
    command = [sys.executable, "-c", script + "print(age())"]
    began = time.monotonic()
    age = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= age <= time.monotonic() - began + 0.02  # the kernel counts in hundredths
    assert process_age() > age
