"""Feature columns: what each one is, and how a frame becomes arrays.

Scaling, imputing and one-hot coding are fitted fold by fold in `preprocess.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tune_steel.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MISSING = "<missing>"
_MOST_CATEGORIES = 64
_LARGEST = 1e30  # networks compute in single precision, whose largest number is 3e38


def shorten(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, at most `most` of them."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class Schema:
    """What each feature column is, learnt from the development rows.

    Attributes:
        numeric: Numeric columns, in order.
        flagged: Positions in `numeric` of the columns with gaps, each of which gets a
            missing-value flag.
        categorical: Each categorical column with its known values; code i means value i, and
            -1 (a value the development rows do not hold) becomes all zeros.
    """

    numeric: tuple[str, ...]
    flagged: tuple[int, ...]
    categorical: tuple[tuple[str, tuple[str, ...]], ...]

    def encode(self, frame: pd.DataFrame) -> Features:
        """Reads the schema's columns of a frame.

        Raises:
            DataError: A column is missing, not numeric, or holds an infinite value.
        """
        names = [*self.numeric, *(name for name, _ in self.categorical)]
        absent = [name for name in names if name not in frame.columns]
        if absent:
            raise DataError(f"the table has no column {shorten(absent)}")
        numeric = np.empty((len(frame), len(self.numeric)))
        for i, name in enumerate(self.numeric):
            kind = frame[name].dtype
            if kind.kind in "mMc":
                raise DataError(f"column {name} is not numeric (it is {kind})")
            try:
                numeric[:, i] = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)
            except (TypeError, ValueError) as error:
                raise DataError(f"column {name} is not numeric ({error})") from None
            if (np.abs(numeric[:, i]) > _LARGEST).any():
                raise DataError(
                    f"column {name} holds infinite values or some above {_LARGEST:g}; "
                    "clip or remove them"
                )
        codes = np.empty((len(frame), len(self.categorical)), dtype=np.int64)
        for i, (name, values) in enumerate(self.categorical):
            codes[:, i] = _codes(frame[name], values)
        return Features(numeric, codes)

    def foreign(self, frame: pd.DataFrame) -> Iterator[str]:
        """A line for each categorical column of which a frame holds no known value."""
        for name, values in self.categorical:
            column = frame[name].drop_duplicates().dropna()
            given = set(_as_text(column))
            if given and max(_codes(column, values)) < 0:
                yield (
                    f"column {name}: no value of it ({shorten(sorted(given))}) is a known one "
                    f"({shorten(list(values))}); they count as unknown"
                )


@dataclass(frozen=True)
class Features:
    """Encoded feature columns: `numeric` float64 [n, P] with NaN gaps, `codes` int64 [n, Q]."""

    numeric: Floats
    codes: Ints

    def __len__(self) -> int:
        return len(self.numeric)

    def take(self, positions: Ints) -> Features:
        """The features of some rows."""
        return Features(self.numeric[positions], self.codes[positions])


def _as_text(column: pd.Series[Any]) -> list[str]:
    gaps = column.isna().to_numpy()
    return [MISSING if gap else as_text(v) for v, gap in zip(column.tolist(), gaps, strict=True)]


def _codes(column: pd.Series[Any], values: Sequence[str]) -> list[int]:
    """The position of each value among the known ones, -1 of another.

    A number that is not known as it is written here may be as another text: a file whose column
    held words, too, gave 1.0 as the text it is.
    """
    position = {value: code for code, value in enumerate(values)}
    codes = [position.get(text, -1) for text in _as_text(column)]
    if min(codes, default=0) < 0 and column.dtype.kind in "iuf":
        numbers: dict[float, int] = {}
        for value, code in reversed(position.items()):
            with suppress(ValueError):
                numbers[float(value)] = code
        codes = [
            numbers.get(number, -1) if code < 0 else code
            for code, number in zip(codes, column.tolist(), strict=True)
        ]
    return codes


def as_text(value: object) -> str:
    """A category or class in words: 1.0 is 1, for a gap makes floats of a column of integers."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def learn_schema(frame: pd.DataFrame, features: Sequence[str]) -> tuple[Schema, list[str]]:
    """Decides what each column is, from development rows only.

    Returns:
        The schema, and a line for each column that was dropped or cut.

    Raises:
        DataError: A column of an unusable type, or no usable column.
    """
    numeric: list[str] = []
    flagged: list[int] = []
    categorical: list[tuple[str, tuple[str, ...]]] = []
    notes: list[str] = []
    for name in features:
        column = frame[name]
        dtype = column.dtype
        if column.nunique(dropna=False) < 2:
            notes.append(f"column {name} is constant and was dropped")
        elif pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
            if column.isna().any():
                flagged.append(len(numeric))
            numeric.append(name)
        elif pd.api.types.is_datetime64_any_dtype(dtype) or pd.api.types.is_timedelta64_dtype(
            dtype
        ):
            raise DataError(
                f"column {name} holds dates or durations; turn it into numbers or drop it"
            )
        else:
            if column.nunique() == len(column):
                notes.append(f"column {name} names every row differently and was dropped")
                continue
            counts = pd.Series(_as_text(column)).value_counts()
            counts = counts.sort_index().sort_values(ascending=False, kind="stable")
            if len(counts) > _MOST_CATEGORIES:
                notes.append(
                    f"column {name} has {len(counts)} categories; the {_MOST_CATEGORIES} most "
                    "frequent are kept, the others count as unknown"
                )
            kept = sorted(str(value) for value in counts.index[:_MOST_CATEGORIES])
            categorical.append((name, tuple(kept)))
    if not numeric and not categorical:
        raise DataError("no usable feature column is left")
    return Schema(tuple(numeric), tuple(flagged), tuple(categorical)), notes
