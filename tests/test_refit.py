"""Training a trial again gives what the search had, and more seeds of it."""

import pickle
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from trials import LEARNING, Rows, trial

from tune_steel.config import TrialConfig
from tune_steel.errors import NonFiniteLossError
from tune_steel.fit import Fit, predict_log_probabilities
from tune_steel.networks import log_probabilities
from tune_steel.refit import (
    SEEDS,
    SEEDS_A_MEMBER,
    Networks,
    Plan,
    Refit,
    member,
    refit,
    retrain,
    seconds_again,
    validation_rows,
)
from tune_steel.seeds import derive, replica_seeds
from tune_steel.space import Space

pytestmark = pytest.mark.usefixtures("one_thread")


def again(plan: Plan, steel_rows: Rows) -> Refit:
    *_, last = refit(plan, steel_rows[0], "cpu")
    assert last is not None
    return last


def on_all_rows(plan: Plan, steel_rows: Rows) -> Networks:
    *_, last = retrain(plan, steel_rows[0], "cpu", seed=3)
    assert last is not None
    return last


def test_the_folds_again_are_the_searchs_bit_for_bit_and_other_seeds_are_others(
    decaying_space: Space, steel_rows: Rows
) -> None:
    development, _ = steel_rows
    record = trial(decaying_space, development, **{"optimizer.lr": 0.2})
    plan, found = Plan.of(record), again(Plan.of(record), steel_rows)
    best = record.best
    assert best is not None
    assert 1 < best["epoch"] == len(plan.learning_rates) < len(record.epochs)
    assert plan.learning_rates[-1] < plan.learning_rates[0]
    assert found.val_loss == best["val_loss"]

    # The search scores each epoch, the refit does not: it must make no difference.
    folds = development.folds
    searched = Fit(record.config, development, folds, replica_seeds(record.seed, len(folds)))
    list(searched.epochs(best["epoch"]))
    states = found.networks.states
    assert len(states) == len(found.out_of_fold) == SEEDS_A_MEMBER
    for name, tensor in searched.network.state_dict().items():
        assert torch.equal(tensor, states[0][name]), name
    for state in (*states, *on_all_rows(plan, steel_rows).states):
        for name, tensor in state.items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} holds more"
    logits = torch.tensor(np.concatenate(searched.validation_logits()))
    assert np.array_equal(found.out_of_fold[0], log_probabilities(logits).numpy())
    assert not np.allclose(found.out_of_fold[0], found.out_of_fold[1])


@pytest.mark.parametrize("model", LEARNING)
def test_what_networks_learnt_from_their_rows_comes_back_from_a_worker(
    steel_rows: Rows, model: dict[str, Any]
) -> None:
    development, _ = steel_rows
    config = TrialConfig.model_validate(
        {"model": model, "optimizer": {"lr": 0.01, "batch_size": 256}}
    )
    plan = Plan(5, config, 7, (0.01, 0.01), 0.5, 1.0)
    folds, everything = development.folds, np.arange(len(development.y))
    by_hand = [
        Fit(config, development, folds, replica_seeds(7, len(folds))),
        Fit(
            config,
            development,
            [(everything, everything[:0])] * SEEDS,
            [derive(3, "retrain", i) for i in range(SEEDS)],
        ),
    ]
    for fit in by_hand:
        for rate in plan.learning_rates:
            fit.train_epoch(rate)
    found = again(plan, steel_rows)
    logits = torch.tensor(np.concatenate(by_hand[0].validation_logits()))
    assert np.array_equal(found.out_of_fold[0], log_probabilities(logits).numpy())
    for networks, fit in zip(
        (found.networks, on_all_rows(plan, steel_rows)), by_hand, strict=True
    ):
        received = pickle.loads(pickle.dumps(networks))
        fitted = member(plan, received, development)
        x = fit.preprocessing.transform(development.features)
        expected = predict_log_probabilities(fit.network, x)
        assert np.array_equal(fitted.log_probabilities(development.features)[0], expected)


def test_out_of_fold_predictions_are_those_of_the_models_that_did_not_see_the_rows(
    decaying_space: Space, steel_rows: Rows
) -> None:
    development, _ = steel_rows
    plan = Plan.of(trial(decaying_space, development, **{"loss.pos_weight": 3.0}))
    found = again(plan, steel_rows)
    fitted = member(plan, found.networks, development)
    positions, fold = validation_rows(development)
    assert sorted(positions) == list(range(len(development.y)))
    p = fitted.log_probabilities(development.features.take(positions))  # [S, k, n, C]
    own = p[:, fold, np.arange(len(positions))]
    np.testing.assert_allclose(own, found.out_of_fold, atol=1e-5)
    mean = found.probabilities()
    np.testing.assert_allclose(mean, np.exp(found.out_of_fold).mean(axis=0))
    np.testing.assert_allclose(mean.sum(axis=1), 1)


def test_networks_on_all_rows_repeat_the_trials_learning_rates_up_to_its_best_epoch(
    decaying_space: Space, steel_rows: Rows
) -> None:
    development, _ = steel_rows
    plan = Plan.of(trial(decaying_space, development, **{"optimizer.lr": 0.1}))
    everything = np.arange(len(development.y))
    by_hand = Fit(
        plan.config,
        development,
        [(everything, everything[:0])] * SEEDS,
        [derive(3, "retrain", i) for i in range(SEEDS)],
    )
    for rate in plan.learning_rates:
        by_hand.train_epoch(rate)
    found = member(plan, on_all_rows(plan, steel_rows), development)
    (network,) = found.networks
    assert len(found.preprocessing.median) == SEEDS
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, by_hand.network.state_dict()[name]), name


def test_one_seed_is_gone_before_the_next_is_trained(
    decaying_space: Space, steel_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Fit]] = []

    class Counted(Fit):
        def __init__(self, *given: Any) -> None:
            assert not [fit for fit in made if fit() is not None]
            made.append(weakref.ref(self))
            super().__init__(*given)

    plan = Plan.of(trial(decaying_space, steel_rows[0], **{"optimizer.lr": 0.1}))
    monkeypatch.setattr("tune_steel.refit.Fit", Counted)
    again(plan, steel_rows)
    assert len(made) == SEEDS_A_MEMBER > 1


def test_a_loss_that_is_not_finite_ends_it(decaying_space: Space, steel_rows: Rows) -> None:
    plan = Plan.of(trial(decaying_space, steel_rows[0]))
    broken = replace(plan, learning_rates=(float("nan"), *plan.learning_rates[1:]))
    with pytest.raises(NonFiniteLossError, match="trial 0 again"):
        again(broken, steel_rows)
    with pytest.raises(NonFiniteLossError, match="trial 0 again"):
        on_all_rows(broken, steel_rows)


def test_the_time_it_takes_counts_every_seed_and_is_shared_by_the_workers(
    decaying_space: Space,
) -> None:
    def plan(number: int, seconds: float) -> Plan:
        return Plan(
            number, decaying_space.config(decaying_space.defaults()), 0, (0.1,), 0.5, seconds
        )

    plans = [plan(0, 3.0), plan(1, 1.0), plan(2, 2.0)]
    equal = [plan(number, 1.0) for number in range(3)]
    # Two seeds of 5 folds; and 5 seeds on all rows: 5 folds' worth, each a quarter longer.
    whole = 5 / 4
    rival = [plan(9, 7.0)]
    assert seconds_again(plans, rival, 5, 1) == pytest.approx(6 * 2 + (6 + 7) * whole)
    assert seconds_again(plans, rival, 5, 2) == pytest.approx(3 * 2 + 7 * whole)
    # A rival that is a member is trained on all rows once.
    assert seconds_again(plans, [*plans[:1], *rival], 5, 1) == seconds_again(plans, rival, 5, 1)
    # However many workers: the longest member is one task, and none is cut in two.
    assert seconds_again(plans, [], 5, 99) == pytest.approx(3 * (2 + whole))
    assert seconds_again(equal, [], 5, 2) == pytest.approx(2 * (2 + whole))
