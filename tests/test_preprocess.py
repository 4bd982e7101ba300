import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm, rankdata
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from trials import LEARNING

from tune_steel.config import TrialConfig
from tune_steel.data import Table
from tune_steel.ensemble import Calibration, Combination
from tune_steel.errors import DataError
from tune_steel.features import Features, Schema, learn_schema
from tune_steel.fit import Fit
from tune_steel.predict import FittedModel, Member, load_model, save_model
from tune_steel.preprocess import Preprocessing, _column_quantiles, fit_preprocessing
from tune_steel.splits import freeze, prepare
from tune_steel.tasks import own_task

SCALINGS = ("standard", "robust", "quantile")
CLIP = norm.ppf(1 - 1e-7)


pytestmark = pytest.mark.usefixtures("one_thread")


def numeric_features(numeric):
    numeric = np.asarray(numeric, dtype=np.float64)
    schema = Schema(tuple(f"x{i}" for i in range(numeric.shape[1])), (), ())
    return schema, Features(numeric, np.empty((len(numeric), 0), dtype=np.int64))


def fitted(scaling, numeric, *train):
    """A fit on rows of a numeric matrix; without `train` on all of them."""
    schema, features = numeric_features(numeric)
    train = train or (np.arange(len(features)),)
    return fit_preprocessing(scaling, schema, features, train)


def transformed(preprocessing, numeric):
    return preprocessing.transform(numeric_features(numeric)[1])


def draw(rows, seed=0):
    """A normal, a skewed, a heavy-tailed, a shifted and a rounded column."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            rng.normal(size=rows),
            np.exp(2 * rng.normal(size=rows)),
            rng.standard_t(2, size=rows) * 1e4,
            1e6 + rng.normal(size=rows),
            rng.normal(size=rows).round(1),
        ],
        axis=1,
    )


def test_standard_scaling_equals_the_standard_scaler_of_scikit_learn():
    train, new = draw(200), draw(50, seed=1) * 3
    expected = StandardScaler().fit(train)
    preprocessing = fitted("standard", train)
    for rows in (train, new):
        out = transformed(preprocessing, rows)
        assert out.shape == (1, len(rows), 5)
        assert out.dtype == np.float32
        near = np.clip(expected.transform(rows), -1e4, 1e4)
        np.testing.assert_allclose(out[0], near, rtol=1e-5, atol=1e-5)


# With 2^n + 1 rows every quantile is a row's value without rounding; with others either side may
# take the last row of a tie for the one beside it. 1500 are more than the 1000 quantiles kept.
@pytest.mark.parametrize("rows", [2, 33, 257, 1500])
def test_quantile_scaling_equals_the_quantile_transformer_of_scikit_learn(rows):
    train, new = draw(rows), draw(60, seed=1)
    # Ties inside the range: a rounded column, and one value for half of the rows.
    train[: rows // 2, 2] = np.median(train[:, 2])
    if rows == 2:
        train[:, 4] = [-1, 1]
    new[0], new[1] = -1e9, 1e9  # out of range
    new[2], new[3] = train.min(axis=0), train.max(axis=0)
    new[4] = np.median(train, axis=0)
    expected = QuantileTransformer(
        output_distribution="normal", n_quantiles=min(1000, rows), subsample=None
    ).fit(train)
    preprocessing = fitted("quantile", train)
    assert preprocessing.state["quantiles"].shape == (1, min(1000, rows), 5)
    for matrix in (train, new):
        wanted = expected.transform(matrix)
        # At ends of several rows scikit-learn clips, tune_steel takes the middle of the ranks.
        tied = ((train == train.min(axis=0)).sum(axis=0) > 1) | (
            (train == train.max(axis=0)).sum(axis=0) > 1
        )
        at_end = (matrix == train.min(axis=0)) | (matrix == train.max(axis=0))
        compared = ~(tied & at_end)
        assert compared.sum() > 0.9 * compared.size
        out = transformed(preprocessing, matrix)[0]
        np.testing.assert_allclose(out[compared], wanted[compared], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 7, 1000, 1397])
def test_quantiles_are_numpys_to_the_bit(rows):
    rng = np.random.default_rng(rows)
    x = np.stack([rng.normal(size=rows), rng.integers(0, 4, rows), rng.lognormal(9, 4, rows)], 1)
    for references in (np.linspace(0, 1, min(rows, 1000)), np.array([0.25, 0.5, 0.9])):
        assert np.array_equal(_column_quantiles(x, references), np.quantile(x, references, axis=0))


def test_quantile_scaling_clips_what_is_out_of_range():
    out = transformed(fitted("quantile", [[1.0], [2.0], [4.0]]), [[-1e300], [0.9], [2], [1e300]])
    np.testing.assert_allclose(out[0, :, 0], [-CLIP, -CLIP, 0, CLIP], rtol=1e-6, atol=1e-7)


def test_quantile_scaling_gives_a_repeated_value_the_middle_of_its_ranks_at_the_ends_too():
    # Of 101 rows the first 21 are 0 (ranks 0 to .2) and the last 11 are 5 (ranks .9 to 1).
    column = np.concatenate([np.zeros(21), np.linspace(1, 4, 69), np.full(11, 5.0)])
    out = transformed(fitted("quantile", column[:, None]), [[0.0], [5.0]])
    np.testing.assert_allclose(out[0, :, 0], norm.ppf([0.10, 0.95]), rtol=1e-5)


@pytest.mark.parametrize("rows", [80, 200, 333])
def test_quantile_scaling_maps_the_rank_of_a_value_among_the_training_rows(rows):
    column = draw(rows)[:, 4]
    out = transformed(fitted("quantile", column[:, None]), column[:, None])[0, :, 0]
    ranks = rankdata(column) - 1
    # Interpolated quantiles may miss the edge of a tie by rounding: half a rank.
    np.testing.assert_allclose(norm.cdf(out) * (rows - 1), ranks, atol=0.501)


def test_quantile_scaling_never_falls_as_values_rise():
    train = draw(300)[:, 4:]
    grid = np.linspace(train.min() - 1, train.max() + 1, 2001)[:, None]
    out = transformed(fitted("quantile", train), grid)[0, :, 0]
    assert (np.diff(out) >= 0).all()


def test_robust_scaling_equals_its_formula():
    train, new = draw(200), draw(50, seed=1) * 3
    preprocessing = fitted("robust", train)
    middle = np.median(train, axis=0)
    low, high = np.percentile(train, [25, 75], axis=0)
    for rows in (train, new):
        scaled = (rows - middle) / (high - low)
        expected = scaled / np.sqrt(1 + (scaled / 3) ** 2)
        out = transformed(preprocessing, rows)[0]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(out).max() <= 3


def test_robust_scaling_takes_half_of_the_range_where_the_quartiles_coincide():
    column = np.array([0.0] * 7 + [-1, 2, 5])[:, None]
    out = transformed(fitted("robust", column), [[0.0], [3.0], [-6.0]])[0, :, 0]
    scaled = np.array([0, 1, -2])  # half of the range from -1 to 5 is 3
    np.testing.assert_allclose(out, scaled / np.sqrt(1 + (scaled / 3) ** 2), rtol=1e-6)


def test_robust_scaling_clips_extreme_values_smoothly():
    train = draw(100)[:, :1]
    out = transformed(fitted("robust", train), [[1e200], [-1e200], [1e30]])[0, :, 0]
    np.testing.assert_allclose(out, [3, -3, 3], rtol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_only_training_rows_are_fitted_on(scaling):
    features = mixed_features()
    schema = MIXED
    train = (np.arange(0, 40), np.arange(20, 50))
    others = np.arange(50, 80)
    scrambled = Features(features.numeric.copy(), features.codes.copy())
    scrambled.numeric[others] = 1e5 * np.random.default_rng(1).normal(size=(30, 3))
    scrambled.numeric[others[::3]] = np.nan
    scrambled.codes[others] = 0
    one, other = (fit_preprocessing(scaling, schema, f, train) for f in (features, scrambled))
    assert np.array_equal(one.median, other.median)
    assert one.state.keys() == other.state.keys()
    for name, array in one.state.items():
        assert np.array_equal(array, other.state[name])
    # And a replica does not read the training rows of another.
    scrambled.numeric[40:50] *= -7
    third = fit_preprocessing(scaling, schema, scrambled, train)
    assert np.array_equal(one.median[0], third.median[0])
    for name, array in one.state.items():
        assert np.array_equal(array[0], third.state[name][0])
        assert not np.array_equal(array[1], third.state[name][1])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_each_replica_is_fitted_as_it_would_be_alone(scaling):
    numeric = draw(90)
    train = (np.arange(0, 60), np.arange(30, 90))
    together = transformed(fitted(scaling, numeric, *train), numeric)
    assert together.shape == (2, 90, 5)
    for r, rows in enumerate(train):
        alone = transformed(fitted(scaling, numeric, rows), numeric)
        assert np.array_equal(together[r], alone[0])
    assert not np.isclose(together[0], together[1]).all()


MIXED = Schema(
    numeric=("whole", "gaps", "more_gaps"),
    flagged=(1, 2),
    categorical=(("shade", ("blue", "green", "red")), ("site", ("north", "south"))),
)


def mixed_features(rows=80):
    rng = np.random.default_rng(0)
    numeric = rng.normal(size=(rows, 3)) * [1, 10, 100]
    numeric[rng.random(rows) < 0.3, 1] = np.nan
    numeric[rng.random(rows) < 0.6, 2] = np.nan
    codes = np.stack([rng.integers(-1, 3, rows), rng.integers(0, 2, rows)], axis=1)
    return Features(numeric, codes)


@pytest.mark.parametrize("rows", [1, 2, 59, 60])
def test_medians_of_columns_without_gaps_are_those_with_gaps_to_the_bit(rows):
    """Where a fold has no gap at all, the faster of NumPy's two medians is taken."""
    values = draw(rows)
    assert (fitted("standard", values).median[0] == np.nanmedian(values, axis=0)).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_columns_are_numeric_then_flags_then_one_hot(scaling):
    features = mixed_features()
    preprocessing = fit_preprocessing(scaling, MIXED, features, [np.arange(60)])
    assert preprocessing.width == 3 + 2 + 3 + 2
    (out,) = preprocessing.transform(features)
    assert out.shape == (80, 10)
    assert np.array_equal(out[:, 3:5], np.isnan(features.numeric[:, 1:]))
    for row, (shade, site) in zip(out, features.codes, strict=True):
        assert row[5:8].tolist() == [float(shade == code) for code in range(3)]
        assert row[8:10].tolist() == [float(site == code) for code in range(2)]
    assert (features.codes[:, 0] == -1).any()  # an unknown category was among them: all zeros
    assert np.isfinite(out).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_gaps_count_as_the_median_of_the_training_rows(scaling):
    features = mixed_features()
    train = np.arange(40)
    preprocessing = fit_preprocessing(scaling, MIXED, features, [train])
    medians = np.nanmedian(features.numeric[train], axis=0)
    np.testing.assert_allclose(preprocessing.median, [medians])
    filled = np.where(np.isnan(features.numeric), medians, features.numeric)
    expected = transformed(fitted(scaling, filled, train), filled)
    assert np.array_equal(preprocessing.transform(features)[..., :3], expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_gap_in_a_column_without_a_flag_is_filled_without_one(scaling):
    numeric = draw(50)
    new = draw(3, seed=1)
    new[1] = np.nan
    preprocessing = fitted(scaling, numeric)
    out = transformed(preprocessing, new)[0]
    median = transformed(preprocessing, np.median(numeric, axis=0)[None])[0]
    assert out.shape == (3, 5)
    assert np.array_equal(out[1], median[0])


@pytest.mark.parametrize("scaling", SCALINGS)
# The mean of many a constant float is off by a rounding error, so its variance is not 0.
@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -1e9, 123456789.123])
def test_a_column_that_is_constant_in_a_fold_is_left_out_of_it(scaling, value):
    numeric = draw(60)[:, :2]
    numeric[:40, 1] = value
    numeric[40:, 1] = value + 5000.0
    out = transformed(fitted(scaling, numeric, np.arange(40)), numeric)[0]
    assert np.isfinite(out).all()
    assert (out[:, 1] == 0).all()  # elsewhere too: nothing could be learnt of it
    np.testing.assert_array_equal(
        out[:, 0],
        transformed(fitted(scaling, numeric[:, :1], np.arange(40)), numeric[:, :1])[0, :, 0],
    )


@pytest.mark.parametrize("factor", [1e-18, 1e-9, 1e9])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_unit_of_a_column_changes_nothing(scaling, factor):
    numeric, new = draw(60), draw(20, seed=1)
    expected = transformed(fitted(scaling, numeric), new)
    out = transformed(fitted(scaling, numeric * factor), new * factor)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_column_that_is_empty_in_a_fold_stays_finite_and_is_flagged(scaling):
    features = mixed_features()
    features.numeric[:40, 1] = np.nan
    preprocessing = fit_preprocessing(scaling, MIXED, features, [np.arange(40), np.arange(30, 80)])
    out = preprocessing.transform(features)
    assert np.isfinite(out).all()
    assert preprocessing.median[0, 1] == 0
    assert (out[0, :40, 1] == 0).all()
    assert (out[:, :40, 3] == 1).all()
    # The other replica has seen values of that column.
    known = ~np.isnan(features.numeric[:, 1])
    assert len(np.unique(out[1, known, 1])) == known.sum()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_table_of_categories_only_has_no_scaled_column(scaling):
    schema = replace(MIXED, numeric=(), flagged=())
    features = Features(np.empty((80, 0)), mixed_features().codes)
    preprocessing = fit_preprocessing(scaling, schema, features, [np.arange(50)] * 2)
    out = preprocessing.transform(features)
    assert out.shape == (2, 80, 5)
    assert set(np.unique(out)) == {0, 1}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_no_rows_are_transformed_to_no_rows(scaling):
    preprocessing = fit_preprocessing(scaling, MIXED, mixed_features(), [np.arange(50)])
    none = mixed_features().take(np.arange(0))
    assert preprocessing.transform(none).shape == (1, 0, 10)


@pytest.mark.parametrize(
    "dtype", ["int8", "int64", "float32", "float64", "Int64", "Float64", "uint16"]
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_type_of_a_numeric_column_changes_nothing(scaling, dtype):
    values = np.random.default_rng(0).integers(0, 100, 60)
    outs = []
    for kind in (dtype, "float64"):
        frame = pd.DataFrame({"x": pd.Series(values).astype(kind)})
        schema, notes = learn_schema(frame, ["x"])
        features = schema.encode(frame)
        assert notes == []
        assert features.numeric.dtype == np.float64
        outs.append(
            fit_preprocessing(scaling, schema, features, [np.arange(40)]).transform(features)
        )
    assert np.array_equal(*outs)


@pytest.mark.parametrize("dtype", ["object", "category", "string", "bool"])
def test_the_type_of_a_categorical_column_changes_nothing(dtype):
    truth = np.random.default_rng(0).random(60) < 0.4
    values = pd.Series(truth if dtype == "bool" else np.where(truth, "True", "False"))
    frame = pd.DataFrame({"c": values.astype(dtype)})
    schema, _ = learn_schema(frame, ["c"])
    assert schema.categorical == (("c", ("False", "True")),)
    features = schema.encode(frame)
    (out,) = fit_preprocessing("standard", schema, features, [np.arange(40)]).transform(features)
    assert np.array_equal(out, np.stack([~truth, truth], axis=1))


def test_a_gap_among_categories_is_a_category_and_one_that_was_not_known_is_all_zeros():
    known = pd.DataFrame({"c": ["a", None, "b", "a"]})
    schema, _ = learn_schema(known, ["c"])
    assert len(schema.categorical[0][1]) == 3
    features = schema.encode(known)
    preprocessing = fit_preprocessing("standard", schema, features, [np.arange(4)])
    (out,) = preprocessing.transform(features)
    assert out.sum(axis=1).tolist() == [1, 1, 1, 1]
    assert len(np.unique(out, axis=0)) == 3
    (new,) = preprocessing.transform(schema.encode(pd.DataFrame({"c": ["z", np.nan, "b"]})))
    assert new[0].tolist() == [0, 0, 0]
    assert np.array_equal(new[1:], out[1:3])


def test_categories_are_known_again_where_a_gap_made_floats_of_them_and_what_is_strange_is_said():
    schema, _ = learn_schema(pd.DataFrame({"c": ["1", "2", "1", "3"]}), ["c"])
    as_floats = pd.DataFrame({"c": [2.0, np.nan, 1.0]})
    assert schema.encode(as_floats).codes[:, 0].tolist() == [1, -1, 0]
    foreign = pd.DataFrame({"c": ["b", "a", None]})
    assert (schema.encode(foreign).codes == -1).all()
    (line,) = schema.foreign(foreign)
    assert line.startswith("column c: no value of it (a, b) is a known one (")
    assert not list(schema.foreign(as_floats))


def test_a_number_that_was_a_text_among_words_is_known_again():
    schema, _ = learn_schema(pd.DataFrame({"c": ["1.0", "1.50", "2", "beta", "beta"]}), ["c"])
    assert schema.categorical[0][1] == ("1.0", "1.50", "2", "beta")
    new = pd.DataFrame({"c": [2.0, 1.0, 1.5, np.nan, 7.0]})
    assert schema.encode(new).codes[:, 0].tolist() == [2, 0, 1, -1, -1]
    assert schema.encode(pd.DataFrame({"c": [2, 1]})).codes[:, 0].tolist() == [2, 0]
    assert not list(schema.foreign(new))
    assert len(list(schema.foreign(new[4:]))) == 1
    assert not list(schema.foreign(new[3:4]))  # a gap is nothing strange


@pytest.mark.parametrize(
    "values", [pd.to_datetime(["2020-01-01", None]), pd.to_timedelta([1, 2]), [1j, 2j]]
)
def test_dates_durations_and_complex_numbers_are_no_numbers(values):
    schema, _ = learn_schema(pd.DataFrame({"x": [1.0, 2.0]}), ["x"])
    with pytest.raises(DataError, match="column x is not numeric"):
        schema.encode(pd.DataFrame({"x": values}))


def own_frame(classes):
    rng = np.random.default_rng(classes)
    y = rng.integers(0, classes, 150)
    size = rng.normal(size=150) + y
    return pd.DataFrame(
        {
            "size": size,
            "gaps": np.where(rng.random(150) < 0.3, np.nan, np.exp(size)),
            "count": rng.integers(0, 9, 150),
            "shade": rng.choice(["red", "green", "größer", None], size=150),
            "verdict": [f"class {c}" for c in y],
        }
    )


PERCEPTRON = {"depth": 2, "width_1": 9, "width_2": 5, "dropout": 0.2}


def fitted_model(scaling, classes, model=PERCEPTRON):
    task = own_task(Table("plates", own_frame(classes), "file", "hash"), "verdict")
    development, _, _ = prepare(task, freeze(task, seed=0, split=(0.6, 0.2, 0.2), folds=2))
    config = TrialConfig.model_validate(
        {
            "model": model,
            "loss": {"pos_weight": 2.0} if classes == 2 else {"class_weight_power": 0.3},
            "optimizer": {"lr": 0.0123456789, "batch_size": 16},
            "preprocessing": {"scaling": scaling},
        }
    )
    members = []
    for trial in range(2):
        fits = [Fit(config, development, development.folds, (s, s + 1)) for s in (trial, 7)]
        for fit in fits:
            fit.train_epoch(0.01)
        networks = tuple(fit.network for fit in fits)
        members.append(Member(trial, config, fits[0].preprocessing, networks))
    of_members = (Calibration(0.8, tuple(-0.1 * c for c in range(classes))), Calibration())
    calibration = Calibration(1.25, (-0.02, 0.01) if classes == 2 else None)
    threshold = 0.38 if classes == 2 else None
    combination = Combination(np.array([0.75, 0.25]), of_members, calibration, threshold)
    return FittedModel(development.classes, tuple(members), combination, "file")


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("scaling", "architecture"),
    [*((scaling, PERCEPTRON) for scaling in SCALINGS), *(("quantile", m) for m in LEARNING)],
)
def test_a_stored_model_gives_the_probabilities_of_the_one_that_was_stored(
    tmp_path, scaling, architecture, classes
):
    model = fitted_model(scaling, classes, architecture)
    frame = own_frame(classes).drop(columns="verdict")
    frame.loc[0, "shade"] = "never seen"
    expected = model.predict_proba(frame)
    save_model(model, tmp_path / "run" / "model")
    torch.manual_seed(77)
    loaded = load_model(str(tmp_path / "run" / "model"))  # a path as text will do
    assert np.array_equal(loaded.predict_proba(frame), expected)
    assert expected.shape == (150, classes)
    np.testing.assert_allclose(expected.sum(axis=1), 1)
    assert loaded.predict_proba(frame[:0]).shape == (0, classes)
    assert loaded.classes == model.classes
    assert loaded.data_source == model.data_source
    assert loaded.combination.threshold == model.combination.threshold
    assert loaded.combination.of_members == model.combination.of_members
    for one, other in zip(loaded.members, model.members, strict=True):
        assert one.config == other.config
        assert one.preprocessing.schema == other.preprocessing.schema


def test_the_probabilities_of_a_model_are_the_tempered_mean_of_its_corrected_members():
    model = fitted_model("standard", 3)
    frame = own_frame(3)
    features = model.members[0].preprocessing.schema.encode(frame)
    mean = 0
    corrections = ((0.75, 1 / 0.8, np.exp([0, -0.1, -0.2])), (0.25, 1, 1))
    for member, (weight, power, factor) in zip(model.members, corrections, strict=True):
        p = np.exp(member.log_probabilities(features))
        assert p.shape == (2, 2, 150, 3)
        p = p.mean(axis=(0, 1)) ** power * factor
        mean = mean + weight * p / p.sum(axis=-1, keepdims=True)
    tempered = mean ** (1 / 1.25)
    tempered /= tempered.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(frame), tempered)
    assert model.predict(frame).tolist() == np.array(model.classes)[tempered.argmax(1)].tolist()


def test_a_model_predicts_class_names_by_its_threshold():
    model = fitted_model("standard", 2)
    frame = own_frame(2)
    above = model.predict_proba(frame)[:, 1] > 0.38
    assert (above != (model.predict_proba(frame)[:, 1] > 0.5)).any()
    assert model.predict(frame).tolist() == np.where(above, *model.classes[::-1]).tolist()


@pytest.mark.parametrize("architecture", [PERCEPTRON, *LEARNING])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_value_that_is_far_out_gives_probabilities_all_the_same(scaling, architecture):
    frame = own_frame(2)
    for value in (1e20, -1e29):
        frame.loc[0, "size"] = value
        p = fitted_model(scaling, 2, architecture).predict_proba(frame)
        assert np.isfinite(p).all()
        np.testing.assert_allclose(p.sum(axis=1), 1)


def test_strange_categories_are_said_when_new_rows_are_scored():
    model = fitted_model("standard", 2)
    frame = own_frame(2).assign(shade="blue")
    with pytest.warns(UserWarning, match=r"column shade: no value of it \(blue\) is a known one"):
        model.predict(frame)


def test_rows_are_scored_alike_together_one_by_one_and_in_another_order():
    model = fitted_model("quantile", 3)
    frame = own_frame(3).drop(columns="verdict")
    together = model.predict_proba(frame)
    one_by_one = np.concatenate([model.predict_proba(frame.iloc[i : i + 1]) for i in range(9)])
    np.testing.assert_allclose(one_by_one, together[:9], atol=1e-6)
    turned = model.predict_proba(frame.iloc[::-1, ::-1].assign(extra="column"))
    np.testing.assert_allclose(turned[::-1], together, atol=1e-6)


def test_a_stored_model_holds_no_pickle(tmp_path):
    save_model(fitted_model("standard", 2), tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["model.json", "preprocessing.safetensors", "weights.safetensors"]
    for path in tmp_path.glob("*.safetensors"):
        # The format is a length, a JSON header and raw numbers.
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        assert 8 + length + max(ends) == len(content)
    assert json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))["format"] == 6


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match="no model can be read there"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "file", ["model.json", "preprocessing.safetensors", "weights.safetensors"]
)
def test_a_model_with_a_file_that_was_cut_off_is_an_error_that_names_the_folder(tmp_path, file):
    save_model(fitted_model("standard", 2), tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="no model can be read there"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "model format None, known is 6"),
        ("null", "model format None, known is 6"),
        ('{"format": 6}', "the model there is damaged .KeyError"),
        ('{"format": 6, "schema": 3}', "the model there is damaged .TypeError"),
    ],
)
def test_a_model_whose_description_lacks_something_is_an_error(tmp_path, text, said):
    save_model(fitted_model("standard", 2), tmp_path)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(DataError, match=said):
        load_model(tmp_path)


def test_a_model_of_another_format_is_an_error_that_names_both(tmp_path):
    save_model(fitted_model("standard", 2), tmp_path)
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"format": 6', '"format": 9'))
    with pytest.raises(DataError, match="model format 9, known is 6"):
        load_model(tmp_path)


def test_a_fit_holds_plain_arrays_with_a_leading_replica_axis():
    for scaling in SCALINGS:
        preprocessing = fit_preprocessing(
            scaling, MIXED, mixed_features(), [np.arange(40), np.arange(30, 80)]
        )
        assert isinstance(preprocessing, Preprocessing)
        for array in (preprocessing.median, *preprocessing.state.values()):
            assert array.dtype == np.float64
            assert len(array) == 2
            assert array.shape[-1] == 3


@pytest.mark.parametrize("scaling", ["standard", "robust"])
def test_a_column_of_numbers_too_small_for_a_scale_counts_as_constant(scaling):
    numeric = draw(60)[:, :2]
    numeric[:, 1] *= 1e-165
    (out,) = transformed(fitted(scaling, numeric), numeric)
    assert (out[:, 1] == 0).all()
    assert out[:, 0].std() > 0.1
