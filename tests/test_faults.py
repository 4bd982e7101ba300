"""Real faults of trials, workers, disks and terminals: none ends a search or goes unsaid."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from searches import (
    check_whole,
    curves,
    finish,
    only_run,
    read,
    start,
    wait_for,
    wait_for_line,
)

from tune_steel.limits import limit_memory, watched

pytestmark = pytest.mark.ray
FAULTY = (Path(__file__).parent / "faulty_search.py",)


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    return tmp_path


def small(space_file: Path) -> tuple[object, ...]:
    given = ("--task", "binary", "--source", "stand-in", "--space", space_file)
    return (*given, "--max-epochs", 3, "--folds", 2)


def test_each_fault_costs_its_own_trial_at_most(
    faulty: Path, space_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {1: "raise", 2: "kill-once", 3: "kill", 4: "exit-once", 5: "hang-once", 6: "memory"}
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    limits = ("--memory", "1GB", "--epoch-timeout", "20s", "--max-failures", 1)
    process = start(faulty, *small(space_file), "--samples", 9, *limits, script=FAULTY)
    code, out, err = finish(process)
    assert code == 0, err
    assert "Test scores on 97 rows" in out
    trials = check_whole(only_run(faulty), 9)
    ends = trials.groupby("slot")["state"].apply(list).to_dict()
    fine = {slot: states[-1] for slot, states in ends.items()}
    assert all(fine[slot] in ("COMPLETE", "PRUNED") for slot in (0, 2, 4, 5, 7, 8))
    assert ends[1] == ["FAIL"]  # what a trial raised, it would raise again
    assert ends[3] == ["LOST", "FAIL"]
    assert ends[6] == ["FAIL"]
    for slot in (2, 4, 5):
        assert ends[slot][0] == "LOST"
        assert len(ends[slot]) == 2
    errors = trials[trials["state"] == "FAIL"].set_index("slot")["error"]
    assert errors[1] == "ValueError: no such thing"
    assert re.search(r"ActorDiedError.*\(2 times\)", errors[3])
    assert "Unable to allocate 128. MiB" in errors[6]


def test_each_fault_of_a_member_that_is_trained_again_costs_its_own_place(
    faulty: Path, space_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {1: "kill", 2: "kill-once", 3: "raise", 4: "memory"}
    monkeypatch.setenv("FAULTS", json.dumps({f"again {slot}": f for slot, f in faults.items()}))
    limits = ("--memory", "1GB", "--max-failures", 1, "--scheduler", "none")
    code, out, err = finish(
        start(faulty, *small(space_file), "--samples", 5, *limits, script=FAULTY)
    )
    assert code == 0, err
    run = only_run(faulty)
    trials = check_whole(run, 5).set_index("slot")["trial"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    kept = {member["trial"] for member in record["ensemble"]["members"]}
    assert kept == {trials[0], trials[2]}
    said = {
        1: "its worker died",
        3: "ValueError: no such thing",
        4: "Unable to allocate 128. MiB",
    }
    for slot, why in said.items():
        missing = rf"trial {trials[slot]} is missing in the ensemble: .*{re.escape(why)}"
        assert re.search(missing, out)
    assert "raylet" not in out


def test_a_search_whose_trials_all_fail_ends_soon_and_says_why(
    faulty: Path, space_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTS", json.dumps(dict.fromkeys(range(2, 50), "raise")))
    given = ("--samples", 40, "--give-up-after", 3)
    code, out, err = finish(start(faulty, *small(space_file), *given, script=FAULTY))
    assert code == 1
    last = err.splitlines()[-1]
    assert "error: the search ended because 3 trials in a row failed" in last
    assert "the last one with ValueError: no such thing; go on with --resume" in last
    assert out == ""
    run = only_run(faulty)
    # The other worker may have failed before it was told to end.
    assert read(run, "trials")["state"].tolist().count("FAIL") in (3, 4)
    # The cause is mended; what had not failed is not lost.
    code, _, err = finish(start(faulty, "--resume", run, "--samples", 7))
    assert code == 0, err
    check_whole(run, 7)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, left: int = 4096) -> None:
    """Leaves so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(b"\0" * (free - left))


def test_a_full_disk_ends_the_search_with_one_line_and_loses_no_finished_trial(
    small_disk: Path, space_file: Path
) -> None:
    process = start(small_disk, *small(space_file), "--samples", 12)
    wait_for(lambda: curves(small_disk) >= 3)
    fill(small_disk)
    code, _, err = finish(process)
    assert code == 1
    last = err.splitlines()[-1]
    assert "study.journal cannot be written (No space left on device); go on with" in last
    assert "Traceback" not in err
    run = only_run(small_disk)
    before = curves(small_disk)
    (small_disk / "ballast").unlink()
    process = start(small_disk, "--resume", run)
    said = wait_for_line(process, "trials have ended")
    assert int(re.search(r"(\d+) of 12 trials have ended", said)[1]) >= before - 2  # type: ignore[index]
    # Full again, when the search has ended and the models are about to be written.
    wait_for_line(process, "retraining:")
    fill(small_disk)
    code, _, err = finish(process)
    assert code == 1
    assert re.fullmatch(
        r"tune_steel: error: \S+ cannot be written \(No space left on device\); make room or mend "
        rf"the permissions, then go on with --resume {run}",
        err.strip(),
    )
    (small_disk / "ballast").unlink()
    code, _, err = finish(start(small_disk, "--resume", run))
    assert code == 0, err
    check_whole(run, 12)


def test_on_a_full_disk_nothing_begins_and_one_line_says_so(
    small_disk: Path, space_file: Path
) -> None:
    (small_disk / "results").mkdir()
    fill(small_disk, 0)
    code, _, err = finish(start(small_disk, *small(space_file), "--samples", 2))
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert "cannot be written (No space left on device)" in err
    assert err.strip().endswith("then start again")
    assert list((small_disk / "results").iterdir()) == []


@pytest.mark.parametrize("fault", ["full", "no letters for it"])
def test_a_terminal_that_cannot_be_written_costs_no_result(
    space_file: Path, tmp_path: Path, fault: str
) -> None:
    place = Path("/dev/full") if fault == "full" else tmp_path / "printed"
    with place.open("w") as full:
        process = subprocess.run(
            [
                *(sys.executable, "-m", "tune_steel.search"),
                *map(str, (*small(space_file), "--samples", 2)),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            stdout=full,
            stderr=full,
            timeout=240,
            check=False,
        )
    assert process.returncode == 0
    if fault == "no letters for it":
        assert "? accuracy " in place.read_text(encoding="ascii")
    check_whole(only_run(tmp_path), 2)
    assert "Test scores" in (only_run(tmp_path) / "report.txt").read_text()


def test_without_standard_streams_a_search_says_nothing_and_ends_well(
    space_file: Path, tmp_path: Path
) -> None:
    arguments = " ".join(map(str, (*small(space_file), "--samples", 2)))
    command = f"exec {sys.executable} -m tune_steel.search {arguments} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path, timeout=240).returncode == 0
    check_whole(only_run(tmp_path), 2)
    assert "Test scores" in (only_run(tmp_path) / "report.txt").read_text()


def test_a_progress_line_that_raises_ends_nothing() -> None:
    from tune_steel.progress import ProgressLine

    line = ProgressLine(None)  # type: ignore[arg-type]
    line._next = 0
    line.on_step_end(0, [])
    line.close()


def in_a_process(script: str) -> subprocess.CompletedProcess[str]:
    head = "import sys, time, numpy as np; from tune_steel.limits import *\n"
    command = [sys.executable, "-c", head + script]
    # As workers have it: large blocks lie in the heap too.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000000"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_a_memory_limit_raises_in_the_trial_and_is_lifted_by_the_next() -> None:
    done = in_a_process(
        "limit_memory(300_000_000)\n"
        "kept = np.ones(25_000_000)\n"
        "try: np.ones(25_000_000)\n"
        "except MemoryError: print('refused')\n"
        "limit_memory(300_000_000); more = np.ones(25_000_000); print('renewed')\n"
        "limit_memory(None); most = np.ones(100_000_000); print('lifted')"
    )
    assert done.stdout.split() == ["refused", "renewed", "lifted"], done.stderr


def test_what_earlier_trials_freed_is_given_back() -> None:
    done = in_a_process(
        "def held(): return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "before, blocks = held(), [np.ones(250_000) for _ in range(50)]\n"
        "behind = np.ones(250_000)\n"
        "del blocks; print(held() - before > 90_000_000)\n"
        "release_memory(); print(held() - before < 10_000_000)"
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_step_that_takes_too_long_ends_the_process() -> None:
    script = (
        "def steps():\n yield 1\n yield 2\n time.sleep(30)\n"
        "for step in watched(steps(), 2): print(step, flush=True); time.sleep(2.5)\n"
    )
    done = in_a_process(script)
    assert done.stdout.split() == ["1", "2"]  # what is done with a step may take long
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_a_watched_iterator_gives_every_step_and_what_it_raises() -> None:
    assert list(watched(iter("abc"), 60)) == ["a", "b", "c"]

    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("its own")

    steps = watched(fails(), 60)
    assert next(steps) == 1
    with pytest.raises(ValueError, match="its own"):
        next(steps)
    limit_memory(None)
