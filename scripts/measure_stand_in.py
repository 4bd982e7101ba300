"""Measure the real Steel Plates Faults table and write `tune_steel/stand_in.json`.

Only summaries leave the table: per class a few quantiles of each column and the rank correlations.
Run it from the repository's root, with the package installed or on PYTHONPATH:

    python scripts/measure_stand_in.py path/to/steel-plates-fault.csv

Without a path it reads the file that TUNE_STEEL_DATA names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tune_steel.data import FEATURES, FLAGS, load_steel

TARGET = Path(__file__).parents[1] / "tune_steel" / "stand_in.json"
# Closer together at the ends, where the heavy tails are.
PROBABILITIES = [
    0,
    0.01,
    0.03,
    0.06,
    0.1,
    *[n / 20 for n in range(3, 18)],
    0.9,
    0.94,
    0.97,
    0.99,
    1,
]
COLUMNS = [name for name in FEATURES if name != "V13"]  # V13 is 1 - V12
MOST_LEVELS = 32  # a column with fewer distinct values keeps to them


def measure(table: pd.DataFrame) -> dict[str, Any]:
    """The parameters of the stand-in: what `stand_in.json` holds.

    Args:
        table: The real table, as `load_steel` returns it.
    """
    features = table[COLUMNS]
    masks = {flag: table[flag] == 1 for flag in FLAGS} | {None: table["Class"] == 2}
    return {
        "columns": COLUMNS,
        "probabilities": PROBABILITIES,
        "decimals": {name: _decimals(features[name]) for name in COLUMNS},
        "levels": {
            name: sorted(set(features[name]))
            for name in COLUMNS
            if features[name].nunique() <= MOST_LEVELS
        },
        "classes": [_measure_class(flag, features[mask]) for flag, mask in masks.items()],
    }


def _measure_class(flag: str | None, features: pd.DataFrame) -> dict[str, Any]:
    # A column that is constant within the class has no rank correlation.
    correlation = features.corr("spearman").fillna(0.0).to_numpy()
    above = correlation[np.triu_indices(len(COLUMNS), 1)]
    return {
        "flag": flag,
        "rows": len(features),
        "quantiles": {
            name: [float(f"{q:.6g}") for q in np.quantile(features[name], PROBABILITIES)]
            for name in COLUMNS
        },
        "spearman": [round(float(rho), 3) for rho in above],
    }


def _decimals(column: pd.Series) -> int:
    return next(n for n in range(12) if np.allclose(column, column.round(n), rtol=0, atol=1e-12))


def main() -> None:
    """Write the file."""
    table = load_steel(Path(sys.argv[1]) if sys.argv[1:] else None)
    if table.source not in {"file", "cache", "openml"}:
        sys.exit("the real table is needed: give its path")
    TARGET.write_text(json.dumps(measure(table.frame), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
