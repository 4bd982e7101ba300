from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray import tune

import tune_steel.ray_tune
from benchmarks import growth
from tune_steel.searcher import StudySearcher


class NoSession(nullcontext["NoSession"]):
    def __init__(self, *_: Any) -> None:
        super().__init__(self)

    def concurrency(self) -> int:
        return 2


class Here(nullcontext["Here"]):
    """In the place of a process, where what this test replaces would not be replaced."""

    made = 0

    def __init__(self, *_: Any) -> None:
        super().__init__(self)
        Here.made += 1

    def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*given))
        return done


def run_here(searcher: StudySearcher, *_: Any, max_epochs: int, **__: Any) -> None:
    """Trains in this process, one trial after the other."""
    results: list[dict[str, Any]] = []
    report, tune.report = tune.report, results.append
    try:
        train: Any = tune_steel.ray_tune.train_trial
        for name in map(str, range(searcher.samples)):
            train(searcher.suggest(name), max_epochs=max_epochs, decisive=frozenset())
            for result in results[:-1]:
                searcher.on_trial_result(name, {**result, "time_total_s": 0.0})
            searcher.on_trial_complete(name, {**results[-1], "time_total_s": 0.0})
            results.clear()
    finally:
        tune.report = report


def test_every_stretch_of_every_run_is_published_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "RUNS", ((2, 20), (8, 10)))
    monkeypatch.setattr(growth, "RaySession", NoSession)
    monkeypatch.setattr(growth, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(tune_steel.ray_tune, "run_trials", run_here)
    monkeypatch.setattr(tune_steel.ray_tune, "train_trial", None)
    table, page = tmp_path / "growth.parquet", tmp_path / "growth.md"
    growth.everything(table)
    assert Here.made == len(growth.RUNS)
    rows = pq.read_table(table).to_pylist()
    assert [(r["concurrency"], r["trials"]) for r in rows] == [
        *((2, n) for n in range(2, 21, 2)),
        *((8, n) for n in range(1, 11)),
    ]
    for row in rows:
        calls = row["ask_ms"] + row["report_ms"] + row["tell_ms"]
        assert 0 < calls <= row["blocked_ms"] <= row["wall_ms"]
        assert row["fsync_ms"] > 0
    assert rows[9]["journal_mb"] > rows[0]["journal_mb"] > 0
    page.write_text("before\n<!-- growth -->\nold\n<!-- end -->\nafter\n")
    growth.document(table, page)
    before, *lines, mark, after = page.read_text().splitlines()
    assert (before, mark, after) == ("before", "<!-- end -->", "after")
    assert len(lines) == 1 + 2 + len(rows)
    assert len({line.count("|") for line in lines[1:]}) == 1
    assert f"| {rows[0]['wall_ms']:.1f} | {rows[0]['driver_ms']:.1f} |" in lines[3]
    assert lines[3] in capsys.readouterr().out
