"""The journal that writes many lines at once holds what Optuna's own would, at any moment."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tune_steel.journal import Journal, together
from tune_steel.space import Space, load_space
from tune_steel.study import (
    ask,
    begin,
    heal_journal,
    open_study,
    read_records,
    reclaim,
    report,
    tell,
)


@pytest.fixture
def space(space_file: Path) -> Space:
    return load_space(space_file)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def plain_study(path: Path) -> optuna.Study:
    """With the backend that everybody else has."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(study_name="run", storage=storage, load_if_exists=True)


def play(study: optuna.Study, space: Space, trials: int, epochs: int = 3) -> None:
    """Searches, two trials at once."""
    running: list[Any] = []
    for number in range(trials + 1):
        if number < trials:
            running.append(ask(study, space, "tpe", seed=0))
        if number == 0:
            continue
        trial, record = running.pop(0)
        for epoch in range(1, epochs + 1):
            loss = record.params["optimizer.lr"] + 1 / epoch
            row = {"epoch": epoch, "best_epoch": epoch, "best_val_loss": loss, "node": "here"}
            record.epochs.append(row)
            report(study, [(trial, epoch, loss)])
        record.state = ("COMPLETE", "PRUNED", "FAIL")[record.number % 3]
        tell(study, trial, record)


def contents(study: optuna.Study) -> list[dict[str, Any]]:
    """All that a study holds, without times."""
    times = ("_datetime_start", "datetime_complete")
    trials = study.get_trials(deepcopy=False)
    return [{k: v for k, v in vars(t).items() if k not in times} for t in trials]


def lines(path: Path) -> list[dict[str, Any]]:
    """What is written, without who and when."""
    each = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("datetime", "worker"))}
        for line in each
    ]


def test_it_writes_what_optunas_own_backend_writes_and_both_read_it(
    tmp_path: Path, space: Space
) -> None:
    studies = [open_study(tmp_path / "a", "run"), plain_study(tmp_path / "b")]
    for study in studies:
        begin(study, [space.defaults()])
        play(study, space, 15)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert contents(studies[0]) == contents(studies[1])
    for opened in (plain_study(tmp_path / "a"), open_study(tmp_path / "b", "run")):
        assert contents(opened) == contents(studies[0])
    assert len(read_records(studies[0], space, 0)) == 15


def test_a_trial_waits_for_the_disk_once(
    path: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (synced.append(file), real(file))[1])
    study = open_study(path, "run")
    assert len(synced) == 1
    begin(study, [space.defaults()] * 4)
    assert len(synced) == 2
    play(study, space, 5)
    assert len(synced) == 2 + 5


def test_the_end_of_a_trial_is_on_the_disk_when_it_has_been_told(
    path: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[bytes] = []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (real(file), on_disk.append(path.read_bytes())))
    study = open_study(path, "run")
    play(study, space, 1)
    assert on_disk[-1] == path.read_bytes()
    path.write_bytes(on_disk[-1])
    assert contents(plain_study(path)) == contents(study)


def test_what_was_done_before_an_exception_is_written(path: Path) -> None:
    study = open_study(path, "run")

    def fails() -> None:
        with together(study, durable=False):
            study.set_user_attr("a", 1)
            assert study.user_attrs == {"a": 1}
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    study.set_user_attr("b", 2)
    assert study.user_attrs == plain_study(path).user_attrs == {"a": 1, "b": 2}


def test_a_full_disk_raises_at_the_end_of_a_block_and_keeps_no_lock(path: Path) -> None:
    study = open_study(path, "run")
    path.unlink()
    path.symlink_to("/dev/full")  # the kernel's own full disk
    for _ in range(2):
        with (
            pytest.raises(OSError, match="No space left"),
            together(study, durable=False),
        ):
            study.set_user_attr("a", 1)
    assert not path.with_name("study.journal.lock").is_symlink()


def test_nothing_follows_a_line_that_may_have_been_cut(path: Path) -> None:
    journal = Journal(path)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        journal.append_logs([{"op_code": 1}])
    path.unlink()
    path.write_text('{"op_co')  # there is room again
    with pytest.raises(OSError, match="No space left"):
        journal.append_logs([{"op_code": 2}])
    assert path.read_text() == '{"op_co'


def test_it_can_be_cut_off_anywhere_and_every_trial_ends_once(
    path: Path, space: Space, tmp_path: Path
) -> None:
    """A block is written in the order in which it was done, so any part of it is a beginning."""
    study = open_study(path, "run")
    begin(study, [space.defaults()])
    play(study, space, 2, epochs=1)
    whole = path.read_bytes().splitlines(keepends=True)
    other = tmp_path / "cut"
    for count in range(1, len(whole)):
        rest = whole[count][: 20 * (count % 2)]
        other.write_bytes(b"".join(whole[:count]) + rest)
        assert bool(heal_journal(other)) == bool(rest)
        again = open_study(other, "run")
        assert contents(again) == contents(plain_study(other))
        reclaim(again, space)
        play(again, space, 2, epochs=1)
        ended = [r for r in read_records(again, space, 0) if r.state != "INTERRUPTED"]
        assert sorted(r.slot for r in ended) == list(range(len(ended)))
        assert not [t for t in again.trials if t.state == TrialState.RUNNING]


def test_of_a_block_in_which_the_process_is_killed_nothing_is_left(
    path: Path, space_file: Path
) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from tune_steel.journal import together; from tune_steel.study import open_study\n"
        "study = open_study(Path(sys.argv[1]), 'run')\n"
        "study.set_user_attr('before', 1)\n"
        "with together(study, durable=True):\n"
        "    study.set_user_attr('inside', 1); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.with_name("study.journal.lock").is_symlink()
    assert heal_journal(path) is None
    assert open_study(path, "run").user_attrs == {"before": 1}


def test_another_process_may_write_with_optunas_own_backend_meanwhile(
    path: Path, space: Space
) -> None:
    """As the dashboard does when somebody writes a note."""
    study = open_study(path, "run")
    script = (
        "import optuna, sys; from optuna.storages import JournalStorage\n"
        "from optuna.storages.journal import JournalFileBackend\n"
        "study = optuna.load_study(study_name='run',"
        " storage=JournalStorage(JournalFileBackend(sys.argv[1])))\n"
        "print('open', flush=True)\n"
        "for n in range(60):\n"
        "    study.set_user_attr(f'note {n}', n); study.tell(study.ask(), 99.0)"
    )
    command = [sys.executable, "-c", script, str(path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    while other.poll() is None:
        play(study, space, 3)
        # Optuna's lock is nobody's turn: one who never rests keeps it from all others.
        time.sleep(0.05)
    assert other.communicate()[1] == ""
    play(study, space, 3)
    assert contents(study) == contents(plain_study(path)) == contents(open_study(path, "run"))
    assert study.user_attrs == {f"note {n}": n for n in range(60)}
    mine = [t for t in study.trials if "slot" in t.user_attrs]
    assert len(study.trials) == 60 + len(mine)
    assert [t.user_attrs["slot"] for t in mine] == list(range(len(mine)))
    assert all(t.intermediate_values for t in mine)


def test_another_thread_may_write_without_blocks_meanwhile(path: Path) -> None:
    """As the sampler does that thinks in the background."""
    study = open_study(path, "run")
    done = threading.Event()

    def asks() -> None:
        for value in range(50):
            trial = study.ask()
            assert trial.suggest_float("x", 0, 1) == trial.params["x"]
            study.tell(trial, value)
        done.set()

    thread = threading.Thread(target=asks)
    thread.start()
    count = 0
    while not done.is_set():
        with together(study, durable=False):
            for _ in range(5):
                study.set_user_attr("count", count)
                assert study.user_attrs["count"] == count
                count += 1
    thread.join()
    assert [t.value for t in study.trials] == list(range(50))
    assert contents(study) == contents(plain_study(path))
    assert sum("user_attr" in line for line in lines(path)) == count


def test_the_waiting_trials_are_optunas(path: Path) -> None:
    study = open_study(path, "run")
    waiting = (TrialState.WAITING,)
    for number in range(12):
        if number % 3 != 2:
            study.enqueue_trial({"x": number})
        other = plain_study(path)
        if number % 4 == 3:
            other.enqueue_trial({"x": -number})
        if number % 2:
            (other if number % 5 else study).ask()
        found = study.get_trials(deepcopy=bool(number % 2), states=waiting)
        assert found == plain_study(path).get_trials(states=waiting)
    assert len(found) > 2


def test_a_pickled_study_is_the_study(path: Path, space: Space) -> None:
    study = open_study(path, "run")
    play(study, space, 2)
    again = pickle.loads(pickle.dumps(study))
    assert contents(again) == contents(study)
    play(again, space, 1)
    assert contents(again) == contents(study)


def test_a_journal_that_was_read_in_part_is_read_on(path: Path) -> None:
    writer, reader = Journal(path), Journal(path)
    writer.append_logs([{"n": n} for n in range(5)])
    assert next(iter(reader.read_logs(0))) == {"n": 0}
    assert [line["n"] for line in reader.read_logs(1)] == [1, 2, 3, 4]
    assert [line["n"] for line in reader.read_logs(3)] == [3, 4]
    with path.open("ab") as file:
        file.write(b'{"n": 5')
        file.flush()
        assert list(reader.read_logs(5)) == []
        file.write(b"}\n")
    assert list(reader.read_logs(5)) == [{"n": 5}]
