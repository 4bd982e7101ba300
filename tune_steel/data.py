"""Tables in: from a file, the cache, OpenML or the stand-in; the checks; the Parquet cache.

What a table's columns mean for a task (features, target, splits) is `tasks.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import platformdirs

from tune_steel.errors import DataError
from tune_steel.terminal import say

if TYPE_CHECKING:
    from collections.abc import Iterable


Source = Literal["file", "cache", "openml", "stand-in"]

STEEL_NAME = "steel-plates-fault"
STEEL_OPENML_ID = 1504
STEEL_ROWS = 1941
STEEL_HASH = "34b817db7432a65f333ba8c4004602677b4e9b249da457be986e1c9125fdd6f5"

FAULT_NAMES: tuple[str, ...] = (
    "Pastry",
    "Z_Scratch",
    "K_Scratch",
    "Stains",
    "Dirtiness",
    "Bumps",
)
FEATURE_NAMES: dict[str, str] = {
    "V1": "X_Minimum",
    "V2": "X_Maximum",
    "V3": "Y_Minimum",
    "V4": "Y_Maximum",
    "V5": "Pixels_Areas",
    "V6": "X_Perimeter",
    "V7": "Y_Perimeter",
    "V8": "Sum_of_Luminosity",
    "V9": "Minimum_of_Luminosity",
    "V10": "Maximum_of_Luminosity",
    "V11": "Length_of_Conveyer",
    "V12": "TypeOfSteel_A300",
    "V13": "TypeOfSteel_A400",
    "V14": "Steel_Plate_Thickness",
    "V15": "Edges_Index",
    "V16": "Empty_Index",
    "V17": "Square_Index",
    "V18": "Outside_X_Index",
    "V19": "Edges_X_Index",
    "V20": "Edges_Y_Index",
    "V21": "Outside_Global_Index",
    "V22": "LogOfAreas",
    "V23": "Log_X_Index",
    "V24": "Log_Y_Index",
    "V25": "Orientation_Index",
    "V26": "Luminosity_Index",
    "V27": "SigmoidOfAreas",
}
FEATURES: tuple[str, ...] = tuple(FEATURE_NAMES)
FLAGS: tuple[str, ...] = tuple(f"V{number}" for number in range(28, 34))

_CLASS_COUNTS = dict(
    zip((*FAULT_NAMES, "Other_Faults"), (158, 190, 391, 72, 55, 402, 673), strict=True)
)
_STEEL_DEADLINE_S = 60.0
_OPENML_DEADLINE_S = 900.0
_OWN_TABLE = (
    "a modified copy is a table of your own: drop V28..V33, which are the label, "
    "and pass --target Class"
)


@dataclass(frozen=True)
class Table:
    """A table and where it came from.

    Attributes:
        name: `steel-plates-fault`, the stem of a file's name, or `openml-<id>`.
        frame: Every column, rows in the order of the source, indexed 0, 1, 2...
        source: Where this run read it.
        content_hash: `hash_frame` of `frame`.
        target: The target column, when the source itself names one (OpenML's default target).
    """

    name: str
    frame: pd.DataFrame
    source: Source
    content_hash: str
    target: str | None = None


def load_steel(
    data: Path | None = None, source: Literal["auto", "openml", "stand-in"] = "auto"
) -> Table:
    """Load the Steel Plates Faults table.

    With `auto` the table is `data`, else the file that TUNE_STEEL_DATA names, else the cached
    copy, else OpenML dataset 1504, else the stand-in, which is announced on stderr. Every table
    passes the same checks, and one that is read from a file or from OpenML is cached.

    Args:
        data: A copy of the table (CSV, Parquet or ARFF) in the form of OpenML dataset 1504.
        source: `openml` and `stand-in` ask that source and no other.

    Returns:
        V1..V33 as float64 and Class (1 = named fault, 2 = Other_Faults) as int64, 1941 rows.

    Raises:
        DataError: The source that was asked for fails, or holds another table.
    """
    if data is not None and source != "auto":
        raise DataError(f"both --data {data} and --source {source} are given; give one of them")
    if source == "stand-in":
        return _stand_in()
    if source == "openml":
        try:
            return _steel_from_openml()
        except DataError as error:
            raise DataError(f"{error}; pass --data FILE to use a copy that you have") from None
    named = data or os.environ.get("TUNE_STEEL_DATA")
    if named:
        try:
            where = str(data or f"{named} (named by TUNE_STEEL_DATA)")
            frame = _check_steel(_read(Path(named), where), where, STEEL_HASH)
        except _OtherTableError as error:
            raise DataError(f"{error}; {_OWN_TABLE}") from None
        _write_cache(frame)
        return Table(STEEL_NAME, frame, "file", STEEL_HASH)
    cached = _read_cache()
    if cached is not None:
        return Table(STEEL_NAME, cached, "cache", STEEL_HASH)
    try:
        return _steel_from_openml()
    except DataError as error:
        say(
            f"{error}: using the built-in STAND-IN table; "
            "its scores say nothing about steel plates"
        )
        return _stand_in()


def load_own(data: Path) -> Table:
    """Load a table of one's own from a CSV, Parquet or ARFF file.

    Numbers become numeric columns, texts strings, and nominal ARFF attributes categories.

    Raises:
        DataError: The file is missing, of another kind, unreadable, empty, or has two columns of
            one name.
    """
    frame = _read(Path(data))
    return Table(Path(data).stem, frame, "file", hash_frame(frame))


def load_openml(dataset_id: int) -> Table:
    """Load any dataset from OpenML, without the columns that it marks as row ids or to ignore.

    Raises:
        DataError: The dataset cannot be fetched or read.
    """
    frame, target = _fetch(dataset_id, _OPENML_DEADLINE_S)
    return Table(f"openml-{dataset_id}", frame, "openml", hash_frame(frame), target)


def hash_frame(frame: pd.DataFrame) -> str:
    """The SHA-256 (hex) of a table's column names, kinds (number or text) and values.

    The file format and pandas' dtypes leave no trace: 3 and 3.0 are equal, and so are a string
    and a category of the same text, every kind of missing value, and 0.0 and -0.0.
    """
    digest = hashlib.sha256()
    for name, column in frame.items():
        number = pd.api.types.is_numeric_dtype(column)
        digest.update(json.dumps([str(name), "number" if number else "text"]).encode())
        if number:
            values = column.to_numpy(dtype="<f8", na_value=np.nan) + 0.0
            values[np.isnan(values)] = np.nan
            digest.update(values.tobytes())
        else:
            texts = column.astype(object).where(column.notna(), None)
            digest.update(json.dumps([t if t is None else str(t) for t in texts]).encode())
    return digest.hexdigest()


class _OtherTableError(DataError):
    """A readable table that is not the Steel Plates Faults table."""


def _check_steel(frame: pd.DataFrame, where: str, expected_hash: str | None) -> pd.DataFrame:
    """The table in its fixed column order and dtypes, or the first check that it fails."""
    columns = [*FEATURES, *FLAGS, "Class"]
    missing = [name for name in columns if name not in frame]
    extra = [str(name) for name in frame if name not in columns]
    if missing or extra:
        raise _OtherTableError(
            f"{where}: the steel table has the columns V1..V33 and Class; "
            f"missing: {_listed(missing)}; not expected: {_listed(extra)}"
        )
    if len(frame) != STEEL_ROWS:
        raise _OtherTableError(f"{where}: {len(frame)} rows; the steel table has {STEEL_ROWS}")
    raw = frame[columns]
    holes = [name for name in columns if raw[name].isna().any()]
    if holes:
        raise _OtherTableError(
            f"{where}: missing values in {_listed(holes)}; the steel table has none"
        )
    numbers = raw.astype(object).apply(pd.to_numeric, errors="coerce")
    wrong = [name for name in columns if numbers[name].isna().any()]
    if wrong:
        raise _OtherTableError(
            f"{where}: values that are not numbers in {_listed(wrong)}; the steel table has none"
        )
    flags, label = numbers[list(FLAGS)], numbers["Class"]
    if not (flags.isin([0, 1]).all(axis=None) and (flags.sum(axis=1) == (label == 1)).all()):
        raise _OtherTableError(
            f"{where}: the fault flags V28..V33 must be 0 or 1 and hold a single 1 in rows of "
            "Class 1 and none in rows of Class 2"
        )
    counts = dict(
        zip(_CLASS_COUNTS, [*flags.sum().astype(int), int((label == 2).sum())], strict=True)
    )
    if counts != _CLASS_COUNTS:
        raise _OtherTableError(
            f"{where}: class counts {counts}; the steel table has {_CLASS_COUNTS}"
        )
    table: pd.DataFrame = numbers.astype("float64").astype({"Class": "int64"})
    if expected_hash is not None and (found := hash_frame(table)) != expected_hash:
        raise _OtherTableError(
            f"{where}: the values or their order differ from the published table "
            f"(content hash {found[:12]}, expected {expected_hash[:12]})"
        )
    return table


def _stand_in() -> Table:
    from tune_steel.stand_in import generate

    frame = _check_steel(generate(), "the stand-in", None)
    return Table(STEEL_NAME, frame, "stand-in", hash_frame(frame))


def _steel_from_openml() -> Table:
    frame, _ = _fetch(STEEL_OPENML_ID, _STEEL_DEADLINE_S)
    frame = _check_steel(frame, f"OpenML dataset {STEEL_OPENML_ID}", STEEL_HASH)
    _write_cache(frame)
    return Table(STEEL_NAME, frame, "openml", STEEL_HASH)


def _fetch(dataset_id: int, deadline_s: float) -> tuple[pd.DataFrame, str | None]:
    from tune_steel.openml_source import download

    with tempfile.TemporaryDirectory(prefix="tune_steel-openml-") as folder:
        got = download(dataset_id, Path(folder), deadline_s)
        frame = _read(got.arff, f"OpenML dataset {dataset_id}")
    frame = frame.drop(columns=list(got.left_out), errors="ignore")
    return frame, got.target if got.target in frame else None


def _cache_path() -> Path:
    return platformdirs.user_cache_path("tune_steel") / f"{STEEL_NAME}.parquet"


def _read_cache() -> pd.DataFrame | None:
    path = _cache_path()
    try:
        return _check_steel(pd.read_parquet(path), str(path), STEEL_HASH)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a damaged file does to the reader
        say(f"ignoring the cached table {path}: {_line(error)}")
        return None


def _write_cache(frame: pd.DataFrame) -> None:
    path = _cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
            part = Path(folder) / path.name
            frame.to_parquet(part)
            part.replace(path)
    except OSError as error:
        say(f"the table is not cached: {_line(error)}")


def _read(path: Path, where: str | None = None) -> pd.DataFrame:
    """Read a file by its suffix; `where` is what errors call it."""
    where = where or str(path)
    reader = {".csv": _csv, ".parquet": _parquet, ".pq": _parquet, ".arff": _arff}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise DataError(f"{where}: a table's file ends in .csv, .parquet, .pq or .arff")
    try:
        frame = reader(path)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file") from None
    except Exception as error:  # the readers raise many kinds, and any of them means the same
        raise DataError(f"{where}: cannot be read as {path.suffix[1:]}: {_line(error)}") from None
    twice = sorted(set(frame.columns[frame.columns.duplicated()].dropna()))
    if twice:
        raise DataError(f"{where}: more than one column is called {_listed(twice)}")
    if frame.empty:
        raise DataError(f"{where}: the table has no rows or no columns")
    return frame.apply(_plain)


def _csv(path: Path) -> pd.DataFrame:
    # read_csv takes surplus fields for an index and renames the second of two equal names; the
    # first two lines, read without a header, are an error and show the names.
    names = pd.read_csv(path, header=None, nrows=2, dtype=str).iloc[0]
    frame = pd.read_csv(path, low_memory=False)
    if names.dropna().duplicated().any():
        return frame.set_axis(names, axis=1)
    if pd.isna(names.iloc[0]) and frame.iloc[:, 0].tolist() == list(range(len(frame))):
        return frame.iloc[
            :, 1:
        ]  # the row numbers that DataFrame.to_csv writes; order is no feature
    return frame


def _parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet as pq

    # pandas' own metadata would turn columns back into an index and into nullable dtypes.
    frame: pd.DataFrame = pq.read_table(path).to_pandas(ignore_metadata=True)
    return frame.drop(columns="__index_level_0__", errors="ignore")


def _arff(path: Path) -> pd.DataFrame:
    import arff

    with path.open(encoding="utf-8") as file:
        content: dict[str, Any] = arff.load(file)
    kinds = dict(content["attributes"])
    frame = pd.DataFrame(content["data"], columns=list(kinds), dtype=object)
    return frame.astype(
        {
            name: pd.CategoricalDtype(kind) if isinstance(kind, list) else "float64"
            for name, kind in kinds.items()
            if kind != "STRING"
        }
    )


def _plain(column: pd.Series[Any]) -> pd.Series[Any]:
    """Numbers, strings, times and categories as they are; Python's other objects as strings."""
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in {"decimal", "empty", "integer", "floating", "mixed-integer-float"}:
        return column.astype("float64") if column.dtype == object else column
    if kind == "string" or pd.api.types.is_numeric_dtype(column) or kind == "categorical":
        return column
    if kind in {"datetime", "datetime64", "date"}:
        return pd.to_datetime(column)
    if kind in {"timedelta", "timedelta64"}:
        return pd.to_timedelta(column)
    return column.map(str, na_action="ignore")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])]) or "none"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
