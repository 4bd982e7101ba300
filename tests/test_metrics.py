import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from trials import LEARNING

from tune_steel.metrics import IGNORED, Scorer
from tune_steel.networks import log_probabilities, output_width
from tune_steel.scores import SCORES, score, score_names

CPU = torch.device("cpu")
ROWS = (41, 60, 23)
LONGEST = max(ROWS)


pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(classes):
    return np.linspace(0.4, 2.6, classes)


def labels(classes, rows, rng):
    """Class indices that hold every class."""
    y = rng.integers(0, classes, rows)
    y[rng.permutation(rows)[:classes]] = np.arange(classes)
    return y


def padded_case(classes, seed=0, decimals=None):
    """Stacked logits and targets of replicas with different numbers of rows.

    The padding holds logits that would move every score if it counted.
    """
    rng = np.random.default_rng(seed)
    logits = torch.full((len(ROWS), LONGEST, output_width(classes)), -30.0)
    logits[..., 0] = 30.0
    target = torch.full((len(ROWS), LONGEST), IGNORED)
    for r, rows in enumerate(ROWS):
        drawn = rng.normal(size=(rows, output_width(classes))) * (1 + r)
        if decimals is not None:
            drawn = drawn.round(decimals)
        logits[r, :rows] = torch.tensor(drawn, dtype=torch.float32)
        target[r, :rows] = torch.tensor(labels(classes, rows, rng))
    return logits, target


def rows_of(logits, target, replica):
    """Probabilities and classes of a replica's own rows."""
    rows = int((target[replica] != IGNORED).sum())
    p = log_probabilities(logits[replica, :rows]).exp().numpy()
    return p, target[replica, :rows].numpy()


def scikit_learn(p, y, weights):
    """Every score by scikit-learn."""
    classes = p.shape[1]
    all_classes = np.arange(classes)
    predicted = p.argmax(axis=1)
    seen = np.union1d(y, predicted)
    precision = sk.precision_score(y, predicted, labels=all_classes, average=None, zero_division=0)
    if classes == 2:
        auroc = sk.roc_auc_score(y, p[:, 1])
    else:
        auroc = np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in all_classes])
    out = {
        "loss": sk.log_loss(y, p, sample_weight=weights[y], labels=all_classes),
        "log_loss": sk.log_loss(y, p, labels=all_classes),
        "accuracy": sk.accuracy_score(y, predicted),
        "macro_accuracy": sk.balanced_accuracy_score(y, predicted),
        "macro_precision": precision[seen].mean(),
        "macro_f1": sk.f1_score(y, predicted, labels=seen, average="macro", zero_division=0),
        "auroc": auroc,
    }
    if classes == 2:
        out["positive_precision"], out["negative_precision"] = precision[1], precision[0]
    return out


def one_replica(logits, y, classes):
    """Scores of one replica, as plain numbers."""
    scorer = Scorer(weights_of(classes), CPU)
    stacked = torch.as_tensor(np.asarray(logits), dtype=torch.float32)[None]
    if stacked.ndim == 2:
        stacked = stacked[..., None]
    scores = scorer(stacked, torch.as_tensor(y)[None])
    return {name: values.item() for name, values in scores.items()}


def test_each_task_has_its_scores_and_each_score_its_words():
    assert score_names(2) == tuple(SCORES)
    assert set(score_names(2)) - set(score_names(3)) == {
        "positive_precision",
        "negative_precision",
    }
    assert all(SCORES.values())


# Rounded logits have ties, between rows and between classes.
@pytest.mark.parametrize("decimals", [None, 0])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_every_score_of_every_replica_equals_that_of_scikit_learn(classes, decimals):
    logits, target = padded_case(classes, decimals=decimals)
    scores = Scorer(weights_of(classes), CPU)(logits, target)
    assert tuple(scores) == score_names(classes)
    for r in range(len(ROWS)):
        p, y = rows_of(logits, target, r)
        expected = scikit_learn(p, y, weights_of(classes))
        assert expected.keys() == scores.keys()
        for name, value in expected.items():
            assert scores[name][r] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("decimals", [None, 0])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_every_score_equals_that_of_the_numpy_scores_on_the_same_rows(classes, decimals):
    logits, target = padded_case(classes, seed=1, decimals=decimals)
    scores = Scorer(weights_of(classes), CPU)(logits, target)
    for r in range(len(ROWS)):
        p, y = rows_of(logits, target, r)
        expected = score(p, y, weights_of(classes))
        assert expected.keys() == scores.keys()
        for name, value in expected.items():
            assert scores[name][r] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("classes", [2, 7])
def test_scores_of_a_replica_do_not_depend_on_the_others_nor_on_what_was_scored_before(classes):
    logits, target = padded_case(classes, seed=2)
    scorer = Scorer(weights_of(classes), CPU)
    together = scorer(logits, target)
    for r, rows in enumerate(ROWS):
        alone = scorer(logits[r : r + 1, :rows], target[r : r + 1, :rows])
        for name, values in alone.items():
            assert values.item() == pytest.approx(together[name][r], abs=1e-12), name


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("classes", [2, 3])
def test_every_score_has_one_value_for_each_replica(classes, replicas):
    logits, target = padded_case(classes)
    scores = Scorer(weights_of(classes), CPU)(logits[:replicas], target[:replicas])
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(
        score_names(classes), (replicas,)
    )


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_padding_rows_count_in_no_score(classes):
    logits, target = padded_case(classes, seed=3)
    scorer = Scorer(weights_of(classes), CPU)
    expected = scorer(logits, target)
    wider = torch.cat([logits, torch.full((len(ROWS), 9, logits.shape[2]), 3.0)], dim=1)
    padding = torch.full((len(ROWS), 9), IGNORED)
    scores = scorer(wider, torch.cat([target, padding], dim=1))
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_perfect_predictions_have_perfect_scores(classes):
    y = np.arange(4 * classes) % classes
    logits = 40.0 * (2 * y - 1) if classes == 2 else 40.0 * np.eye(classes)[y]
    scores = one_replica(logits, y, classes)
    for name, value in scores.items():
        assert value == pytest.approx(0 if name in ("loss", "log_loss") else 1, abs=1e-12), name


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_constant_predictions_have_the_scores_of_guessing(classes):
    y = np.array([0] * 6 + list(range(1, classes)) * 2)
    logits = np.zeros(len(y)) if classes == 2 else np.zeros((len(y), classes))
    scores = one_replica(logits, y, classes)
    share = 6 / len(y)
    assert scores["loss"] == pytest.approx(np.log(classes))
    assert scores["log_loss"] == pytest.approx(np.log(classes))
    assert scores["auroc"] == 0.5
    assert scores["accuracy"] == pytest.approx(share)
    assert scores["macro_accuracy"] == pytest.approx(1 / classes)
    assert scores["macro_precision"] == pytest.approx(share / classes)
    assert scores["macro_f1"] == pytest.approx(2 * share / (1 + share) / classes)
    if classes == 2:
        assert scores["negative_precision"] == pytest.approx(share)
        assert scores["positive_precision"] == 0


def test_a_class_that_is_never_predicted_has_precision_zero_and_counts():
    y = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 1, 1, 1, 0])
    scores = one_replica(4.0 * np.eye(3)[predicted], y, 3)
    assert scores["macro_precision"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores["macro_accuracy"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((0.8 + 0.8 + 0) / 3)


def test_the_two_precisions_of_a_binary_task_are_those_of_their_classes():
    y = np.array([0, 0, 0, 1, 1])
    logits = np.array([-1.0, -1.0, 1.0, 1.0, -1.0])
    scores = one_replica(logits, y, 2)
    assert scores["positive_precision"] == pytest.approx(1 / 2)
    assert scores["negative_precision"] == pytest.approx(2 / 3)


def test_the_loss_weighs_rows_with_the_reference_weights_and_log_loss_does_not():
    y = np.array([0, 0, 1])
    logits = torch.tensor([[[0.5], [-1.0], [2.0]]])
    nll = -log_probabilities(logits)[0].numpy()[np.arange(3), y]
    weights = np.array([0.5, 3.0])
    scores = Scorer(weights, CPU)(logits, torch.tensor(y)[None])
    assert scores["log_loss"][0] == pytest.approx(nll.mean())
    assert scores["loss"][0] == pytest.approx((0.5 * nll[0] + 0.5 * nll[1] + 3 * nll[2]) / 4)


def test_the_losses_of_confident_errors_are_not_cut_off():
    scores = one_replica(np.array([-200.0, 200.0]), np.array([1, 0]), 2)
    assert scores["loss"] == pytest.approx(200)
    assert scores["log_loss"] == pytest.approx(200)
    assert scores["auroc"] == 0


def test_a_worker_imports_neither_what_it_does_not_score_with_nor_a_compiler(steel_rows, tmp_path):
    (tmp_path / "rows").write_bytes(pickle.dumps(steel_rows[0]))
    code = f"""
import pickle, sys
from pathlib import Path
from tune_steel.config import TrialConfig
from tune_steel.fit import Fit

rows = pickle.loads(Path({str(tmp_path / "rows")!r}).read_bytes())
for model in ({LEARNING[0]!r}, dict(depth=1, width_1=8)):
    optimizer = dict(lr=0.1, batch_size=256)
    scaling = dict(scaling="quantile")
    tree = dict(model=model, optimizer=optimizer, preprocessing=scaling)
    assert len(list(Fit(TrialConfig(**tree), rows, rows.folds, [1, 2]).epochs(1))) == 1
heavy = ("scipy.signal", "scipy.special", "scipy.stats", "sklearn", "torch._dynamo", "sympy")
assert not [name for name in heavy if name in sys.modules]
import scipy.signal
assert len(scipy.signal.windows.hann(8)) == 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)
