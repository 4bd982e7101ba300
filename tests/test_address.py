"""The same job on a Ray cluster that someone else started."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import Command

pytestmark = pytest.mark.ray


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# A head that asks for its user's token, one that was told not to, and one where there is none.
@pytest.fixture(params=["token", "disabled", "no token"])
def head(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of one node with 2 CPUs: its address, and the environment of its user."""
    # Other tests import Ray in this process, with the settings of the person who runs them.
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    port = _free_port()
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    if request.param == "disabled":
        environment["RAY_AUTH_MODE"] = "disabled"
    if request.param != "no token":
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    # Unix sockets need a short path.
    log = tmp_path / "head.log"
    with (
        tempfile.TemporaryDirectory(
            dir="/tmp", prefix="ts", ignore_cleanup_errors=True
        ) as scratch,
        log.open("wb") as output,
    ):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address=127.0.0.2", f"--port={port}", "--num-cpus=2"),
                *("--include-dashboard=false", f"--temp-dir={scratch}"),
                "--object-store-memory=100000000",
            ],
            # As `ray start --head` alone does: it asks for the token where there is one.
            env={
                **os.environ,
                "RAY_AUTH_MODE": "token" if request.param == "token" else "disabled",
                **environment,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for(log, process)
            yield f"127.0.0.2:{port}", environment
        finally:
            # With the head go its raylet, its store and its workers: they are in its session, or
            # notice within seconds.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> None:
    """The port is open before the node is registered; only the log says that all is up."""
    deadline = time.monotonic() + 90
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_a_token_that_is_asked_for_and_not_there_is_one_line(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = command(
            *("--task", "binary", "--source", "stand-in", "--space", space_file),
            *("--address", address),
            HOME=str(tmp_path),
            RAY_AUTH_MODE="token",
        )
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster can be joined there" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_search_runs_on_a_head_that_was_started_by_hand(
    head: tuple[str, dict[str, str]], command: Command, space_file: Path, tmp_path: Path
) -> None:
    address, environment = head
    done = command(
        *("--task", "binary", "--source", "stand-in", "--space", space_file, "--folds", 2),
        *("--samples", 4, "--max-epochs", 3, "--address", address),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "elsewhere" / "results").iterdir()
    trials = pd.read_parquet(run / "trials.parquet")
    assert len(trials) == 4
    assert set(trials["node"]) == {"127.0.0.2"}
    assert json.loads((run / "run.json").read_text())["concurrency"] == 2
