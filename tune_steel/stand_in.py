"""A table that looks like the Steel Plates Faults table and is not: for machines without it.

Each class is a Gaussian copula: normal scores with the class's rank correlations, mapped through
the class's quantile functions. `stand_in.json` holds those, as `scripts/measure_stand_in.py`
measures them. Relations between columns beyond ranks (V2 >= V1, V22 = log10 V5) are not kept.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tune_steel.data import FEATURES, FLAGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED = 1504


def generate() -> pd.DataFrame:
    """Draw the stand-in table: the same one on every call.

    Returns:
        V1..V33 as float64 and Class as int64, 1941 rows, one class after the other.
    """
    text = resources.files("tune_steel").joinpath("stand_in.json").read_text(encoding="utf-8")
    parameters = json.loads(text)
    rng = np.random.default_rng(SEED)
    blocks = [_draw_class(rng, parameters, block) for block in parameters["classes"]]
    return pd.concat(blocks, ignore_index=True)


def _draw_class(
    rng: np.random.Generator, parameters: dict[str, Any], block: dict[str, Any]
) -> pd.DataFrame:
    names, rows = parameters["columns"], block["rows"]
    scores = _normal_scores(rng, rows, np.asarray(block["spearman"]), len(names))
    # Evenly spaced ranks make each column follow its quantile function without sampling noise.
    positions = (scores.argsort(axis=0).argsort(axis=0) + 0.5) / rows
    values = {
        name: _snap(
            np.interp(positions[:, column], parameters["probabilities"], block["quantiles"][name]),
            parameters["decimals"][name],
            parameters["levels"].get(name),
        )
        for column, name in enumerate(names)
    }
    values["V13"] = 1.0 - values["V12"]
    flags = {flag: np.full(rows, float(flag == block["flag"])) for flag in FLAGS}
    label = np.full(rows, 2 if block["flag"] is None else 1, dtype=np.int64)
    return pd.DataFrame({**{name: values[name] for name in FEATURES}, **flags, "Class": label})


def _normal_scores(
    rng: np.random.Generator, rows: int, spearman: NDArray[np.float64], columns: int
) -> NDArray[np.float64]:
    """Normal scores `[rows, columns]` whose sample correlations are those of the copula."""
    above = np.zeros((columns, columns))
    above[np.triu_indices(columns, 1)] = 2 * np.sin(np.pi * spearman / 6)
    correlation = np.eye(columns) + above + above.T
    # Entry by entry measured and rounded, the matrix can have eigenvalues just below zero.
    eigenvalues, vectors = np.linalg.eigh(correlation)
    correlation = (vectors * np.maximum(eigenvalues, 1e-6)) @ vectors.T
    noise = rng.standard_normal((rows, columns))
    noise -= noise.mean(axis=0)
    white = np.linalg.solve(np.linalg.cholesky(noise.T @ noise / rows), noise.T).T
    return white @ np.linalg.cholesky(correlation).T


def _snap(
    values: NDArray[np.float64], decimals: int, levels: list[float] | None
) -> NDArray[np.float64]:
    """Values as the column writes them: its few levels, or its number of decimals."""
    if levels is None:
        return np.round(values, decimals)
    known = np.asarray(levels)
    nearest: NDArray[np.float64] = known[np.abs(values[:, None] - known).argmin(axis=1)]
    return nearest
