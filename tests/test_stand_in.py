import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from tune_steel import stand_in
from tune_steel.data import FEATURES, FLAGS, hash_frame, load_steel
from tune_steel.stand_in import generate

REAL = os.environ.get("TUNE_STEEL_DATA")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def real(tmp_path, monkeypatch):
    if not REAL:
        pytest.skip("TUNE_STEEL_DATA is not set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return load_steel(Path(REAL)).frame


def classes(table):
    """0..5 for the flags, 6 for Other_Faults."""
    return np.where(table["Class"] == 2, 6, table[list(FLAGS)].to_numpy().argmax(axis=1))


def distance(one, two):
    return ks_2samp(one, two, method="asymp").statistic


def test_the_stand_in_has_the_schema_and_the_class_counts():
    table = generate()
    assert list(table) == [*FEATURES, *FLAGS, "Class"]
    assert set(table.drop(columns="Class").dtypes) == {np.dtype("float64")}
    assert table["Class"].dtype == np.dtype("int64")
    assert isinstance(table.index, pd.RangeIndex)
    assert np.bincount(classes(table)).tolist() == [158, 190, 391, 72, 55, 402, 673]
    assert (table[list(FLAGS)].sum(axis=1) == (table["Class"] == 1)).all()
    assert not table.isna().any(axis=None)
    assert not table.duplicated().any()


def test_every_call_draws_the_same_table():
    first = generate()
    np.random.default_rng().random()
    pd.testing.assert_frame_equal(first, generate())


def test_another_seed_draws_another_table(monkeypatch):
    first = hash_frame(generate())
    monkeypatch.setattr(stand_in, "SEED", stand_in.SEED + 1)
    assert hash_frame(generate()) != first


def test_the_two_types_of_steel_exclude_each_other():
    table = generate()
    assert table["V12"].isin([0, 1]).all()
    assert (table["V12"] + table["V13"] == 1).all()


def test_values_are_written_with_the_decimals_of_their_column():
    table = generate()
    assert (table["V8"] == table["V8"].round()).all()
    assert (table["V15"] == table["V15"].round(4)).all()
    assert table["V21"].isin([0, 0.5, 1]).all()


def test_the_parameters_are_small():
    assert (ROOT / "tune_steel/stand_in.json").stat().st_size < 120_000


@pytest.mark.real_data
def test_schema_and_class_counts_are_those_of_the_real_table(real):
    table = generate()
    assert table.dtypes.equals(real.dtypes)
    assert np.array_equal(np.bincount(classes(table)), np.bincount(classes(real)))


@pytest.mark.real_data
def test_marginals_are_close_to_the_real_ones(real):
    table = generate()
    pooled = [distance(real[name], table[name]) for name in FEATURES]
    assert max(pooled) < 0.05
    assert np.mean(pooled) < 0.02
    within = [
        distance(real.loc[classes(real) == label, name], table.loc[classes(table) == label, name])
        for name in FEATURES
        for label in range(7)
    ]
    assert max(within) < 0.08
    assert np.mean(within) < 0.04


@pytest.mark.real_data
def test_rank_correlations_are_close_to_the_real_ones(real):
    features = list(FEATURES)
    table = generate()[features]
    difference = (real[features].corr("spearman") - table.corr("spearman")).abs().to_numpy()
    difference = difference[np.triu_indices(len(features), 1)]
    assert difference.max() < 0.15
    assert difference.mean() < 0.04


@pytest.mark.real_data
def test_no_row_is_copied_from_the_real_table(real):
    features = list(FEATURES)
    assert generate()[features].merge(real[features], how="inner").empty
    # Positions and areas alone would already give a real plate away.
    columns = ["V1", "V2", "V3", "V4"]
    assert generate()[columns].merge(real[columns], how="inner").empty


@pytest.mark.real_data
def test_the_packaged_parameters_are_what_the_script_measures(real):
    path = ROOT / "scripts/measure_stand_in.py"
    spec = importlib.util.spec_from_file_location("measure_stand_in", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    packaged = json.loads((ROOT / "tune_steel/stand_in.json").read_text())
    assert json.loads(json.dumps(script.measure(real))) == packaged
