"""A run's journal opens in plain Optuna and in optuna-dashboard, which read it and no more."""

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from conftest import SMALL_SPACE
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from searches import finish, only_run, read, start, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small search with complete, stopped and failed trials."""
    folder = tmp_path_factory.mktemp("opened")
    space = folder / "small.toml"
    # A weight near the largest float makes the loss infinite.
    weight = "pos_weight = { choices = [1.0, 3e38], default = 1.0 }"
    old = "pos_weight = { float = [0.5, 4.0], log = true, default = 1.0 }"
    assert old in SMALL_SPACE
    space.write_text(SMALL_SPACE.replace(old, weight))
    process = start(
        folder,
        *("--task", "binary", "--source", "stand-in", "--space", space, "--samples", 8),
        *("--max-epochs", 7, "--grace-period", 1, "--folds", 2, "--concurrency", 1),
        *("--try", '{"loss.pos_weight": 3e38}', "--try", '{"optimizer.lr": 1e-3}'),
    )
    code, _, err = finish(process)
    assert code == 0, err
    found = only_run(folder)
    assert set(read(found, "trials")["state"]) == {"COMPLETE", "PRUNED", "FAIL"}
    return found


def contents(run: Path) -> tuple[list[Path], bytes]:
    return sorted(run.iterdir()), (run / "study.journal").read_bytes()


@pytest.fixture(scope="module")
def original(run: Path) -> tuple[list[Path], bytes]:
    """What the search left, before anything else opened it."""
    return contents(run)


@pytest.fixture(autouse=True)
def only_read(run: Path, original: tuple[list[Path], bytes]) -> Iterator[None]:
    """Whatever opens the journal leaves it as it was, and leaves nothing beside it."""
    yield
    assert contents(run) == original


def curves(run: Path) -> dict[int, list[float]]:
    """The running best of every epoch by trial, from the tables."""
    epochs = read(run, "epochs").sort_values(["trial", "epoch"])
    grouped = epochs.groupby("trial")["best_val_loss"].apply(list)
    return {number: grouped.get(number, []) for number in read(run, "trials")["trial"]}


@pytest.fixture
def study(run: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(run / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage)


def test_plain_optuna_sees_states_parameters_values_and_the_best_trial(
    run: Path, study: optuna.Study
) -> None:
    trials = read(run, "trials").set_index("trial")
    assert study.study_name == run.name
    assert [t.state.name for t in study.trials] == trials["state"].tolist()
    for trial in study.trials:
        row = trials.loc[trial.number].dropna()
        assert trial.params == {key: row[key] for key in row.index if key.count(".") == 1}
    complete = trials[trials["state"] == "COMPLETE"]
    assert study.best_value == complete["val_loss"].min()
    assert study.best_trial.number == complete["val_loss"].idxmin()


def test_plain_optuna_sees_a_value_for_every_epoch(run: Path, study: optuna.Study) -> None:
    seen = {t.number: t.intermediate_values for t in study.trials}
    assert seen == {n: dict(enumerate(losses, start=1)) for n, losses in curves(run).items()}
    stopped = {len(seen[t.number]) for t in study.trials if t.state.name == "PRUNED"}
    assert stopped <= {1, 3}
    assert max(map(len, seen.values())) == 7


def test_plain_optuna_sees_where_and_how_long_a_trial_ran_and_what_it_was(
    run: Path, study: optuna.Study
) -> None:
    trials = read(run, "trials").set_index("trial")
    hashes = {}
    for trial in study.trials:
        row, attributes = trials.loc[trial.number], trial.user_attrs
        config = json.loads(row["config"])
        text = json.dumps(config, sort_keys=True).encode()
        assert attributes["config_hash"] == hashlib.sha256(text).hexdigest()[:16]
        assert attributes["config"] == config
        hashes[attributes["config_hash"]] = row["config"]
        assert attributes["seconds"] == row["seconds"]
        if trial.state.name == "FAIL":
            assert attributes["error"] == row["error"]
            assert attributes["node"] is attributes["best_epoch"] is None
        else:
            assert attributes["seconds"] > 0
            assert attributes["node"] == row["node"]
            assert attributes["best_epoch"] == row["best_epoch"]
    assert len(hashes) == trials["config"].nunique()


def test_optunas_own_table_has_a_row_for_every_trial(run: Path, study: optuna.Study) -> None:
    trials = read(run, "trials")
    table = study.trials_dataframe()
    assert table["state"].tolist() == trials["state"].tolist()
    assert table["user_attrs_best_epoch"].dropna().tolist() == (
        trials["best_epoch"].dropna().tolist()
    )
    assert table["params_optimizer.lr"].tolist() == trials["optimizer.lr"].tolist()


@dataclass
class Dashboard:
    """A running dashboard."""

    root: str

    def get(self, path: str) -> bytes:
        # A proxy of the environment would be asked for 127.0.0.1 too.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.root + path, timeout=30) as answer:
            body: bytes = answer.read()
            return body

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))


@contextlib.contextmanager
def serving(journal: Path) -> Iterator[Dashboard]:
    """Runs the dashboard as its users do, on a free port; it is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(sysconfig.get_path("scripts")) / "optuna-dashboard"
    process = subprocess.Popen(
        [
            *(sys.executable, str(script), str(journal), "--server", "wsgiref"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    dashboard = Dashboard(f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: process.poll() is not None or answers(dashboard), every=0.2)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield dashboard
    finally:
        process.terminate()
        try:
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert "Traceback" not in err, err


def answers(dashboard: Dashboard) -> bool:
    try:
        return b"<html" in dashboard.get("/dashboard")
    except OSError:
        return False


@pytest.fixture(scope="module")
def dashboard(run: Path, original: tuple[list[Path], bytes]) -> Iterator[Dashboard]:
    with serving(run / "study.journal") as served:
        yield served
    assert contents(run) == original


@pytest.fixture
def shown(dashboard: Dashboard, run: Path) -> Any:
    """The only study, as the dashboard's page gets it."""
    (summary,) = dashboard.json("/api/studies")["study_summaries"]
    assert summary["study_name"] == run.name
    assert summary["directions"] == ["minimize"]
    return dashboard.json(f"/api/studies/{summary['study_id']}")


def test_the_dashboard_shows_states_parameters_and_values(run: Path, shown: Any) -> None:
    trials = read(run, "trials")
    assert [t["number"] for t in shown["trials"]] == trials["trial"].tolist()
    states = {"Complete": "COMPLETE", "Pruned": "PRUNED", "Fail": "FAIL"}
    assert [states[t["state"]] for t in shown["trials"]] == trials["state"].tolist()
    for trial, (_, row) in zip(shown["trials"], trials.iterrows(), strict=True):
        expected = {k: v for k, v in row.dropna().items() if str(k).count(".") == 1}
        params = {p["name"]: p["param_external_value"] for p in trial["params"]}
        assert params.keys() == expected.keys()
        for name, text in params.items():
            assert float(text) == expected[name]
        if row["state"] == "COMPLETE":
            assert trial["values"] == [row["val_loss"]]
    complete = trials[trials["state"] == "COMPLETE"]
    (best,) = shown["best_trials"]
    assert best["number"] == complete.loc[complete["val_loss"].idxmin(), "trial"]


def test_the_dashboard_shows_the_whole_curve_of_every_trial(run: Path, shown: Any) -> None:
    assert shown["has_intermediate_values"]
    seen = {
        t["number"]: [(v["step"], v["value"]) for v in t["intermediate_values"]]
        for t in shown["trials"]
    }
    assert seen == {n: list(enumerate(losses, start=1)) for n, losses in curves(run).items()}


def test_the_dashboard_shows_the_user_attributes_and_can_sort_by_the_numbers(
    run: Path, shown: Any, study: optuna.Study
) -> None:
    trials = read(run, "trials").set_index("trial")
    names = {attribute["key"]: attribute["sortable"] for attribute in shown["union_user_attrs"]}
    assert {"node", "seconds", "best_epoch", "config_hash", "state", "error"} <= names.keys()
    assert names["seconds"]
    for trial in shown["trials"]:
        row = trials.loc[trial["number"]]
        attributes = {a["key"]: a["value"] for a in trial["user_attrs"]}
        assert float(attributes["seconds"]) == row["seconds"]
        assert attributes["state"] == row["state"]
        own = study.trials[trial["number"]].user_attrs
        assert attributes["config_hash"] == own["config_hash"]
        assert json.loads(attributes["config"]) == json.loads(row["config"])
        if row["state"] == "FAIL":
            assert attributes["error"] == row["error"]
        else:
            assert attributes["node"] == row["node"]
            assert int(attributes["best_epoch"]) == row["best_epoch"]


def test_the_dashboard_computes_how_much_each_parameter_matters(dashboard: Dashboard) -> None:
    (importances,) = dashboard.json("/api/studies/0/param_importances")["param_importances"]
    shares = {each["name"]: each["importance"] for each in importances}
    assert {"optimizer.lr", "model.dropout"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1)


def test_the_dashboard_gives_the_trials_as_csv(
    run: Path, dashboard: Dashboard, tmp_path: Path
) -> None:
    (tmp_path / "trials.csv").write_bytes(dashboard.get("/csv/0"))
    table = pd.read_csv(tmp_path / "trials.csv")
    trials = read(run, "trials")
    assert table["State"].tolist() == trials["state"].tolist()
    assert table["Param optimizer.lr"].tolist() == pytest.approx(trials["optimizer.lr"].tolist())
    assert table["UserAttribute seconds"].tolist() == pytest.approx(trials["seconds"].tolist())
