import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from tune_steel.scores import (
    Interval,
    _weighted,
    confusion,
    confusion_interval,
    decide,
    interval,
    resample,
    score,
    score_names,
)


def case(classes, rows=60, seed=0, ties=False):
    """Probabilities that know something of the classes, the classes, the reference weights."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    y[:classes] = np.arange(classes)
    logits = rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[y]
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    if ties:  # sixteenths, exact and never 0
        p = (rng.multinomial(16 - classes, p) + 1) / 16
    return p, y, np.linspace(0.4, 2.6, classes)


def bootstrap(p, y, weights, seed, resamples, threshold=None):
    """Every score with its interval."""
    drawn = resample(p, y, weights, seed, resamples, threshold)
    values = score(p, y, weights, threshold)
    return {name: interval(values[name], drawn[name]) for name in drawn}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_of_counted_rows_equal_those_of_repeated_rows_and_scikit_learn(classes, ties):
    p, y, weights = case(classes, ties=ties)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 4, (5, len(y)))
    counts[:, :classes] += 1  # every class is in every resample
    counted = _weighted(p, decide(p), y, weights, counts.astype(float))
    for s, times in enumerate(counts):
        repeated_p, repeated_y = np.repeat(p, times, axis=0), np.repeat(y, times)
        repeated = score(repeated_p, repeated_y, weights)
        assert tuple(repeated) == score_names(classes)
        predicted = repeated_p.argmax(axis=1)
        learn = {
            "loss": sk.log_loss(repeated_y, repeated_p, sample_weight=weights[repeated_y]),
            "log_loss": sk.log_loss(repeated_y, repeated_p),
            "accuracy": sk.accuracy_score(repeated_y, predicted),
            "macro_accuracy": sk.balanced_accuracy_score(repeated_y, predicted),
            "macro_precision": sk.precision_score(
                repeated_y, predicted, average="macro", zero_division=0
            ),
            "macro_f1": sk.f1_score(repeated_y, predicted, average="macro"),
            "auroc": np.mean(
                [sk.roc_auc_score(repeated_y == c, repeated_p[:, c]) for c in range(classes)]
            ),
        }
        if classes == 2:
            by_class = sk.precision_score(repeated_y, predicted, average=None, zero_division=0)
            learn["negative_precision"], learn["positive_precision"] = by_class
        assert learn.keys() == repeated.keys() == counted.keys()
        for name, value in repeated.items():
            assert counted[name][s] == pytest.approx(value, abs=1e-12), name
            assert learn[name] == pytest.approx(value, abs=1e-12), name


def test_a_class_that_is_neither_there_nor_predicted_counts_in_no_macro_mean():
    p, y, weights = case(3)
    two = np.flatnonzero((y < 2) & (p.argmax(axis=1) < 2))
    scores = score(p[two], y[two], weights)
    predicted = p[two].argmax(axis=1)
    assert scores["macro_f1"] == pytest.approx(sk.f1_score(y[two], predicted, average="macro"))
    assert scores["macro_precision"] == pytest.approx(
        sk.precision_score(y[two], predicted, average="macro")
    )
    assert scores["macro_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y[two], predicted))


def test_scores_of_a_certain_error_are_finite():
    p = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = score(p, np.array([0, 1, 1]), np.ones(2))
    assert all(np.isfinite(value) for value in scores.values())
    assert scores["log_loss"] > 10


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_an_interval_holds_its_value_and_the_value_is_the_score(classes):
    p, y, weights = case(classes)
    intervals = bootstrap(p, y, weights, seed=3, resamples=400)
    scores = score(p, y, weights)
    assert tuple(intervals) == score_names(classes)
    for name, one in intervals.items():
        assert one.value == scores[name]
        assert one.low < one.value < one.high, name


def test_intervals_are_the_quantiles_of_resamples_drawn_row_by_row():
    p, y, weights = case(2, rows=50)
    nll = -np.log(p[np.arange(len(y)), y])
    rng = np.random.default_rng(8)
    drawn = []
    for _ in range(4000):
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(y == c), size=(y == c).sum()) for c in range(2)]
        )
        drawn.append(np.average(nll[rows], weights=weights[y[rows]]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    one = bootstrap(p, y, weights, seed=0, resamples=4000)["loss"]
    assert one.low == pytest.approx(low, abs=0.06 * (high - low))
    assert one.high == pytest.approx(high, abs=0.06 * (high - low))


def test_intervals_are_reproduced_by_their_seed_and_by_no_other():
    p, y, weights = case(3)
    first, again, other = (bootstrap(p, y, weights, seed, 200) for seed in (5, 5, 6))
    assert first == again
    assert first["loss"] != other["loss"]
    assert first["loss"].value == other["loss"].value


def test_a_fraction_of_the_resamples_at_a_time_gives_as_many_resamples(monkeypatch):
    p, y, weights = case(2)
    whole = bootstrap(p, y, weights, seed=0, resamples=3000)["log_loss"]
    monkeypatch.setattr("tune_steel.scores._CELLS_A_CHUNK", 7 * len(y) + 1)
    parts = bootstrap(p, y, weights, seed=0, resamples=3000)["log_loss"]
    width = whole.high - whole.low
    assert parts.low == pytest.approx(whole.low, abs=0.06 * width)
    assert parts.high == pytest.approx(whole.high, abs=0.06 * width)


def test_intervals_get_narrower_with_more_rows():
    wide, narrow = (
        bootstrap(*case(2, rows=rows), seed=0, resamples=300)["accuracy"] for rows in (50, 800)
    )
    assert (narrow.high - narrow.low) < 0.5 * (wide.high - wide.low)


def test_the_interval_of_accuracy_holds_the_truth_about_as_often_as_it_says():
    hit, inside, experiments = 0.8, 0, 300
    y = np.repeat([0, 1], 60)
    rng = np.random.default_rng(0)
    for experiment in range(experiments):
        p = np.eye(2)[np.where(rng.random(len(y)) < hit, y, 1 - y)]
        one = bootstrap(p, y, np.ones(2), seed=experiment, resamples=200)["accuracy"]
        inside += one.low <= hit <= one.high
    assert 0.91 <= inside / experiments <= 0.98


def test_every_resample_holds_every_class_as_often_as_the_rows_do():
    # One row of a class: a resample without it would have no AUROC and no recall.
    y = np.array([0] * 30 + [1])
    p = np.linspace(0.1, 0.9, 31)
    p = np.stack([1 - p, p], axis=1)
    intervals = bootstrap(p, y, np.ones(2), seed=0, resamples=500)
    auroc = intervals.pop("auroc")
    assert (auroc.value, auroc.low, auroc.high) == (1, None, None)
    assert all(np.isfinite(intervals[name].low) for name in ("log_loss", "accuracy", "macro_f1"))
    # The class counts are not random: what depends on them alone has no spread.
    constant = bootstrap(np.tile([0.7, 0.3], (31, 1)), y, np.ones(2), seed=0, resamples=500)
    assert all(one.low is one.high is None for one in constant.values())


def test_the_difference_of_two_models_is_of_the_same_draws():
    p, y, weights = case(2, rows=97)
    worse = 0.9 * p + 0.1 * np.roll(p, 1, axis=0)
    one, other = (resample(each, y, weights, 3)["log_loss"] for each in (p, worse))
    gap = score(p, y, weights)["log_loss"] - score(worse, y, weights)["log_loss"]
    paired = interval(gap, one - other)
    nll, worse_nll = (-np.log(each[np.arange(len(y)), y]) for each in (p, worse))
    # Rows are drawn within classes: by hand, the error of the mean of the rows' differences.
    parts = [(nll - worse_nll)[y == c] for c in range(2)]
    error = np.sqrt(sum(len(part) * part.var() for part in parts)) / len(y)
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    apart = interval(gap, one - np.roll(other, 1))
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_an_interval_is_said_with_its_ends_or_as_none():
    assert Interval(0.8, 0.75, 0.85).said() == "0.800 [0.750, 0.850]"
    assert Interval(0.02, -0.01, 0.05).said("+") == "+0.020 [-0.010, +0.050]"
    assert interval(1.0, np.ones(5)).said() == "1.000 [-]"


def test_two_rows_have_scores_and_intervals():
    p = np.array([[0.8, 0.2], [0.6, 0.4]])
    intervals = bootstrap(p, np.array([0, 1]), np.ones(2), seed=0, resamples=50)
    # One row of each class: every resample is the two rows.
    assert all(one.low is one.high is None for one in intervals.values())
    assert intervals["accuracy"].value == 0.5
    assert intervals["auroc"].value == 1


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_confusion_matrix_equals_that_of_scikit_learn(classes):
    p, y, _ = case(classes)
    expected = sk.confusion_matrix(y, p.argmax(axis=1), labels=range(classes))
    assert np.array_equal(confusion(p, y), expected)


def test_the_confusion_matrix_has_a_row_for_a_class_that_is_not_there():
    p = np.eye(3)[[0, 1, 1]]
    assert confusion(p, np.array([0, 0, 1])).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_the_intervals_of_a_confusion_matrix_are_exact_binomial_ones():
    table = np.array([[40, 10, 0], [0, 8, 0], [0, 0, 0]])
    low, high = confusion_interval(table)
    assert low.dtype == high.dtype == table.dtype
    for i, row in enumerate(table[:2]):
        for j, count in enumerate(row):
            exact = binomtest(int(count), int(row.sum())).proportion_ci(method="exact")
            assert low[i, j] == np.floor(row.sum() * exact.low)
            assert high[i, j] == np.ceil(row.sum() * exact.high)
    # That none of eight is wrong does not make it certain.
    assert (low[1, 1], high[1, 1], high[1, 0]) == (5, 8, 3)
    assert not low[2].any()
    assert not high[2].any()


def test_a_threshold_moves_what_is_decided_and_no_score_of_probabilities() -> None:
    p, y, weights = case(2)
    plain, moved = score(p, y, weights), score(p, y, weights, 0.3)
    predicted = np.where(p[:, 1] > 0.3, 1, 0)
    assert moved["accuracy"] == pytest.approx((predicted == y).mean())
    assert moved["positive_precision"] == pytest.approx(y[predicted == 1].mean())
    assert moved["accuracy"] != plain["accuracy"]
    for name in ("loss", "log_loss", "auroc"):
        assert moved[name] == plain[name]
    assert bootstrap(p, y, weights, 0, 50, 0.3)["accuracy"].value == moved["accuracy"]
    assert np.array_equal(confusion(p, y, 0.3).sum(axis=0), np.bincount(predicted))
    assert score(p, y, weights, 0.5) == plain
