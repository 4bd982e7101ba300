"""Selection, calibration and threshold against plain loops and known answers."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from tune_steel.config import TrialConfig
from tune_steel.ensemble import (
    Calibration,
    Combination,
    best_threshold,
    calibrate,
    combine,
    cross_fit,
    log_loss,
    select,
    unweight,
)
from tune_steel.loss import TrainingLoss, class_weights
from tune_steel.scores import decide, score
from tune_steel.splits import Development


def members(
    seed: int, count: int = 6, rows: int = 200, classes: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of noisy members [M, n, C], each with its own noise, and the classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    y[:classes] = np.arange(classes)
    noise = rng.normal(size=(count, rows, classes)) * rng.uniform(0.8, 2, size=(count, 1, 1))
    return softmax(1.5 * np.eye(classes)[y] + noise, axis=-1), y


@pytest.mark.parametrize(
    ("loss", "counts"),
    [
        ({"pos_weight": 3.0}, (60, 20)),
        ({"class_weight_power": 0.7}, (60, 30, 10)),
        ({"class_weights": {"0": 0.5, "1": 1.0, "2": 6.0}}, (60, 30, 10)),
    ],
)
def test_what_the_training_loss_is_lowest_at_is_calibrated_to_the_natural_frequencies(
    loss: dict[str, object], counts: tuple[int, ...]
) -> None:
    config = TrialConfig.model_validate(
        {
            "model": {"depth": 1, "width_1": 4},
            "loss": loss,
            "optimizer": {"lr": 0.1, "batch_size": 8},
        }
    )
    classes, total = len(counts), sum(counts)
    development = Development(
        None,  # type: ignore[arg-type]
        np.repeat(np.arange(classes), counts),
        np.arange(total),
        (),
        tuple(map(str, range(classes))),
        total / (classes * np.array(counts)),
        None,  # type: ignore[arg-type]
    )
    training = TrainingLoss(config, development, torch.device("cpu"))
    targets = training.targets(torch.tensor(development.y), torch.float64)
    logits = torch.zeros(1 if classes == 2 else classes, dtype=torch.float64)
    for _ in range(3000):
        logits -= training.gradient(logits.expand(total, -1), *targets).sum(0)
    p = torch.cat([-logits, logits]).sigmoid() if classes == 2 else logits.softmax(-1)
    frequencies = np.array(counts) / total
    assert not np.allclose(p.numpy(), frequencies, atol=0.05)
    rows = np.broadcast_to(p.numpy(), (total, classes))
    found = unweight(rows, development.y, class_weights(config, development))
    np.testing.assert_allclose(found.apply(rows)[0], frequencies, rtol=1e-3)


def plain_selection(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Caruana's loop, member by member."""
    chosen: list[int] = []
    rounds = []
    for _ in range(50):
        best = None
        for m in range(len(p)):
            average = np.mean([p[i] for i in [*chosen, m]], axis=0)
            loss = -np.mean([np.log(average[row, c]) for row, c in enumerate(y)])
            if best is None or loss < best[0]:
                best = (loss, m)
        assert best is not None
        chosen.append(best[1])
        rounds.append(best[0])
    size = int(np.argmin(rounds)) + 1
    return np.bincount(chosen[:size], minlength=len(p)) / size


@pytest.mark.parametrize("seed", range(4))
def test_the_selection_is_the_plain_loop(seed: int) -> None:
    p, y = members(seed, count=5, rows=60)
    weights = select(p, y)
    np.testing.assert_allclose(weights, plain_selection(p, y))
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).sum() > 1
    best = min(log_loss(one, y) for one in p)
    average = Combination(weights, (Calibration(),) * len(p)).apply(p)
    assert log_loss(average, y) < best


def test_equal_members_are_one_member_and_a_worse_one_is_left_out() -> None:
    p, y = members(0)
    best = p[np.argmin([log_loss(one, y) for one in p])]
    noise = np.full_like(best, 1 / 3)
    assert select(np.stack([noise, best, best]), y).tolist() == [0, 1, 0]


def test_overconfident_probabilities_get_the_temperature_that_made_them_so() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000)
    y = (rng.random(20_000) < expit(logits)).astype(np.int64)
    p = np.stack([expit(-3 * logits), expit(3 * logits)], axis=1)
    found = calibrate(p, y)
    assert found.temperature == pytest.approx(3, rel=0.05)
    np.testing.assert_allclose(Calibration(3.0).apply(p)[:, 1], expit(logits), rtol=1e-9)


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.6])
def test_rare_classes_get_back_the_share_that_was_taken_from_them(shift: float) -> None:
    rng = np.random.default_rng(1)
    frequencies = np.array([0.7, 0.25, 0.05])
    # Scores of a model that is right: the class is drawn from its softmax.
    scores = rng.normal(size=(40_000, 3)) + np.log(frequencies)
    y = (softmax(scores, axis=1).cumsum(axis=1) < rng.random((len(scores), 1))).sum(axis=1)
    seen = np.bincount(y) / len(y)
    p = softmax(scores + shift * np.log(seen), axis=1)
    found = calibrate(p, y)
    assert found.temperature == pytest.approx(1, abs=0.03)
    assert found.bias == pytest.approx(tuple(-shift * np.log(seen)), abs=0.1)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0, 1.4])
def test_so_much_of_the_class_weights_is_undone_as_a_member_took_up(share: float) -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(40_000, 3))
    y = (softmax(scores, axis=1).cumsum(axis=1) < rng.random((len(scores), 1))).sum(axis=1)
    weights = np.array([1.0, 3.0, 8.0])
    p = softmax((scores + share * np.log(weights)) / 1.5, axis=1)
    found = unweight(p, y, weights)
    assert found.temperature == pytest.approx(1 / 1.5, abs=0.03)
    assert found.bias == pytest.approx(tuple(-share * np.log(weights)), abs=0.1)


def test_a_member_without_class_weights_gets_no_bias() -> None:
    p, y = members(0)
    found = unweight(p[0], y, np.ones(3))
    assert found.bias == (0, 0, 0)
    assert found.temperature != 1


@pytest.mark.parametrize("seed", range(3))
def test_no_other_temperature_and_shift_is_better(seed: int) -> None:
    p, y = members(seed)
    y[y == 2] = np.arange((y == 2).sum()) % 2  # a rare class
    y[:9] = 2
    mean = p.mean(axis=0)
    found = calibrate(mean, y)
    rarity = -np.log(np.bincount(y) / len(y))
    losses = [
        log_loss(Calibration(t, tuple(s * rarity)).apply(mean), y)
        for t in np.geomspace(0.1, 10, 80)
        for s in np.linspace(-1, 1, 81)
    ]
    assert log_loss(found.apply(mean), y) <= min(losses)


def test_a_calibration_that_lowers_nothing_is_none_and_changes_no_bit() -> None:
    p = np.full((8, 2), 0.5)
    assert calibrate(p, np.arange(8) % 2) == Calibration()
    p, _ = members(1)
    assert np.array_equal(Calibration().apply(p[0]), p[0])


def test_a_good_member_that_is_only_unsure_or_was_weighted_is_not_passed_over() -> None:
    p, y = members(0)
    best = np.argsort([log_loss(one, y) for one in p])[:2]
    weights = np.ones((len(p), 3))
    weights[best[1]] = (1, 4, 20)
    p[best[0]] = softmax(np.log(p[best[0]]) / 5, axis=1)
    p[best[1]] = softmax(np.log(p[best[1]]) + np.log(weights[best[1]]), axis=1)
    fitted = combine(p, y, weights)
    assert (fitted.weights[best] > select(p, y)[best]).all()
    plain = np.zeros_like(p[0])
    for m, one in enumerate(p):
        own = unweight(one, y, weights[m])
        logits = np.log(one) / own.temperature + (own.bias or 0)
        plain += fitted.weights[m] * softmax(logits, axis=1)
    after = calibrate(plain, y)
    np.testing.assert_allclose(fitted.apply(p), after.apply(plain))


def test_a_certain_and_wrong_member_costs_a_finite_loss() -> None:
    p = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.4], [0.4, 0.6]]])
    fitted = combine(p, np.array([1, 1]), np.ones((2, 2)))
    assert fitted.weights.tolist() == [0, 1]
    assert np.isfinite(fitted.apply(p)).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rule", "name"), [("balanced", "macro_accuracy"), ("f1", "f1")])
def test_no_other_threshold_is_better(rule: str, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.random(80) < 0.3).astype(np.int64)
    positive = np.round(expit(rng.normal(size=80) + y - 1.5), 2)  # with ties
    p = np.stack([1 - positive, positive], axis=1)

    def gain(threshold: float) -> float:
        predicted = decide(p, threshold)
        if name == "f1":
            hits = int((predicted * y).sum())
            return 2 * hits / (predicted.sum() + y.sum())
        return score(p, y, np.ones(2), threshold)[name]

    found = best_threshold(positive, y, rule)  # type: ignore[arg-type]
    assert found is not None
    assert gain(found) == pytest.approx(max(gain(t) for t in np.linspace(0, 1, 2001)), rel=1e-12)


def test_a_half_stays_where_nothing_is_better() -> None:
    positive, y = np.array([0.1, 0.2, 0.7, 0.9]), np.array([0, 0, 1, 1])
    assert best_threshold(positive, y, "balanced") == best_threshold(positive, y, "f1") == 0.5
    assert best_threshold(positive, y, "none") is None
    assert best_threshold(np.full(4, 0.5), y, "balanced") == 0.5


def test_a_folds_cross_fitted_predictions_do_not_know_its_own_labels() -> None:
    p, y = members(2, classes=2)
    fold, weights = np.arange(len(y)) % 4, np.tile([1.0, 2.0], (len(p), 1))
    before = cross_fit(p, y, weights, fold, "f1")
    changed = np.where(fold == 1, 1 - y, y)
    after = cross_fit(p, changed, weights, fold, "f1")
    assert np.array_equal(before[1][0], after[1][0])
    assert before[1][1] == after[1][1]
    assert not np.array_equal(before[0][0], after[0][0])
    others = fold != 1
    by_hand = combine(p[:, others], y[others], weights, "f1")
    assert np.array_equal(before[1][0], by_hand.apply(p[:, fold == 1]))
    fitted = combine(p, y, weights).apply(p)
    crossed = np.empty_like(fitted)
    for held, (part, _) in enumerate(before):
        crossed[fold == held] = part
    assert log_loss(crossed, y) > log_loss(fitted, y)


def test_a_single_split_has_nothing_to_cross_fit() -> None:
    p, y = members(3)
    weights = np.ones((len(p), 3))
    ((only, threshold),) = cross_fit(p, y, weights, np.zeros(len(y), dtype=np.int64))
    assert np.array_equal(only, combine(p, y, weights).apply(p))
    assert threshold is None
