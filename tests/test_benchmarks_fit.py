from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import fit, neighbours
from tune_steel.data import load_steel
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tasks import steel_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def development() -> Development:
    task = steel_task(load_steel(None, "stand-in"), "binary")
    development, _, _ = prepare(task, freeze(task, seed=0, split=(0.3, 0.1, 0.6), folds=2))
    return development


def test_a_row_for_each_network_and_loop_with_times_and_ratios_that_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TUNE_STEEL_DATA", raising=False)
    monkeypatch.setattr(fit, "NETWORKS", ((6, 5), (4,)))
    output = tmp_path / "published" / "fit.parquet"
    fit.main(repeats=1, output=output)
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    assert [(r["network"], r["loop"]) for r in rows] == [
        *(
            (network, loop)
            for network in ("6-5", "4")
            for loop in ("reference", "plain", "stacked", "mkl", "floor")
        ),
        ("neighbours", "plain"),
        ("neighbours", "stacked"),
    ]
    for row in rows[10:]:
        assert row["steps"] == -(-row["rows"] // 256)
        assert row["plain_over_epoch"] == pytest.approx(rows[10]["epoch_ms"] / row["epoch_ms"])
        assert row["reference_over_epoch"] is row["training_over_floor"] is None
    for block in (rows[:5], rows[5:10]):
        reference, *_, floor = block
        for row in block:
            assert row["data_source"] == "stand-in"
            assert (row["folds"], row["steps"], row["repeats"]) == (5, -(-row["rows"] // 32), 1)
            assert 0 < row["training_ms"] <= row["epoch_ms"]
            for what in ("training", "epoch"):
                low, middle, high = (row[f"{what}_ms{end}"] for end in ("_low", "", "_high"))
                assert row[f"{what}_ms_best"] <= low <= middle <= high
            assert row["training_over_floor"] == pytest.approx(
                row["training_ms"] / floor["training_ms"]
            )
            if row is not floor:
                assert row["reference_over_epoch"] == pytest.approx(
                    reference["epoch_ms"] / row["epoch_ms"]
                )
        assert floor["reference_over_epoch"] is None
        assert reference["reference_over_epoch"] == floor["training_over_floor"] == 1
    printed = capsys.readouterr().out
    assert "stand-in" in printed
    assert printed.count(" reference ") == 2


def test_all_loops_learn_alike(development: Development) -> None:
    torch.manual_seed(0)
    after = {}
    for loop in (fit.Reference, fit.Plain, fit.Stacked):
        made = loop((16,), development)
        before = np.mean(made.score())
        for _ in range(12):
            made.train()
        after[loop] = np.mean(made.score())
        assert after[loop] < 0.95 * before, loop
    assert after[fit.Stacked] == pytest.approx(after[fit.Plain], rel=0.05)


def test_both_loops_of_nearest_neighbours_learn_alike(development: Development) -> None:
    torch.manual_seed(0)
    after = []
    for made in (neighbours.Plain(development), neighbours.Stacked(development)):
        before = np.mean(made.score())
        for _ in range(8):
            made.train()
        after.append(np.mean(made.score()))
        assert after[-1] < 0.85 * before, made
    assert after[1] == pytest.approx(after[0], rel=0.05)


def test_the_floor_has_the_flops_of_the_matmuls(development: Development) -> None:
    floor = fit.Floor((16, 8), development)
    flops = sum(
        2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        for batch in floor.batches
        for a, b, _ in batch
    )
    rows = min(len(train) for train, _ in development.folds)
    inputs = 27
    weights = inputs * 16 + 16 * 8 + 8 * 1
    assert flops == 2 * len(development.folds) * rows * (3 * weights - inputs * 16)
