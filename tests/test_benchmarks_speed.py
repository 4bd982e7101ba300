import tune_steel.ray_environment  # noqa: F401

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import typer
from sklearn.metrics import log_loss

from benchmarks import fit, process, quality_in_time, speed, speed_table
from benchmarks.peers import plain_optuna, ray_tune, training
from tune_steel.config import TrialConfig
from tune_steel.loss import TrainingLoss
from tune_steel.metrics import Scorer
from tune_steel.space import load_space

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = load_space(speed.SPACE)
FIXED = {".".join(path): value for path, value in SPACE.fixed.items()}
SMALL = SPACE.defaults() | {"model.width_1": 64, "model.width_2": 64, "model.width_3": 32}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> speed.Setting:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TUNE_STEEL_DATA", raising=False)
        folder = tmp_path_factory.mktemp("speed")
        return speed.set_up(folder, folds=2, repeat=0, samples=2, most=2, workers=1)


@pytest.fixture(scope="module")
def data(setting: speed.Setting) -> training.Data:
    return training.Data.read(setting.request.data)


def config(**changed: Any) -> dict[str, Any]:
    return {**FIXED, **SMALL, **changed}


@pytest.mark.parametrize("scaling", ["standard", "robust", "quantile"])
def test_all_loops_judge_the_same_network_by_the_loss_of_this_project(
    setting: speed.Setting, data: training.Data, scaling: str
) -> None:
    torch.manual_seed(0)
    given = config(**{"preprocessing.scaling": scaling})
    tight, loader = (kind(given, data, 1) for kind in (training.Fold, ray_tune.LoaderFold))
    loader.model.load_state_dict(tight.model.state_dict())
    with torch.no_grad():
        logits = tight.model.eval()(tight.x_val)[None]
    development = setting.development
    scorer = Scorer(development.reference_weights, torch.device("cpu"))
    target = torch.tensor(development.y[development.folds[1][1]])[None]
    expected = scorer(logits, target)["loss"].item()
    assert tight.validate() == pytest.approx(expected, rel=1e-6)
    assert loader.validate() == pytest.approx(expected, rel=1e-6)


def test_the_loss_that_trains_is_this_project_s(setting: speed.Setting) -> None:
    given = config(**{"loss.pos_weight": 3.0, "loss.label_smoothing": 0.1})
    params = {key: given[key] for key in SMALL}
    own = TrainingLoss(SPACE.config(params), setting.development, torch.device("cpu"))
    logits, y = torch.randn(50, generator=torch.manual_seed(0)), torch.arange(50) % 2
    theirs = training.training_loss(given, logits, y.float()).item()
    values = own.values(logits[None, :, None], own.targets(y[None], torch.float32))
    assert values.item() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind", [training.Fold, ray_tune.LoaderFold])
def test_peers_learn(data: training.Data, kind: type[training.Fold]) -> None:
    first, *_, last = training.epochs(config(), data, 4, 0, kind)
    assert last.number == 4
    assert last.best_val_loss < 0.97 * first.val_loss < 0.97


def test_early_stopping_waits_as_long_as_the_config_says(data: training.Data) -> None:
    stubborn = config(**{"schedule.early_stop_patience": 2, "schedule.early_stop_min_delta": 9.0})
    assert len(list(training.epochs(stubborn, data, 9, 0))) == 3


def test_ray_s_searcher_samples_the_space_with_its_conditions() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        constants = ray_tune.define_by_run(trial, SPACE)
        assert constants == FIXED
        assert isinstance(SPACE.config(trial.params), TrialConfig)
        full = {leaf.key: leaf.default for leaf in SPACE.leaves} | trial.params | constants
        assert speed.active(SPACE, full) == trial.params


def test_syne_tune_samples_every_leaf() -> None:
    pytest.importorskip("syne_tune")
    from benchmarks.peers.syne import config_space

    domains = config_space(SPACE)
    assert set(domains) == {*FIXED, *(leaf.key for leaf in SPACE.leaves)}
    for leaf in SPACE.leaves:
        assert leaf.holds(domains[leaf.key].sample())


def test_plain_optuna_s_row_has_figures_that_agree(setting: speed.Setting, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    request = replace(setting.request, folder=str(tmp_path), grace_period=2)
    began = time.time()
    plain_optuna.work(request, 0)
    request.answer(plain_optuna.ended_trials(plain_optuna.open_study(request, 0)), optuna="5")
    usage = process.Usage(began, time.time() - began, 1.0, 100.0, 0, "")
    outcome = speed.read_peer(tmp_path, request.samples)
    row = speed.measures(outcome, usage, 9.0, SPACE)
    assert (row["trials"], row["epochs"]) == (2, 4)
    assert 0 < row["target_s"] <= row["search_s"] <= row["wall_s"]
    assert row["trials_per_minute"] == pytest.approx(120 / row["search_s"])
    assert row["best_val_loss"] == min(t.best_val_loss for t in outcome.trials)
    assert json.loads(row["versions"]) == {"optuna": "5"}
    params = json.loads(row["params"])
    judged = speed.judge((setting.development, SPACE, params, 1))
    assert 0.3 < judged != row["best_val_loss"]


def test_a_method_runs_as_a_process_and_its_row_says_where(
    setting: speed.Setting, tmp_path: Path
) -> None:
    request = replace(setting.request, folder=str(tmp_path), grace_period=2)
    row = speed.run_method("optuna", replace(setting, request=request), sys.executable)
    assert row["machine"] == process.machine()
    assert (row["method"], row["folds"], row["trials"]) == ("optuna", 2, 2)
    assert row["cpu_s"] > 0
    assert set(row) <= set(speed.SCHEMA.names)


def test_one_method_alone_is_not_published() -> None:
    with pytest.raises(typer.BadParameter, match="--method: the published ratios"):
        speed.search(method=["ray"])


def test_the_target_is_the_loss_that_a_tenth_of_the_recorded_configs_reach(
    setting: speed.Setting,
) -> None:
    request = replace(setting.request, max_epochs=50)
    fits = replace(setting, request=request, folds=5, data_source="file")
    target = speed.target_loss(fits)
    lowest = [min(curve) for curve in pq.read_table(speed.CURVES)["val_loss"].to_pylist()]
    assert target is not None
    assert np.mean(np.array(lowest) <= target) == pytest.approx(0.1, abs=0.01)
    assert speed.target_loss(replace(fits, folds=1)) is None
    assert speed.target_loss(replace(fits, data_source="stand-in")) is None
    short = replace(fits, request=replace(request, max_epochs=49))
    assert speed.target_loss(short) is None


def test_a_command_is_watched_with_all_that_it_leaves_behind(tmp_path: Path) -> None:
    left = "import time; x = b'1' * 60_000_000; time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {left!r}], start_new_session=True)\n"
        "print(p.pid); time.sleep(1.2); sys.exit(3)"
    )
    usage = process.run([sys.executable, "-c", code], os.environ, tmp_path)
    assert usage.code == 3
    assert usage.peak_mb > 60
    assert 1.2 <= usage.seconds < 30
    state = Path(f"/proc/{int(usage.output)}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_out_of_fold_log_loss_is_the_mean_of_the_folds() -> None:
    rng = np.random.default_rng(0)
    fold, y, p = rng.integers(3, size=90), rng.integers(2, size=90), rng.random(90)
    expected = np.mean([log_loss(y[fold == f], p[fold == f]) for f in range(3)])
    assert quality_in_time.mean_log_loss(fold, y, p) == pytest.approx(expected)


def test_the_lowest_so_far_falls() -> None:
    assert quality_in_time.lowest_so_far([(3, 0.5), (1, 0.7), (2, 0.8)]) == [(1, 0.7), (3, 0.5)]


def test_the_readme_shows_what_is_published() -> None:
    shown = speed_table.README.read_text().split(speed_table.BEGIN)[1].split(speed_table.END)[0]
    parts = (
        speed_table.searches(pd.read_parquet(speed.PUBLISHED)),
        speed_table.in_time(pd.read_parquet(quality_in_time.PUBLISHED)),
        speed_table.epochs(pd.read_parquet(fit.PUBLISHED)),
    )
    assert shown.strip() == "\n\n".join(parts)


def test_the_table_s_ratios_are_those_within_a_repeat() -> None:
    def row(method: str, repeat: int, rate: float, note: str | None = None) -> dict[str, Any]:
        return {
            **dict.fromkeys(("epochs_per_minute", "wall_s", "peak_mb", "judged_loss"), 1.0),
            "method": method,
            "repeat": repeat,
            "trials_per_minute": rate,
            "note": note,
            "folds": 5,
            "samples": 4,
            "max_epochs": 9,
            "workers": 2,
            "target_s": None,
            "data_source": "file",
            "machine": "m",
        }

    rows = pd.DataFrame(
        [
            *(row("tune_steel", 0, 30.0), row("tune_steel", 1, 20.0)),
            *(row("ray", 0, 10.0), row("ray", 1, 5.0), row("syne", 0, 0.0, "no syne_tune")),
        ]
    )
    lines = speed_table.searches(rows).splitlines()
    assert any(line.endswith("| 3.5 (3.0, 4.0) x |") for line in lines)
    assert "- Syne Tune, local backend was not measured: no syne_tune" in lines


def test_the_curves_table_has_the_lowest_loss_by_each_time_and_who_is_missing() -> None:
    curve = {"given_s": 8.0, "repeat": 0, "data_source": "file", "note": None}
    points = [(2.0, 0.5), (4.0, 0.3)]
    in_time = pd.DataFrame(
        [
            *({**curve, "method": "tune_steel", "seconds": s, "log_loss": p} for s, p in points),
            {**curve, "method": "autogluon", "note": "exit code 1: no"},
            {**curve, "method": "autogluon", "given_s": 2.0, "seconds": 3.0, "log_loss": 0.1},
            {**curve, "method": "autogluon", "given_s": 4.0, "seconds": 6.0, "log_loss": 0.2},
        ]
    )
    lines = speed_table.in_time(in_time).splitlines()
    assert "| tune_steel | 0.5000 | 0.3000 | 0.3000 | 0.3000 |" in lines
    # Of separate runs the one that was given most, not the one that came out best.
    assert "| AutoGluon | - | 0.1000 | 0.2000 | 0.2000 |" in lines
    assert "- AutoGluon, given 8 s: exit code 1: no" in lines


def test_the_epochs_table_has_a_line_for_each_network_and_no_figure_that_is_missing() -> None:
    def row(network: str, loop: str, ms: float, faster: float | None) -> dict[str, Any]:
        return {
            "network": network,
            "loop": loop,
            "epoch_ms": ms,
            "plain_over_epoch": 100 / ms,
            "reference_over_epoch": faster,
            "folds": 5,
            "repeats": 3,
            "data_source": "file",
            "machine": "an abacus",
        }

    rows = pd.DataFrame(
        [
            *(row("8", "reference", 200.0, 1.0), row("8", "plain", 100.0, 2.0)),
            *(row("8", "stacked", 40.0, 5.0), row("8", "mkl", 80.0, 2.5)),
            row("8", "floor", 20.0, None),
            *(row("near", "plain", 100.0, None), row("near", "stacked", 50.0, None)),
        ]
    )
    lines = speed_table.epochs(rows).splitlines()
    assert lines[-2:] == [
        "| 8 | 200 | 100 | 40 | 80 | 20 | 5.0 x | 2.5 x |",
        "| near | - | 100 | 50 | - | - | - | 2.0 x |",
    ]
