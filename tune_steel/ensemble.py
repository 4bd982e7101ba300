"""What makes one model of the members' probabilities: weights, a temperature, a threshold.

All three are fitted on out-of-fold predictions, by the plain log-loss at the classes' natural
frequencies, and not by the class-weighted loss that the search minimises: that one rewards
probabilities which overstate rare classes, and the final model's should mean what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from tune_steel.features import Floats, Ints

ThresholdRule: TypeAlias = Literal["none", "balanced", "f1"]

MEMBERS = 10
"""The best trials of a search that the ensemble is made of, at most."""

_ROUNDS = 50
_LEAST_PROBABILITY = 1e-300  # only an exact 0 is lifted
_MOST_TEMPERATURE = 20.0


def natural(log_p: Floats, class_weights: Floats) -> Floats:
    """Probabilities at the classes' natural frequencies.

    A network that was trained with class weights w estimates probabilities proportional to
    w_c P(c|x), so they are divided by w and normalised (Elkan, "The foundations of cost-sensitive
    learning", 2001; Saerens, Latinne & Decaestecker, "Adjusting the outputs of a classifier to
    new a priori probabilities", 2002).

    Args:
        log_p: Log-probabilities [..., C] as the network gives them.
        class_weights: Weights [C] of the training loss.
    """
    out: Floats = softmax(log_p - np.log(class_weights), axis=-1)
    return out


def log_loss(p: Floats, y: Ints) -> float:
    """Mean negative log-probability of the classes y [n] by probabilities [n, C]."""
    return float(_nll(p[np.arange(len(y)), y]).mean())


def _nll(p: Floats) -> Floats:
    out: Floats = -np.log(np.maximum(p, _LEAST_PROBABILITY))
    return out


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


def temper(p: Floats, temperature: float) -> Floats:
    """Probabilities [..., C] whose logits are divided by a temperature."""
    if temperature == 1.0:
        return p
    out: Floats = softmax(np.log(np.maximum(p, _LEAST_PROBABILITY)) / temperature, axis=-1)
    return out


def best_temperature(p: Floats, y: Ints) -> float:
    """The temperature with the lowest log-loss (Guo et al. 2017); 1 unless it lowers it."""
    most = np.log(_MOST_TEMPERATURE)
    found = minimize_scalar(
        lambda log_t: log_loss(temper(p, float(np.exp(log_t))), y),
        bounds=(-most, most),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = float(np.exp(found.x))
    return temperature if log_loss(temper(p, temperature), y) < log_loss(p, y) else 1.0


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
        temperature: What the logits of the weighted average are divided by.
        threshold: Two classes: the probability above which a row counts as of the second class;
            None takes the more probable one.
    """

    weights: Floats
    temperature: float = 1.0
    threshold: float | None = None

    def apply(self, p: Sequence[Floats] | Floats) -> Floats:
        """Probabilities [n, C] from those of the members, M times [n, C]."""
        mean = np.zeros(p[0].shape)
        for weight, member in zip(self.weights, p, strict=True):
            if weight > 0:
                mean += weight * member
        return temper(mean, self.temperature)


def combine(p: Floats, y: Ints, rule: ThresholdRule = "none") -> Combination:
    """The combination that fits rows best: weights, then the temperature, then the threshold.

    Args:
        p: Out-of-fold probabilities of the members at natural frequencies [M, n, C].
        y: Class indices [n].
        rule: How the threshold is chosen.
    """
    weights = select(p, y)
    mean = Combination(weights).apply(p)
    temperature = best_temperature(mean, y)
    tempered = temper(mean, temperature)
    return Combination(weights, temperature, best_threshold(tempered[:, 1], y, rule))


def cross_fit(
    p: Floats, y: Ints, fold: Ints, rule: ThresholdRule = "none"
) -> list[tuple[Floats, float | None]]:
    """Each fold's probabilities [n_f, C] and threshold by the combination of the other folds.

    The combination of all rows was fitted to these rows too, so its scores on them flatter; these
    are what an honest validation score is computed from. With a single fold there are no other
    rows, and it is the flattering one.

    Args:
        p: Out-of-fold probabilities of the members [M, n, C].
        y: Class indices [n].
        fold: Fold of each row [n], from 0.
        rule: How the threshold is chosen.
    """
    folds = int(fold.max()) + 1
    out = []
    for held in range(folds):
        inside: NDArray[np.bool_] = fold == held
        others = ~inside if folds > 1 else inside
        fitted = combine(p[:, others], y[others], rule)
        out.append((fitted.apply(p[:, inside]), fitted.threshold))
    return out
