import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import openml_server
import pandas as pd
import pytest

from tune_steel import data, stand_in
from tune_steel.data import FEATURES, FLAGS, hash_frame, load_own, load_steel
from tune_steel.errors import DataError

REAL = os.environ.get("TUNE_STEEL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="TUNE_STEEL_DATA is not set")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; nothing reaches the network."""
    monkeypatch.delenv("TUNE_STEEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NO_PROXY", "*")
    openml_server.point_openml_at("http://127.0.0.1:9/api/v1/xml", tmp_path / "config")
    return tmp_path / "cache/tune_steel/steel-plates-fault.parquet"


@pytest.fixture
def steel(monkeypatch):
    """The stand-in, accepted as if it were the real table."""
    frame = stand_in.generate()
    monkeypatch.setattr(data, "STEEL_HASH", hash_frame(frame))
    return frame


def written(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text(openml_server.as_arff(frame, nominal=["Class", *FLAGS]))
    return path


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arff"])
def test_a_copy_of_the_steel_table_loads_alike_from_every_format(tmp_path, steel, suffix):
    path = written(steel, tmp_path / f"copy{suffix}")
    table = load_steel(path)
    assert (table.name, table.source, table.target) == ("steel-plates-fault", "file", None)
    assert table.content_hash == data.STEEL_HASH
    pd.testing.assert_frame_equal(table.frame, steel)


def test_the_environment_names_a_file_and_the_argument_goes_before_it(
    tmp_path, steel, monkeypatch
):
    monkeypatch.setenv("TUNE_STEEL_DATA", str(written(steel, tmp_path / "named.csv")))
    assert load_steel().source == "file"
    with pytest.raises(DataError, match=r"absent\.csv: there is no such file"):
        load_steel(tmp_path / "absent.csv")


def test_a_missing_file_named_by_the_environment_does_not_fall_back(tmp_path, monkeypatch, steel):
    load_steel(written(steel, tmp_path / "copy.csv"))
    monkeypatch.setenv("TUNE_STEEL_DATA", str(tmp_path / "absent.csv"))
    with pytest.raises(DataError, match="named by TUNE_STEEL_DATA"):
        load_steel()


def test_the_stand_in_can_be_asked_for_and_is_never_cached(cache, capsys):
    table = load_steel(source="stand-in")
    assert table.source == "stand-in"
    assert table.content_hash == hash_frame(table.frame) != data.STEEL_HASH
    assert not cache.exists()
    assert capsys.readouterr() == ("", "")


def test_a_file_and_a_named_source_exclude_each_other(tmp_path):
    with pytest.raises(DataError, match="give one of them"):
        load_steel(tmp_path / "copy.csv", source="openml")


def test_a_file_is_cached_and_read_back(tmp_path, cache, steel):
    load_steel(written(steel, tmp_path / "copy.csv"))
    assert list(cache.parent.iterdir()) == [cache]
    table = load_steel()
    assert table.source == "cache"
    pd.testing.assert_frame_equal(table.frame, steel)


def test_a_cached_table_with_another_content_is_ignored(tmp_path, cache, steel, capsys):
    cache.parent.mkdir(parents=True)
    steel.assign(V1=steel["V1"] + 1).to_parquet(cache)
    assert load_steel().source == "stand-in"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"tune_steel: ignoring the cached table {cache}: ")
    assert "STAND-IN" in second


def test_an_unwritable_cache_is_one_line_and_no_failure(tmp_path, steel, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load_steel(written(steel, tmp_path / "copy.csv")).source == "file"
    err = capsys.readouterr().err
    assert err.startswith("tune_steel: the table is not cached: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(columns=["V7", "V9"]), "missing: V7, V9; not expected: none"),
        (lambda t: t.assign(extra=1), "not expected: extra"),
        (lambda t: t.iloc[1:], "1940 rows; the steel table has 1941"),
        (lambda t: t.assign(V3=t["V3"].where(t.index != 5)), "missing values in V3"),
        (lambda t: t.assign(V3=t["V3"].astype(str).where(t.index != 5, "x")), "not numbers in V3"),
        (lambda t: t.assign(V28=1), "a single 1"),
        (lambda t: t.assign(V28=t["V28"] / 2, V29=t["V29"] + t["V28"] / 2), "0 or 1"),
        (lambda t: t.assign(V28=t["V29"], V29=t["V28"]), "'Pastry': 190, 'Z_Scratch': 158"),
        (lambda t: t.assign(Class=t["Class"].where(t["Class"] == 1, 3)), "'Other_Faults': 0"),
        (lambda t: t.assign(V1=t["V1"].where(t.index != 5, 7.5)), "content hash"),
        (lambda t: t.iloc[[1, 0, *range(2, len(t))]], "their order"),
    ],
)
def test_a_modified_copy_is_refused_with_the_reason_and_a_way_out(
    tmp_path, steel, cache, change, says
):
    path = written(change(steel), tmp_path / "copy.csv")
    with pytest.raises(DataError) as error:
        load_steel(path)
    message = one_line(error)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert message.endswith("pass --target Class")
    assert not cache.exists()


def test_the_columns_may_stand_in_another_order(tmp_path, steel):
    table = load_steel(written(steel[steel.columns[::-1]], tmp_path / "copy.csv"))
    assert list(table.frame) == [*FEATURES, *FLAGS, "Class"]


def test_the_hash_ignores_dtypes_and_notices_every_kind_of_change():
    frame = pd.DataFrame({"a": [1, 0, 3], "b": ["x", None, "y"], "c": [0.5, np.nan, 2.0]})
    reference = hash_frame(frame)
    same = [
        frame.astype({"a": "float32", "b": "category"}),
        frame.astype({"a": "Int64", "b": "string", "c": "Float64"}),
        frame.assign(a=[1.0, -0.0, 3.0], b=frame["b"].astype(object)),
        frame.set_axis([5, 6, 7], axis=0),
    ]
    assert {hash_frame(table) for table in same} == {reference}
    other = [
        frame.rename(columns={"a": "A"}),
        frame[["b", "a", "c"]],
        frame.iloc[::-1],
        frame.assign(a=["1", "0", "3"]),
        frame.assign(b=["x", "None", "y"]),
        frame.assign(c=[0.5, 0.0, 2.0]),
        frame.assign(b=["x,y", None, ""]),
    ]
    assert len({reference, *map(hash_frame, other)}) == len(other) + 1


def test_a_table_of_ones_own_has_plain_types_in_every_format(tmp_path):
    frame = pd.DataFrame({"n": [1.5, None, 3], "k": [1, 2, 3], "t": ["a", None, "it's"]})
    frame.to_csv(tmp_path / "own.csv", index=False)
    frame.to_parquet(tmp_path / "own.parquet")
    (tmp_path / "own.ARFF").write_text(
        "% a comment\n@relation own\n@attribute n real\n@attribute 'k' INTEGER\n"
        "@attribute t {a, 'it\\'s'}\n@data\n1.5,1,a\n?,2,?\n3,3,'it\\'s'\n"
    )
    tables = [load_own(tmp_path / f"own.{suffix}") for suffix in ("csv", "parquet", "ARFF")]
    for table in tables:
        assert (table.name, table.source, table.target) == ("own", "file", None)
        assert isinstance(table.frame.index, pd.RangeIndex)
        assert table.frame["n"].dtype == "float64"
        assert table.frame["k"].dtype.kind in "if"
        assert table.frame["t"].isna().tolist() == [False, True, False]
    assert tables[2].frame["t"].cat.categories.tolist() == ["a", "it's"]
    assert len({table.content_hash for table in tables}) == 1


def test_parquet_types_beyond_numbers_and_strings_become_those(tmp_path):
    frame = pd.DataFrame(
        {
            "decimal": [Decimal("1.5"), None],
            "nullable": pd.array([1, None], "Int64"),
            "maybe": [True, None],
            "flag": [True, False],
            "day": pd.to_datetime(["2020-01-01", None]),
            "span": pd.to_timedelta([1, None], unit="D"),
            "kind": pd.Categorical(["u", "v"]),
            "nothing": [None, None],
        },
        index=pd.Index([7, 8], name="key"),
    )
    frame.to_parquet(tmp_path / "own.parquet")
    got = load_own(tmp_path / "own.parquet").frame
    assert got["key"].tolist() == [7, 8]
    assert {name: got[name].dtype.kind for name in ("decimal", "nullable", "nothing")} == {
        "decimal": "f",
        "nullable": "f",
        "nothing": "f",
    }
    assert got["flag"].dtype == bool
    assert got["maybe"][0] == "True"
    assert got["maybe"].isna().tolist() == got["day"].isna().tolist() == [False, True]
    assert got["day"].dtype.kind == "M"
    assert got["span"].dtype.kind == "m"
    assert got["kind"].dtype == "category"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.xlsx", b"", "ends in .csv, .parquet, .pq or .arff"),
        ("t.csv", b"", "cannot be read as csv"),
        ("t.csv", b"a,b\n", "no rows"),
        ("t.csv", b"a,b,a\n1,2,3\n", "more than one column is called a"),
        ("t.csv", b"a,a,,\n1,2,3,4\n", "more than one column is called a"),
        ("t.csv", b"a,b\n1,2,3\n4,5,6\n", "Expected 2 fields in line 2, saw 3"),
        ("t.csv", b"a,b\n1,\xff\n", "cannot be read as csv"),
        ("t.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("t.arff", b"@relation x\n@attribute a real\n@data\nz\n", "cannot be read as arff"),
        ("t.arff", b"@relation x\n@attribute a real\n@attribute a real\n@data\n1,1\n", "as arff"),
        ("t.arff", b"@relation x\n@attribute a {u}\n@data\nw\n", "cannot be read as arff"),
    ],
)
def test_an_unusable_file_is_one_line_that_names_it(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_own(tmp_path / name)
    message = one_line(error)
    assert message.startswith(f"{tmp_path / name}: ")
    assert says in message


def test_a_missing_file_of_ones_own_is_named(tmp_path):
    with pytest.raises(DataError, match=r"own\.parquet: there is no such file"):
        load_own(tmp_path / "own.parquet")


@pytest.mark.real_data
@needs_real
def test_the_real_table_passes_and_a_single_changed_value_does_not(tmp_path, cache):
    table = load_steel(Path(REAL))
    assert table.content_hash == hash_frame(table.frame) == data.STEEL_HASH
    assert {name: str(dtype) for name, dtype in table.frame.dtypes.items()} == {
        **dict.fromkeys([*FEATURES, *FLAGS], "float64"),
        "Class": "int64",
    }
    assert cache.exists()
    for suffix in ("csv", "parquet", "arff"):
        copy = written(table.frame, tmp_path / f"copy.{suffix}")
        assert load_steel(copy).content_hash == data.STEEL_HASH
    table.frame.loc[1000, "V26"] += 1e-4
    with pytest.raises(DataError, match="content hash"):
        load_steel(written(table.frame, tmp_path / "changed.csv"))
