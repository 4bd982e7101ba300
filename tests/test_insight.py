import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.stats

from tune_steel.insight import Insight, insight_lines, study_insight
from tune_steel.space import Params, Space, parse_space
from tune_steel.study import TrialRecord, ask, open_study, read_records, tell
from tune_steel.summary import render

optuna.logging.set_verbosity(optuna.logging.ERROR)

SPACE = parse_space(
    tomllib.loads("""
[model]
depth = { int = [1, 2], default = 1 }
width_1 = { choices = [8, 16], default = 8 }
width_2 = { choices = [8, 16], default = 8, when = { depth = [2] } }
activation = { choices = ["relu"], default = "relu" }
dropout = { float = [0.0, 0.5], default = 0.1 }
[loss]
label_smoothing = { float = [0.0, 0.2], default = 0.0 }
[optimizer]
name = { choices = ["adam", "adamw"], default = "adam" }
weight_decay = { float = [1e-5, 0.1], log = true, default = 0.01, when = { name = ["adamw"] } }
lr = { float = [1e-4, 1e-1], log = true, default = 1e-3 }
batch_size = { choices = [32, 64], default = 64 }
"""),
    name="small.toml",
)
MAX_EPOCHS = 10


def record(
    number: int,
    losses: list[float],
    state: str = "COMPLETE",
    *,
    params: Params | None = None,
    ended: float | None = None,
    slot: int | None = None,
    folds: list[list[float]] | None = None,
) -> TrialRecord:
    """A trial with these validation losses, an epoch each."""
    params = SPACE.defaults() if params is None else params
    folds = [[loss] for loss in losses] if folds is None else folds
    epochs = [
        {
            "epoch": epoch,
            "val_loss": losses[epoch - 1],
            "best_val_loss": min(losses[:epoch]),
            "best_epoch": int(np.argmin(losses[:epoch])) + 1,
            "fold_val_loss": folds[epoch - 1],
            "node": "here",
        }
        for epoch in range(1, len(losses) + 1)
    ]
    return TrialRecord(
        number=number,
        slot=number if slot is None else slot,
        seed=0,
        params=params,
        config=SPACE.config(params),
        state=state,
        epochs=epochs,
        ended=float(number) if ended is None else ended,
    )


def sampled(
    trials: int, loss: Callable[[int, Params], float], seed: int = 0, space: Space = SPACE
) -> list[TrialRecord]:
    """Trials at random configs that ran to their end, with a loss that is made up."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    configs = [space.suggest(study.ask()) for _ in range(trials)]
    return [record(i, [loss(i, params)], params=params) for i, params in enumerate(configs)]


def away(lr: Any) -> float:
    """How far a learning rate is from the best one, in powers of ten."""
    return abs(math.log10(lr) + 2.5)


def insight_of(records: list[TrialRecord], winner: TrialRecord | None = None) -> Insight:
    return study_insight(records, winner or records[0], SPACE, MAX_EPOCHS, adaptive=False)


def text_of(insight: Insight) -> str:
    return render(*insight_lines(insight), terminal=False)


def test_the_parameter_that_decides_the_loss_comes_first_and_the_others_do_not_stand_out() -> None:
    found = insight_of(sampled(60, lambda i, p: away(p["optimizer.lr"]))).importance
    assert found[0].parameter == "optimizer.lr"
    assert found[0].share > 0.5
    assert [each.parameter for each in found if each.beyond_chance] == ["optimizer.lr"]
    assert sum(each.share for each in found) == pytest.approx(1)
    assert [each.share for each in found] == sorted((e.share for e in found), reverse=True)


def test_losses_that_no_parameter_decides_hardly_ever_give_a_claim() -> None:
    claims = 0
    for seed in range(12):
        noise = np.random.default_rng(seed).normal(size=30)
        found = insight_of(sampled(30, lambda i, p, noise=noise: noise[i], seed)).importance
        claims += any(each.beyond_chance for each in found)
    assert claims <= 2  # 0.6 are expected


def test_a_conditional_parameter_counts_where_it_is_active() -> None:
    def loss(i: int, params: Params) -> float:
        decay = params.get("optimizer.weight_decay")
        return 5.0 if decay is None else abs(math.log10(decay) + 3)

    records = sampled(100, loss)
    active = sum("optimizer.weight_decay" in r.params for r in records)
    found = {each.parameter: each for each in insight_of(records).importance}
    assert 30 < active < 70
    assert found["optimizer.weight_decay"].trials == active
    assert found["optimizer.weight_decay"].beyond_chance
    assert found["optimizer.name"].beyond_chance
    assert found["optimizer.name"].trials == 100
    assert not found["model.width_2"].beyond_chance


@pytest.mark.parametrize("active", [1, 9, 10, 59])
def test_a_parameter_needs_ten_trials_and_two_values(active: int) -> None:
    records = []
    for i, one in enumerate(sampled(60, lambda i, p: away(p["optimizer.lr"]))):
        params = {k: v for k, v in one.params.items() if k != "model.width_2"}
        params |= {"model.depth": 1, "loss.label_smoothing": 0.1}
        if i < active:
            params |= {"model.depth": 2, "model.width_2": (8, 16)[i % 2]}
        records.append(record(i, [one.epochs[0]["val_loss"]], params=params))
    found = {each.parameter: each.trials for each in insight_of(records).importance}
    assert found.get("model.width_2") == (active if active >= 10 else None)
    assert "model.activation" not in found  # a single choice
    assert "loss.label_smoothing" not in found  # a range of which one value was tried


def test_stopped_trials_stand_behind_all_that_ran_to_their_end() -> None:
    records = sampled(60, lambda i, p: 1 + away(p["optimizer.lr"]))
    for i in range(0, 60, 2):  # losses that would win, if they compared
        records[i] = record(i, [0.5], "PRUNED", params=records[i].params)
    found = insight_of(records).importance
    assert found[0].parameter == "optimizer.lr"
    assert found[0].beyond_chance
    assert found[0].trials == 60


def test_of_stopped_trials_the_ones_with_more_epochs_are_the_better_ones() -> None:
    records = [record(0, [1.0])]
    for one in sampled(59, lambda i, p: away(p["optimizer.lr"])):
        distance = one.epochs[0]["val_loss"]
        epochs = 1 + int(4 * (1.5 - distance) / 1.5)
        dropout: Any = one.params["model.dropout"]
        # The loss favours a low dropout, which must not count before the epochs do.
        records.append(record(one.number + 1, [dropout] * epochs, "PRUNED", params=one.params))
    found = insight_of(records).importance
    assert [each.parameter for each in found if each.beyond_chance] == ["optimizer.lr"]


def test_with_too_few_trials_nothing_is_said_of_importance() -> None:
    records = sampled(19, lambda i, p: away(p["optimizer.lr"]))
    failed = [record(19 + i, [1.0], "FAIL") for i in range(5)]
    insight = insight_of(records + failed)
    assert insight.importance == []
    assert insight.comparable == 19
    assert "19 comparable trials are too few, 20 do" in text_of(insight)
    more = insight_of([*records, record(19, [1.0], "PRUNED")])
    assert more.comparable == 20
    assert more.importance


def test_savings_by_hand() -> None:
    records = [
        record(0, [1.0] * 10),
        record(1, [1.0] * 2, "PRUNED"),
        record(2, [1.0] * 5, "PRUNED"),
        record(3, [1.0] * 6),  # its own early stopping
        record(4, [1.0] * 3, "FAIL"),
        record(5, [1.0], "INTERRUPTED"),
    ]
    insight = insight_of(records)
    assert insight.savings.stopped == 2
    assert insight.savings.epochs == 27
    assert insight.savings.epochs_at_most == 27 + 8 + 5
    assert insight.savings.share_at_most == pytest.approx(13 / 40)
    assert "2 trials were stopped: 27 epochs instead of at most 40, at most 32%" in text_of(
        insight
    )


def test_without_a_stopped_trial_nothing_was_saved() -> None:
    insight = insight_of([record(0, [1.0] * 4)])
    assert insight.savings.share_at_most == 0
    assert insight.savings.epochs_at_most == 4
    assert "No trial was stopped: 4 epochs" in text_of(insight)


def test_moves_of_the_running_best_by_hand() -> None:
    records = [
        record(0, [0.9, 0.8, 0.85], ended=2.0),
        record(1, [1.0, 0.95], ended=1.0),
        record(2, [0.1], "FAIL", ended=3.0),
        record(3, [0.05], "INTERRUPTED", ended=3.5),
        record(4, [0.8], "PRUNED", ended=4.0),  # as low, not lower
        record(5, [0.7, 0.6], "PRUNED", ended=5.0),
    ]
    moves = insight_of(records).moves
    assert [(m.ended, m.trial, m.loss, m.epochs) for m in moves] == [
        (1, 1, 0.95, 2),
        (2, 0, 0.8, 5),
        (5, 5, 0.6, 10),
    ]


def test_only_the_last_five_moves_are_shown() -> None:
    insight = insight_of([record(i, [1.0 - i / 10]) for i in range(8)])
    assert len(insight.moves) == 8
    text = text_of(insight)
    assert "8 trials that lowered it, the last 5 here" in text
    assert "trial 2 " not in text
    assert "0.7000 by trial 3 (trials ended: 4, epochs: 4)" in text
    assert "0.3000 by trial 7 (trials ended: 8, epochs: 8)" in text


def rivals(better_by: list[float]) -> tuple[list[TrialRecord], TrialRecord]:
    """A default and a winner whose folds differ by so much, each at its best epoch."""
    base = [0.5, 0.6, 0.7, 0.8, 0.9][: len(better_by)]
    worse = [2.0] * len(base)
    default = record(0, [0.7, 2.0, 2.0], folds=[base, worse, worse])
    lower = [loss - gain for loss, gain in zip(base, better_by, strict=True)]
    winner = record(1, [2.0, 0.4, 2.0], folds=[worse, lower, worse])
    return [default, winner], winner


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2, 0.3, 0.2, 0.2], "it beats the default by more than the noise between folds"),
        ([-0.1, 0.5, 0.1, 0.0, 0.1], "does not beat the default by more than the noise"),
        # Significant by the plain t interval, not by the corrected one.
        ([0.05, 0.2, 0.02, 0.11, 0.15], "does not beat the default by more than the noise"),
        ([0.1, 0.2], "does not beat the default by more than the noise between folds"),
    ],
)
def test_the_interval_of_the_gain_is_the_corrected_one(
    differences: list[float], verdict: str
) -> None:
    gain = insight_of(*rivals(differences)).gain
    assert gain is not None
    k = len(differences)
    plain = scipy.stats.sem(differences)
    low, high = scipy.stats.t.interval(
        0.95, k - 1, np.mean(differences), plain * math.sqrt(1 + k / (k - 1))
    )
    assert gain.folds == pytest.approx(differences)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((np.mean(differences), low, high))
    text = " ".join(text_of(insight_of(*rivals(differences))).split())
    assert verdict in text
    assert "chosen among 2 trials by the same rows, which flatters it" in text


def test_the_interval_of_the_gain_by_hand() -> None:
    gain = insight_of(*rivals([0.1, 0.2, 0.3, 0.2, 0.2])).gain
    assert gain is not None
    # Mean 0.2, variance 0.005, times 1/5 + 1/4; t of 4 degrees of freedom 2.776445.
    assert gain.low == pytest.approx(0.2 - 2.776445 * math.sqrt(0.005 * 0.45))
    assert gain.low == pytest.approx(0.068301, abs=1e-6)


def test_the_correction_is_what_makes_the_third_case_no_claim() -> None:
    plain = scipy.stats.ttest_1samp([0.05, 0.2, 0.02, 0.11, 0.15], 0).pvalue
    assert plain < 0.05


def test_one_validation_split_gives_no_interval() -> None:
    insight = insight_of(*rivals([0.25]))
    assert insight.gain is not None
    assert (insight.gain.low, insight.gain.high) == (None, None)
    assert insight.gain.mean == pytest.approx(0.25)
    text = " ".join(text_of(insight).split())
    assert "lower by 0.2500 on the one validation split, which gives no interval" in text
    assert "noise between folds" not in text


def test_the_default_may_be_the_winner() -> None:
    records = [record(0, [0.5], folds=[[0.5, 0.5]]), record(1, [0.6], folds=[[0.6, 0.6]])]
    assert "the default won" in text_of(insight_of(records, records[0]))


def test_a_default_that_was_not_scored_gives_no_gain() -> None:
    records = [record(0, [0.5], "FAIL"), record(1, [0.6])]
    insight = insight_of(records, records[1])
    assert insight.gain is None
    assert "the default was not scored" in text_of(insight)


def test_a_default_that_was_tried_again_counts() -> None:
    records = [record(0, [0.1], "LOST"), record(1, [0.4]), record(2, [0.6], slot=0)]
    gain = insight_of(records, records[1]).gain
    assert gain is not None
    assert gain.default == 2
    assert gain.mean == pytest.approx(0.2)


@pytest.mark.parametrize("trials", [2, 30])
def test_it_is_plain_values_that_json_gives_back(trials: int) -> None:
    records = sampled(trials, lambda i, p: away(p["optimizer.lr"]))
    for one in records:
        one.epochs[0]["fold_val_loss"] = [one.epochs[0]["val_loss"]] * 3
    plain = insight_of(records, records[1]).as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == {"comparable", "importance", "savings", "moves", "gain"}


def test_the_text_shows_six_parameters_and_sums_up_the_others() -> None:
    insight = insight_of(sampled(60, lambda i, p: away(p["optimizer.lr"])))
    lines = text_of(insight).splitlines()
    assert lines[0].strip() == "What set the best 25% of 60 trials apart (PED-ANOVA)"
    shown = [line for line in lines if "." in line and "│" in line]
    assert len(shown) == 6
    assert "optimizer.lr" in shown[0]
    assert "yes" in shown[0]
    others = next(line for line in lines if "others" in line)
    assert f"{len(insight.importance) - 6} others" in others
    assert " no " in others
    assert max(map(len, lines)) <= 118


def test_chance_is_not_told_apart_where_the_sampler_followed_losses() -> None:
    records = sampled(60, lambda i, p: away(p["optimizer.lr"]))
    plain = insight_of(records)
    insight = study_insight(records, records[0], SPACE, MAX_EPOCHS, adaptive=True)
    assert [each.share for each in insight.importance] == [e.share for e in plain.importance]
    assert all(each.beyond_chance is None for each in insight.importance)
    text = text_of(insight)
    assert "beyond chance" not in text
    assert "a parameter that does nothing" in text


def test_the_text_says_so_where_no_parameter_stands_out() -> None:
    noise = np.random.default_rng(1).normal(size=40)
    insight = insight_of(sampled(40, lambda i, p: noise[i]))
    assert not any(each.beyond_chance for each in insight.importance)
    assert "none stands out from chance in 40 comparable trials" in text_of(insight)


def test_a_study_read_back_from_its_journal_tells_the_same(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study.journal", "run")
    records = []
    for i in range(25):
        trial, one = ask(study, SPACE, "tpe", 0)
        stopped = i % 4 == 3
        losses = [away(one.params["optimizer.lr"]) + 1 / epoch for epoch in (1, 2, 3)]
        made = record(
            one.number, losses[: 1 if stopped else 3], folds=[[x, x + 0.1] for x in losses]
        )
        one.epochs, one.ended = made.epochs, float(i)
        one.state = "PRUNED" if stopped else "COMPLETE"
        for row in one.epochs:
            trial.report(row["best_val_loss"], row["epoch"])
        tell(study, trial, one)
        records.append(one)
    again = read_records(open_study(tmp_path / "study.journal", "run"), SPACE, 0)
    insight = insight_of(records, records[5])
    assert insight.importance
    assert insight_of(again, again[5]) == insight
