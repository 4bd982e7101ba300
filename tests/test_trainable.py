"""How epochs are reported: each while the next one is made, but not past one that may be the last.

The driver is a thread of the test here, in the place of Tune's session; `test_search.py` has Tune.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from ray import tune

from tune_steel.trainable import report_each

STOP = object()


class Driver:
    """Stands in for Tune: `report` returns when the driver has answered."""

    def __init__(self) -> None:
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self.answers: queue.Queue[object] = queue.Queue()

    def report(self, row: dict[str, Any]) -> None:
        self.reports.put(dict(row))
        if self.answers.get(timeout=30) is STOP:
            raise SystemExit(0)  # as Tune ends the thread of a trial that it stops


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(tune, "report", made.report)
    return made


class Worker(threading.Thread):
    """Makes three epochs and reports them."""

    def __init__(self, decisive: frozenset[int], error: Exception | None = None) -> None:
        super().__init__()
        self.made: list[int] = []
        self.ended_by: BaseException | None = None
        self._decisive = decisive
        self._error = error
        self.start()

    def rows(self) -> Iterator[dict[str, Any]]:
        for epoch in (1, 2, 3):
            if self._error is not None and epoch == 3:
                raise self._error
            self.made.append(epoch)
            yield {"epoch": epoch, "seconds": 0.0}

    def run(self) -> None:
        try:
            report_each(self.rows(), self._decisive)
        except BaseException as error:
            self.ended_by = error

    def has_made(self, epochs: list[int]) -> bool:
        end = time.monotonic() + 10
        while self.made != epochs and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.05)  # for one too many
        return self.made == epochs


def test_an_epoch_is_made_while_the_one_before_waits_for_its_answer(driver: Driver) -> None:
    worker = Worker(frozenset())
    assert worker.has_made([1, 2])
    assert [driver.reports.get(timeout=10)["epoch"]] == [1]
    assert driver.reports.empty(), "one report at a time"
    driver.answers.put(None)
    assert driver.reports.get(timeout=10)["epoch"] == 2
    assert worker.has_made([1, 2, 3])
    driver.answers.put(None)
    assert driver.reports.get(timeout=10)["epoch"] == 3
    worker.join(0.05)
    assert worker.is_alive(), "it ends after the last answer"
    driver.answers.put(None)
    worker.join(10)
    assert worker.ended_by is None


def test_no_epoch_is_made_before_the_answer_to_a_decisive_one(driver: Driver) -> None:
    worker = Worker(frozenset({1}))
    assert worker.has_made([1])
    driver.answers.put(STOP)
    worker.join(10)
    assert isinstance(worker.ended_by, SystemExit)
    assert worker.made == [1]


@pytest.mark.parametrize("answers", [[STOP], [None, STOP], [None, None, STOP]])
def test_a_trial_that_is_stopped_elsewhere_ends_at_its_next_report(
    driver: Driver, answers: list[object]
) -> None:
    """As at the end of a time budget."""
    worker = Worker(frozenset())
    for answer in answers:
        driver.answers.put(answer)
    worker.join(10)
    assert isinstance(worker.ended_by, SystemExit)
    assert worker.made == [1, 2, 3][: len(answers) + 1]
    assert driver.reports.qsize() == len(answers)


def test_what_an_epoch_raises_comes_after_the_answer_to_the_one_before(driver: Driver) -> None:
    worker = Worker(frozenset(), ValueError("no"))
    driver.answers.put(None)
    assert worker.has_made([1, 2])
    worker.join(0.05)
    assert worker.is_alive()
    driver.answers.put(None)
    worker.join(10)
    assert isinstance(worker.ended_by, ValueError)
    assert [driver.reports.get(timeout=1)["epoch"] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("answers", [[STOP], [None, STOP], [None, None, None]])
def test_nothing_of_a_trial_that_ended_is_kept(driver: Driver, answers: list[object]) -> None:
    """A worker trains a hundred of them, and Python looks for cycles after hours only."""

    class Network:
        pass

    def rows() -> Iterator[dict[str, Any]]:
        network = Network()
        kept.append(weakref.ref(network))
        for epoch in (1, 2, 3):
            yield {"epoch": epoch, "seconds": 0.0}
        assert network is not None

    def train() -> None:
        with suppress(SystemExit):
            report_each(rows(), frozenset({1}))

    kept: list[weakref.ref[Network]] = []
    for answer in answers:
        driver.answers.put(answer)
    gc.disable()
    try:
        worker = threading.Thread(target=train)
        worker.start()
        worker.join(10)
        assert [ref() for ref in kept] == [None]
    finally:
        gc.enable()


def test_a_report_says_what_the_trial_waited_and_what_it_prepared(driver: Driver) -> None:
    worker = Worker(frozenset({1}))
    first = driver.reports.get(timeout=10)
    assert first["waiting_seconds"] == 0.0
    time.sleep(0.2)
    for _ in range(3):
        driver.answers.put(None)
    worker.join(10)
    second = driver.reports.get(timeout=10)
    assert second["waiting_seconds"] >= 0.2
    assert 0 <= second["preparing_seconds"] < 0.2
