"""What makes one model of the members' probabilities: calibrations, weights, a threshold.

All of them are fitted on out-of-fold predictions, by the plain log-loss at the classes' natural
frequencies, and not by the class-weighted loss that the search minimises: that one rewards
probabilities which overstate rare classes, and the final model's should mean what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from tune_steel.features import Floats, Ints

ThresholdRule: TypeAlias = Literal["none", "balanced", "f1"]

MEMBERS = 10
"""The best trials of a search that the ensemble is made of, at most."""

_ROUNDS = 50
_LEAST_PROBABILITY = 1e-300  # only an exact 0 is lifted
_MOST_TEMPERATURE = 20.0
_MOST_SHIFT = 1.0  # at 1 rare classes count as if all were equally frequent
_MOST_UNDONE = 2.0  # of class weights; more than 1 where a network overdid them


def log_loss(p: Floats, y: Ints) -> float:
    """Mean negative log-probability of the classes y [n] by probabilities [n, C]."""
    return float(_nll(p[np.arange(len(y)), y]).mean())


def _nll(p: Floats) -> Floats:
    return -_logits(p)


def select(p: Floats, y: Ints) -> Floats:
    """Weights [M] of the members by greedy selection with replacement, summing to 1.

    Starts from the best member and adds, round by round, the one that makes the log-loss of the
    average lowest; the best round counts (Caruana et al., "Ensemble selection from libraries of
    models", 2004). Of equal members the one that is in already, then the first one, is added; of
    equal rounds the one with fewer members, then the first one, counts.

    Args:
        p: Probabilities [M, n, C].
        y: Class indices [n].
    """
    own = p[:, np.arange(len(y)), y]  # the log-loss of an average reads nothing else
    counts = np.zeros(len(p), dtype=np.int64)
    total = np.zeros(len(y))
    best = (np.inf, 0)
    weights = np.zeros(len(p))
    for size in range(1, _ROUNDS + 1):
        losses = _nll((total + own) / size).mean(axis=1)
        added = np.lexsort((counts == 0, losses))[0]
        counts[added] += 1
        total += own[added]
        found = (float(losses[added]), int((counts > 0).sum()))
        if found < best:
            best, weights = found, counts / size
    return weights


@dataclass(frozen=True)
class Calibration:
    """What is done to the logits of a member, or of the members' weighted average.

    Attributes:
        temperature: What they are divided by (Guo et al., "On calibration of modern neural
            networks", 2017).
        bias: What is then added to those of each class [C]; None leaves them.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    def apply(self, p: Floats) -> Floats:
        """Calibrated probabilities [..., C]."""
        if self == Calibration():
            return p
        bias = 0.0 if self.bias is None else np.array(self.bias)
        out: Floats = softmax(_logits(p) / self.temperature + bias, axis=-1)
        return out


def _logits(p: Floats) -> Floats:
    out: Floats = np.log(np.maximum(p, _LEAST_PROBABILITY))
    return out


def calibrate(p: Floats, y: Ints) -> Calibration:
    """The calibration of an average with the lowest log-loss; none unless it lowers it.

    The bias has a single parameter s: class c gets -s log f_c, f_c its frequency among y. A bias
    of its own for each class (Alexandari, Kundaje & Shrikumar, "Maximum likelihood with
    bias-corrected calibration", 2020) would have as many parameters as classes, and some have few
    rows.

    Args:
        p: Probabilities [n, C].
        y: Class indices [n].
    """
    frequencies = np.maximum(np.bincount(y, minlength=p.shape[1]), 1) / len(y)
    return _calibrate(p, y, -np.log(frequencies), (-_MOST_SHIFT, _MOST_SHIFT))


def unweight(p: Floats, y: Ints, class_weights: Floats) -> Calibration:
    """The calibration of a member, which was trained with class weights; none unless it helps.

    A network that was trained with class weights w would estimate probabilities proportional to
    w_c P(c|x), to be divided by w (Elkan, "The foundations of cost-sensitive learning", 2001;
    Saerens, Latinne & Decaestecker, "Adjusting the outputs of a classifier to new a priori
    probabilities", 2002). Networks overstate rare classes by less than their weights say, above
    all nearest neighbours, whose votes come at natural frequencies whatever the loss. So class c
    gets -a log w_c, and how much of the weights is undone, a, is fitted.

    Args:
        p: Probabilities [n, C] as the member gives them.
        y: Class indices [n].
        class_weights: Weights [C] of the training loss.
    """
    return _calibrate(p, y, -np.log(class_weights), (0.0, _MOST_UNDONE))


def _calibrate(p: Floats, y: Ints, direction: Floats, bounds: tuple[float, float]) -> Calibration:
    """Fits the temperature, and the bias along a direction [C] within bounds."""
    # Half a second to import, which the workers that train members need not spend.
    from scipy.optimize import minimize

    rows, logits = np.arange(len(y)), _logits(p)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        log_p = log_softmax(parameters[0] * logits + parameters[1] * direction, axis=1)
        error = np.exp(log_p)
        error[rows, y] -= 1
        gradient = np.array([(error * logits).sum(), (error * direction).sum()]) / len(y)
        return -float(log_p[rows, y].mean()), gradient

    found = minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(1 / _MOST_TEMPERATURE, _MOST_TEMPERATURE), bounds],
        options={"ftol": 1e-15, "gtol": 1e-9},
    )
    inverse, shift = found.x
    calibration = Calibration(1 / float(inverse), tuple((shift * direction).tolist()))
    lowers = log_loss(calibration.apply(p), y) < log_loss(p, y)
    return calibration if lowers else Calibration()


def best_threshold(positive: Floats, y: Ints, rule: ThresholdRule) -> float | None:
    """The threshold above which a row counts as of the second class; None without a rule.

    Args:
        positive: Probabilities [n] of the second class.
        y: Class indices [n], 0 or 1.
        rule: `balanced` maximises the mean recall of the two classes, `f1` the F1 of the second.
            Of equal thresholds the one nearest to 0.5 is taken.
    """
    if rule == "none":
        return None
    # Between two neighbours every threshold decides alike; 0.5 where it is between them.
    edges = np.concatenate([[0.0], np.unique(positive), [1.0]])
    low, high = edges[:-1], edges[1:]
    cuts = np.where((low <= 0.5) & (high > 0.5), 0.5, (low + high) / 2)
    hits, false = (
        len(p) - np.searchsorted(p, cuts, side="right")
        for p in (np.sort(positive[y == 1]), np.sort(positive[y == 0]))
    )
    positives, negatives = max(int((y == 1).sum()), 1), max(int((y == 0).sum()), 1)
    if rule == "balanced":
        gain = (hits / positives + (negatives - false) / negatives) / 2
    else:
        gain = 2 * hits / (positives + hits + false)
    return float(cuts[np.lexsort((np.abs(cuts - 0.5), -gain))[0]])


@dataclass(frozen=True)
class Combination:
    """How members' probabilities become the ensemble's.

    Attributes:
        weights: Weight of each member [M], summing to 1.
        of_members: What is done to the probabilities of each member first.
        calibration: What is done to their weighted average.
        threshold: Two classes: the probability above which a row counts as of the second class;
            None takes the more probable one.
    """

    weights: Floats
    of_members: tuple[Calibration, ...]
    calibration: Calibration = Calibration()
    threshold: float | None = None

    def apply(self, p: Sequence[Floats] | Floats) -> Floats:
        """Probabilities [n, C] from those of the members, M times [n, C]."""
        mean = np.zeros(p[0].shape)
        for weight, own, member in zip(self.weights, self.of_members, p, strict=True):
            if weight > 0:
                mean += weight * own.apply(member)
        return self.calibration.apply(mean)


def combine(
    p: Floats, y: Ints, class_weights: Floats, rule: ThresholdRule = "none"
) -> Combination:
    """The combination that fits rows best: calibrated members, their weights, what comes after.

    Members are calibrated before the weights are chosen: trials differ in what label smoothing and
    class weights did to their probabilities, so that no calibration of the average fits them all,
    and the selection would pass over a good member that is only unsure.

    Args:
        p: Out-of-fold probabilities of the members as they give them [M, n, C].
        y: Class indices [n].
        class_weights: Weights of the members' training losses [M, C].
        rule: How the threshold is chosen.
    """
    of_members = tuple(unweight(own, y, w) for own, w in zip(p, class_weights, strict=True))
    calibrated = [own.apply(member) for own, member in zip(of_members, p, strict=True)]
    weights = select(np.stack(calibrated), y)
    mean = Combination(weights, of_members).apply(p)
    calibration = calibrate(mean, y)
    positive = calibration.apply(mean)[:, 1]
    return Combination(weights, of_members, calibration, best_threshold(positive, y, rule))


def cross_fit(
    p: Floats, y: Ints, class_weights: Floats, fold: Ints, rule: ThresholdRule = "none"
) -> list[tuple[Floats, float | None]]:
    """Each fold's probabilities [n_f, C] and threshold by the combination of the other folds.

    The combination of all rows was fitted to these rows too, so its scores on them flatter; these
    are what an honest validation score is computed from. With a single fold there are no other
    rows, and it is the flattering one.

    Args:
        p: Out-of-fold probabilities of the members as they give them [M, n, C].
        y: Class indices [n].
        class_weights: Weights of the members' training losses [M, C].
        fold: Fold of each row [n], from 0.
        rule: How the threshold is chosen.
    """
    folds = int(fold.max()) + 1
    out = []
    for held in range(folds):
        inside: NDArray[np.bool_] = fold == held
        others = ~inside if folds > 1 else inside
        fitted = combine(p[:, others], y[others], class_weights, rule)
        out.append((fitted.apply(p[:, inside]), fitted.threshold))
    return out
