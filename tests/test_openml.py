import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import openml_server
import pandas as pd
import pytest

from tune_steel import data, openml_source, stand_in
from tune_steel.data import hash_frame, load_openml, load_own, load_steel
from tune_steel.errors import DataError

SMALL = "@RELATION t\n@ATTRIBUTE id NUMERIC\n@ATTRIBUTE x NUMERIC\n@ATTRIBUTE y {à,b}\n@DATA\n"
SMALL += "".join(f"{n},{n / 8},{'à' if n % 2 else 'b'}\n" for n in range(40))

REAL = os.environ.get("TUNE_STEEL_DATA")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory of the test's own, where openml and the cache may write."""
    for name in ("TUNE_STEEL_DATA", "OPENML_CACHE_DIR", "OPENML_SKIP_PARQUET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "home").mkdir()
    return tmp_path


@contextlib.contextmanager
def openml(home, text, fault=None, **options):
    with openml_server.serve(text, fault, **options) as server:
        openml_server.point_openml_at(server.api, home / "config")
        yield server


@pytest.fixture
def standing_in(monkeypatch):
    """The stand-in as ARFF text, accepted as if it were the real table."""
    frame = stand_in.generate()
    monkeypatch.setattr(data, "STEEL_HASH", hash_frame(frame))
    return openml_server.as_arff(frame, nominal=[*data.FLAGS, "Class"])


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_steel_table_comes_from_openml_once_and_then_from_the_cache(home, standing_in, capfd):
    with openml(home, standing_in) as server:
        first = load_steel()
        asked = list(server.paths)
        second = load_steel()
        assert server.paths == asked
        assert asked == ["/api/v1/xml/data/1504", "/data/download/1/table.arff"]
        third = load_steel(source="openml")
        assert len(server.paths) == 2 * len(asked)
    assert [first.source, second.source, third.source] == ["openml", "cache", "openml"]
    pd.testing.assert_frame_equal(first.frame, stand_in.generate())
    pd.testing.assert_frame_equal(first.frame, second.frame)
    assert capfd.readouterr() == ("", "")


def test_a_download_leaves_nothing_behind(home, standing_in):
    root = logging.getLogger()
    before = (list(root.handlers), root.level, dict(os.environ), set(sys.modules))
    with openml(home, standing_in):
        load_steel()
    assert (list(root.handlers), root.level, dict(os.environ)) == before[:3]
    assert "openml" not in set(sys.modules) - before[3]
    assert [path.name for path in (home / "config").rglob("*")] == ["openml", "config"]
    assert list((home / "home").rglob("*")) == []
    assert [path.name for path in (home / "cache").rglob("*")] == [
        "tune_steel",
        "steel-plates-fault.parquet",
    ]


def test_openml_makes_no_configuration_folder_where_there_was_none(home, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    environment = openml_source._environment(home / "download")
    (home / "download").mkdir()
    subprocess.run([sys.executable, "-c", "import openml"], env=environment, check=True)
    assert list((home / "home").rglob("*")) == []


def test_any_openml_dataset_loads_with_its_target_and_without_its_row_id(home):
    extra = "<oml:row_id_attribute>id</oml:row_id_attribute>"
    with openml(home, SMALL, target="y", extra=extra):
        table = load_openml(61)
    assert (table.name, table.source, table.target) == ("openml-61", "openml", "y")
    assert list(table.frame) == ["x", "y"]
    assert table.frame["y"].tolist() == ["b", "à"] * 20
    assert table.content_hash == hash_frame(table.frame)


def test_a_default_target_of_several_columns_is_no_target(home):
    with openml(home, SMALL, target="x,y"):
        assert load_openml(61).target is None


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("not found", "answered HTTP 404"),
        ("server error", "answered HTTP 500"),
        ("unknown dataset", "Unknown dataset"),
        ("login page", "not OpenML's"),
        ("truncated", "Incomplete|IncompleteRead"),
        ("wrong checksum", "Checksum of downloaded file is unequal"),
        ("bad arff", "cannot be read as arff"),
    ],
)
def test_a_fault_of_the_server_is_one_line_that_names_it(home, standing_in, fault, says):
    with openml(home, standing_in, fault), pytest.raises(DataError, match=says) as error:
        load_steel(source="openml")
    assert "OpenML dataset 1504" in one_line(error)
    assert "--data FILE" in str(error.value)
    assert not (home / "cache").exists()


def test_a_table_that_openml_changed_is_refused(home, standing_in):
    changed = standing_in.replace("@DATA\n", "@DATA\n1", 1)
    with openml(home, changed), pytest.raises(DataError, match="content hash") as error:
        load_steel(source="openml")
    assert "OpenML dataset 1504: the values" in one_line(error)
    assert not (home / "cache").exists()


def test_a_stalled_server_is_given_up(home, standing_in, monkeypatch):
    monkeypatch.setattr(openml_source, "READ_TIMEOUT_S", 1.5)
    start = time.monotonic()
    with (
        openml(home, standing_in, "stall"),
        pytest.raises(DataError, match=r"did not answer within 1\.5 s") as error,
    ):
        load_steel(source="openml")
    assert time.monotonic() - start < 10
    one_line(error)


def test_a_server_that_trickles_is_given_up_at_the_deadline(home, standing_in, monkeypatch):
    monkeypatch.setattr(data, "_STEEL_DEADLINE_S", 8.0)
    start = time.monotonic()
    with (
        openml(home, standing_in, "trickle") as server,
        pytest.raises(DataError, match="did not arrive within 8 s") as error,
    ):
        load_steel(source="openml")
    assert 7.9 < time.monotonic() - start < 11
    assert len(server.paths) == 2
    one_line(error)


@contextlib.contextmanager
def refusing():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    yield f"127.0.0.1:{address[1]}"


@contextlib.contextmanager
def black_hole():
    """A listener whose queue is full: the kernel drops further attempts to connect."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def unknown_name():
    yield "openml.invalid"


@pytest.mark.parametrize(
    ("unreachable", "reason"),
    [(refusing, "Connection refused"), (black_hole, "timed out"), (unknown_name, "[Nn]ame")],
)
def test_being_offline_is_noticed_within_ten_seconds(home, capfd, unreachable, reason):
    with unreachable() as host:
        openml_server.point_openml_at(f"http://{host}/api/v1/xml", home / "config")
        start = time.monotonic()
        table = load_steel()
    assert time.monotonic() - start < 10
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"tune_steel: OpenML dataset 1504 could not be fetched: http://{host}")
    assert re.search(reason, err)
    assert err.endswith(
        "using the built-in STAND-IN table; its scores say nothing about steel plates\n"
    )
    assert err.count("\n") == 1
    assert table.source == "stand-in"
    assert not (home / "cache").exists()


def test_asking_for_openml_while_offline_fails_and_does_not_fall_back(home, capfd):
    with refusing() as host:
        openml_server.point_openml_at(f"http://{host}/api/v1/xml", home / "config")
        with pytest.raises(DataError, match="cannot be reached"):
            load_steel(source="openml")
        with pytest.raises(DataError, match="cannot be reached"):
            load_openml(61)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_cached_table_is_ignored_and_fetched_again(home, standing_in, capsys):
    with openml(home, standing_in):
        load_steel()
        cached = home / "cache/tune_steel/steel-plates-fault.parquet"
        good = cached.read_bytes()
        cached.write_bytes(good[: len(good) // 2])
        assert load_steel().source == "openml"
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith(f"tune_steel: ignoring the cached table {cached}: ")
        assert load_steel().source == "cache"


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="TUNE_STEEL_DATA is not set")
def test_the_real_table_comes_through_openml_unchanged(home):
    frame = load_own(Path(REAL)).frame
    with openml(home, openml_server.as_arff(frame, nominal=["Class"])):
        table = load_steel(source="openml")
        assert load_steel().source == "cache"
    assert table.content_hash == hash_frame(table.frame) == data.STEEL_HASH
