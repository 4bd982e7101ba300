"""What a search tells about itself: what mattered, what stopping saved, what was gained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FixedTrial
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from scipy.special import gammaincc, stdtrit

from tune_steel.choice import default_trial
from tune_steel.features import Floats
from tune_steel.space import Space
from tune_steel.study import ENDED, METRIC, SCORED, TrialRecord

_BEST = 0.25  # Optuna's tenth would be two trials of twenty, and misses far more
_LEAST_TRIALS = 20
_LEAST_ACTIVE = 10
_SHUFFLES = 59
_PARAMETERS_SHOWN = 6
_MOVES_SHOWN = 5


@dataclass(frozen=True)
class Importance:
    """How much a parameter has to do with whether a trial was among the best quarter.

    Attributes:
        parameter: Dotted key.
        share: Of the sum of the listed parameters' effects, 0 to 1. An effect is a parameter's
            alone; what two parameters do only together is in no share.
        beyond_chance: Whether the effect is one that chance alone gives to any parameter in
            only 1 search of 20. None where a sampler chose configs by earlier losses: it crowds
            values that were lucky, so that parameters that do nothing get effects as well.
        trials: Comparable trials in which the parameter was active.
    """

    parameter: str
    share: float
    beyond_chance: bool | None
    trials: int


@dataclass(frozen=True)
class Savings:
    """What stopping saved.

    Attributes:
        stopped: Trials that the scheduler stopped.
        epochs: Epochs of all trials, failed ones included.
        epochs_at_most: The same, had the stopped trials run to the last epoch. An upper bound:
            early stopping of their own would have ended some.
        share_at_most: Share of `epochs_at_most` that was saved.
    """

    stopped: int
    epochs: int
    epochs_at_most: int
    share_at_most: float


@dataclass(frozen=True)
class Move:
    """A trial that lowered the lowest validation loss of the search.

    Attributes:
        ended: How many trials had ended with it.
        trial: Its number.
        loss: Its lowest validation loss.
        epochs: Epochs of all trials that had ended with it.
    """

    ended: int
    trial: int
    loss: float
    epochs: int


@dataclass(frozen=True)
class Gain:
    """Validation loss of the default config minus the winner's, each at its best epoch.

    Attributes:
        winner: Number of the winning trial.
        default: Number of the default config's trial, perhaps the same.
        folds: The difference on each fold [k].
        mean: Their mean.
        low: Lower end of its 95 % interval; None with one fold.
        high: Upper end.
    """

    winner: int
    default: int
    folds: list[float]
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Insight:
    """What a search tells about itself.

    Attributes:
        comparable: Trials that ran to their end or were stopped by the scheduler.
        importance: The largest share first; empty with fewer than 20 comparable trials.
        savings: What stopping saved.
        moves: In the order in which the trials ended.
        gain: Of the winner over the default config; None where that was not scored.
    """

    comparable: int
    importance: list[Importance]
    savings: Savings
    moves: list[Move]
    gain: Gain | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `run.json`."""
        return asdict(self)


def study_insight(
    records: Sequence[TrialRecord],
    winner: TrialRecord,
    space: Space,
    max_epochs: int,
    *,
    adaptive: bool,
) -> Insight:
    """What the trials of a search tell.

    Args:
        records: All of them.
        winner: The chosen one.
        space: What they were sampled from.
        max_epochs: Epochs of a trial that nothing stops.
        adaptive: Whether the sampler chose configs by the losses of earlier ones.
    """
    scored = [record for record in records if record.state in SCORED]
    default = default_trial(records)
    return Insight(
        comparable=len(scored),
        importance=(
            _importance(scored, space, adaptive=adaptive) if len(scored) >= _LEAST_TRIALS else []
        ),
        savings=_savings(records, max_epochs),
        moves=_moves(records),
        gain=None if default is None else _gain(winner, default),
    )


def _importance(
    scored: Sequence[TrialRecord], space: Space, *, adaptive: bool
) -> list[Importance]:
    """PED-ANOVA (Watanabe et al., 2023) in Optuna's form, which knows conditional parameters.

    The effect of a conditional parameter is that of its values where it is active, weighted with
    how often that is among the best trials and among all; so all effects are on one scale. It is
    an effect among what was sampled: less of it is seen where TPE has settled early.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    active: dict[str, list[object]] = {}
    for record in scored:
        trial = FixedTrial(dict(record.params))
        for key, value in space.suggest(trial).items():
            active.setdefault(key, []).append(value)
        study.add_trial(
            optuna.create_trial(params=trial.params, distributions=trial.distributions, value=0.0)
        )
    keys = [k for k, v in active.items() if len(v) >= _LEAST_ACTIVE and len(set(v)) > 1]
    evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST)

    def effects(ranks: list[int]) -> Floats:
        with warnings.catch_warnings():
            # That low ranks are taken for good ones, and that a value or a gap was there once.
            warnings.simplefilter("ignore", UserWarning)
            found = evaluator.evaluate(study, keys, target=lambda trial: ranks[trial.number])
        return np.array([found[key] for key in keys])

    if not keys:
        return []
    found = effects(_ranks(scored))
    shares = found / (found.sum() or 1.0)
    beyond: Sequence[bool | None] = [None] * len(keys)
    if not adaptive:
        rng = np.random.default_rng(0)
        shuffled = [effects(rng.permutation(len(scored)).tolist()) for _ in range(_SHUFFLES)]
        beyond = _beyond_chance(np.stack([found, *shuffled])).tolist()
    listed = [
        Importance(key, float(share), yes, len(active[key]))
        for key, share, yes in zip(keys, shares, beyond, strict=True)
    ]
    return sorted(listed, key=lambda each: -each.share)


def _beyond_chance(effects: Floats) -> NDArray[np.bool_]:
    """Which parameters have an effect such as chance gives to any of them in 1 search of 20.

    A range moves more by chance than two choices do, so effects become p-values first: by chance
    they are weighted sums of squares, nearly gamma variables (Satterthwaite, 1946), here with the
    moments of all other rows. Only in 3 of 60 searches is the lowest p-value of row 0 among the
    three lowest of 60 rows that are alike (Westfall & Young, 1993).

    Args:
        effects: Effects [1 + shuffles, parameters]: as they are, then in shuffled ranks.
    """
    p = np.empty_like(effects)
    for i in range(len(effects)):
        others = np.delete(effects, i, axis=0)
        mean, variance = others.mean(axis=0), others.var(axis=0, ddof=1)
        p[i] = gammaincc(mean**2 / variance, effects[i] * mean / variance)
    lowest = np.sort(p[1:].min(axis=1))
    beyond: NDArray[np.bool_] = p[0] < lowest[len(effects) // 20 - 1]
    return beyond


def _ranks(scored: Sequence[TrialRecord]) -> list[int]:
    """Ranks as Optuna's TPE gives them: stopped trials last, most epochs first among them.

    Their losses compare only with those of as many epochs, and PED-ANOVA needs only a quantile.
    """

    def order(i: int) -> tuple[bool, int, float]:
        stopped, epochs = scored[i].state == "PRUNED", scored[i].epochs
        return stopped, -len(epochs) if stopped else 0, epochs[-1][METRIC]

    ranks: list[int] = np.argsort(sorted(range(len(scored)), key=order)).tolist()
    return ranks


def _savings(records: Sequence[TrialRecord], max_epochs: int) -> Savings:
    stopped = [len(record.epochs) for record in records if record.state == "PRUNED"]
    epochs = sum(len(record.epochs) for record in records)
    at_most = epochs + sum(max_epochs - n for n in stopped)
    return Savings(len(stopped), epochs, at_most, 1 - epochs / at_most)


def _moves(records: Sequence[TrialRecord]) -> list[Move]:
    moves: list[Move] = []
    ended = epochs = 0
    for record in sorted(records, key=lambda record: record.ended or 0.0):
        ended += record.state in ENDED
        epochs += len(record.epochs)
        if record.state in SCORED:
            loss = record.epochs[-1][METRIC]
            if not moves or loss < moves[-1].loss:
                moves.append(Move(ended, record.number, loss, epochs))
    return moves


def _gain(winner: TrialRecord, default: TrialRecord) -> Gain:
    assert winner.best is not None
    assert default.best is not None
    folds = np.subtract(default.best["fold_val_loss"], winner.best["fold_val_loss"])
    k, mean = len(folds), float(folds.mean())
    low, high = corrected_interval(folds, 1 / (k - 1)) if k > 1 else (None, None)
    return Gain(winner.number, default.number, folds.tolist(), mean, low, high)


def corrected_interval(differences: Floats, ratio: float) -> tuple[float, float]:
    """The 95 % corrected resampled t interval of a mean (Nadeau & Bengio, 2003).

    The training rows of the folds overlap, so the variance of the mean is that of the folds
    times 1/k + n_test/n_train, not 1/k.

    Args:
        differences: One for each fold (and repeat) [k], at least two.
        ratio: n_test/n_train.
    """
    k = len(differences)
    error = float(np.sqrt(differences.var(ddof=1) * (1 / k + ratio)))
    half = float(stdtrit(k - 1, 0.975)) * error
    mean = float(differences.mean())
    return mean - half, mean + half


def insight_lines(insight: Insight) -> Iterator[RenderableType]:
    """The same for people, in four parts."""
    yield from _importance_part(insight)
    savings, moves = insight.savings, insight.moves
    if savings.stopped:
        yield (
            f"{savings.stopped} trials were stopped: {savings.epochs} epochs instead of at most "
            f"{savings.epochs_at_most}, at most {savings.share_at_most:.0%} saved (early stopping "
            "of their own would have ended some of them)"
        )
    else:
        yield f"No trial was stopped: {savings.epochs} epochs"
    shown = moves[-_MOVES_SHOWN:]
    some = f", the last {len(shown)} here" if len(shown) < len(moves) else ""
    trials = "trial" if len(moves) == 1 else "trials"
    yield f"Lowest validation loss so far, {len(moves)} {trials} that lowered it{some}:"
    for move in shown:
        yield (
            f"  {move.loss:.4f} by trial {move.trial} (trials ended: {move.ended}, "
            f"epochs: {move.epochs})"
        )
    yield _gain_part(insight)


def _importance_part(insight: Insight) -> Iterator[RenderableType]:
    n, listed = insight.comparable, insight.importance
    if n < _LEAST_TRIALS:
        yield f"Importance of parameters: {n} comparable trials are too few, {_LEAST_TRIALS} do"
        return
    tested = all(each.beyond_chance is not None for each in listed)
    if tested and not any(each.beyond_chance for each in listed):
        yield f"Importance of parameters: none stands out from chance in {n} comparable trials"
        return
    title = f"What set the best {_BEST:.0%} of {n} trials apart (PED-ANOVA)"
    table = Table(title=Text(title), title_justify="left", min_width=len(title))
    table.add_column("parameter")
    chance = ("beyond chance",) if tested else ()
    for name in ("share of the effects", *chance, "trials that had it"):
        table.add_column(name, justify="right")
    for each in listed[:_PARAMETERS_SHOWN]:
        beyond = ("yes" if each.beyond_chance else "no",) if tested else ()
        table.add_row(each.parameter, f"{each.share:.0%}", *beyond, str(each.trials))
    rest = listed[_PARAMETERS_SHOWN:]
    if rest:
        beyond = ("some" if any(each.beyond_chance for each in rest) else "no",) if tested else ()
        share = f"{sum(each.share for each in rest):.0%}"
        table.add_row(f"{len(rest)} others", share, *beyond, "")
    yield table
    if not tested:
        yield (
            "The sampler crowds values that were lucky before, so a parameter that does nothing "
            "has a share, too; with --search random, chance is told apart."
        )


def _gain_part(insight: Insight) -> str:
    gain = insight.gain
    if gain is None:
        return "Winner against default config: the default was not scored"
    if gain.winner == gain.default:
        return "Winner against default config: the default won"
    k = len(gain.folds)
    start = f"Winner against default config: validation loss lower by {gain.mean:.4f}"
    flattered = f"it was chosen among {insight.comparable} trials by the same rows, which flatters"
    if gain.low is None:
        return f"{start} on the one validation split, which gives no interval; {flattered} it"
    verdict = "beats" if gain.low > 0 else "does not beat"
    return (
        f"{start} [{gain.low:.4f}, {gain.high:.4f}] (mean over {k} folds, corrected 95 % interval "
        f"of Nadeau & Bengio): it {verdict} the default by more than the noise between folds; "
        f"{flattered} it"
    )
