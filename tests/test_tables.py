from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tune_steel import tables

SCHEMAS = {
    "epochs": tables.epochs_schema(2),
    "trials": tables.trials_schema(7, {"optimizer.lr": pa.float64(), "model.depth": pa.int64()}),
    "predictions": tables.predictions_schema(7),
    "scores": tables.scores_schema(),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_has_a_description_in_the_file(tmp_path: Path, name: str) -> None:
    tables.write_table(tmp_path / "t.parquet", [], SCHEMAS[name])
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert schema.names == SCHEMAS[name].names
    for field in schema:
        assert len(field.metadata[b"doc"]) > 10, field.name


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_table_says_where_its_data_came_from(name: str) -> None:
    assert SCHEMAS[name].names[:3] == ["run", "task", "data_source"]


def test_types_do_not_depend_on_the_values(tmp_path: Path) -> None:
    schema = SCHEMAS["trials"]
    tables.write_table(tmp_path / "a.parquet", [{"trial": 1, "optimizer.lr": 1}], schema)
    tables.write_table(tmp_path / "b.parquet", [{"trial": 2, "error": "x"}, {}], schema)
    tables.write_table(tmp_path / "c.parquet", [], schema)
    for file in "abc":
        assert pq.read_schema(tmp_path / f"{file}.parquet").equals(schema)
    together = pd.concat(pd.read_parquet(tmp_path / f"{file}.parquet") for file in "ab")
    assert together["optimizer.lr"].dtype == "float64"


def test_pandas_duckdb_and_polars_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "epochs.parquet"
    rows = [
        {"run": "r", "trial": i, "epoch": 1, "val_loss": i / 4, "fold_val_loss": [0.5, i]}
        for i in range(3)
    ]
    tables.write_table(path, rows, SCHEMAS["epochs"])
    assert pd.read_parquet(path)["val_loss"].tolist() == [0.0, 0.25, 0.5]
    assert pl.read_parquet(path)["fold_val_loss"].to_list() == [[0.5, 0.0], [0.5, 1.0], [0.5, 2.0]]
    query = f"select trial, val_loss, fold_val_loss[2] from '{path}' order by trial"
    assert duckdb.sql(query).fetchall() == [(0, 0.0, 0.0), (1, 0.25, 1.0), (2, 0.5, 2.0)]


def test_blocks_are_written_one_after_the_other_with_nulls_for_what_they_lack(
    tmp_path: Path,
) -> None:
    path = tmp_path / "predictions.parquet"
    schema = tables.predictions_schema(2)

    def block(rows: list[int], **fixed: object) -> dict[str, object]:
        index = np.array(rows)
        p = index / 10
        return {**fixed, "row": index, "y": index % 2, "label": np.array(["a"] * 2), "p1": p}

    blocks = [block([4, 2], model="tuned", fold=1), block([7, 8], model="boosting", seed=3)]
    tables.write_blocks(path, blocks, schema, run="r", data_source="file")
    assert pq.read_schema(path).equals(schema)
    frame = pd.read_parquet(path)
    assert frame["row"].tolist() == [4, 2, 7, 8]
    assert frame["p1"].tolist() == [0.4, 0.2, 0.7, 0.8]
    assert frame["model"].tolist() == ["tuned", "tuned", "boosting", "boosting"]
    assert frame["run"].tolist() == ["r"] * 4
    assert frame["fold"].isna().tolist() == [False, False, True, True]
    assert frame["seed"].tolist()[2:] == [3, 3]
    assert frame["p0"].isna().all()


def test_blocks_that_break_off_leave_no_file(tmp_path: Path) -> None:
    def blocks() -> Iterator[dict[str, object]]:
        yield {"row": np.array([1])}
        raise RuntimeError("broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        tables.write_blocks(tmp_path / "p.parquet", blocks(), tables.predictions_schema(2))
    assert list(tmp_path.iterdir()) == []


def test_a_row_with_an_unknown_column_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    tables.write_table(path, [{"score": "loss"}], SCHEMAS["scores"])
    with pytest.raises(ValueError, match="no column colour"):
        tables.write_table(path, [{"colour": 1}], SCHEMAS["scores"])
    with pytest.raises(pa.ArrowInvalid):
        tables.write_table(path, [{"rows": "many"}], SCHEMAS["scores"])
    assert pd.read_parquet(path)["score"].tolist() == ["loss"]
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize(
    ("values", "fractions", "expected"),
    [
        ((1, 4), False, pa.int64()),
        ((1, 4), True, pa.float64()),
        ((0.5, 2), False, pa.float64()),
        (("x", "y"), False, pa.string()),
        ((True, False), False, pa.bool_()),
    ],
)
def test_a_parameters_type_follows_its_range(
    values: tuple[object, ...], fractions: bool, expected: pa.DataType
) -> None:
    assert tables.parameter_type(values, fractions=fractions) == expected
