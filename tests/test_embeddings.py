import math

import pytest
import torch
from plain_network import generators, normal
from rtdl_num_embeddings import PeriodicEmbeddings, PiecewiseLinearEmbeddings, compute_bins
from torch import nn

import tune_steel.embeddings
from tune_steel.config import ModelConfig
from tune_steel.embeddings import make_embedding

P, D, ROWS, REPLICAS = 3, 5, 40, 2

pytestmark = pytest.mark.usefixtures("one_thread")


def embedding(kind, *seeds, **settings):
    periodic = {"frequencies": 6, "frequency_scale": 0.5} if kind in ("pbld", "plr") else {}
    config = ModelConfig(
        depth=1, width_1=4, embedding=kind, embedding_width=4, **periodic, **settings
    )
    made = make_embedding(config, P, generators(*(seeds or range(REPLICAS))))
    assert made is not None
    return made


def rows(replicas=REPLICAS):
    x = normal(replicas, ROWS, D, seed=7)
    x[:, :, 2] = x[:, :, 2].round()  # few values: fewer bins than asked for
    y = (x[:, :, 0] + 0.3 * normal(replicas, ROWS, seed=8) > 0).long()
    return x, y


def test_pbld_is_cosines_a_linear_layer_and_the_feature_itself():
    stacked, (x, _) = embedding("pbld"), rows()
    out = stacked(x)
    assert out.shape == (REPLICAS, ROWS, stacked.outputs(D)) == (REPLICAS, ROWS, P * 4 + 2)
    for r in range(REPLICAS):
        for feature in range(P):
            value = x[r, :, feature, None]
            frequency, phase = stacked.frequency[r, feature, :, 0], stacked.phase[r, feature, :, 0]
            waves = torch.cos(2 * math.pi * frequency * value + phase)
            linear = waves @ stacked.weight[r, feature].T + stacked.bias[r, feature, :, 0]
            expected = torch.cat([value, linear], dim=1)
            torch.testing.assert_close(out[r, :, 4 * feature : 4 * feature + 4], expected)
        assert torch.equal(out[r, :, P * 4 :], x[r, :, P:])


def test_the_gradients_of_pbld_are_those_of_autograd_however_it_is_cut(monkeypatch):
    stacked = embedding("pbld").double()
    x = rows()[0].double()
    weights = normal(REPLICAS, ROWS, stacked.outputs(D), seed=2).double()
    value = x[:, :, :P].transpose(1, 2).unsqueeze(2)
    waves = torch.cos(2 * math.pi * stacked.frequency * value + stacked.phase)
    linear = stacked.weight @ waves + stacked.bias
    plain = torch.cat([value, linear], dim=2).flatten(1, 2).transpose(1, 2)
    parameters = list(stacked.parameters())
    expected = torch.autograd.grad((plain * weights[:, :, : P * 4]).sum(), parameters)
    for numbers in (1, ROWS * 6 * 4, 10**6):  # one feature, four, all at a time
        monkeypatch.setattr(tune_steel.embeddings, "_NUMBERS_IN_CACHE", numbers)
        got = torch.autograd.grad((stacked(x) * weights).sum(), parameters)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_plr_equals_the_authors_layer():
    stacked, (x, _) = embedding("plr"), rows()
    out = stacked(x)
    for r in range(REPLICAS):
        theirs = PeriodicEmbeddings(P, 4, n_frequencies=6, frequency_init_scale=0.5, lite=False)
        with torch.no_grad():
            theirs.periodic.weight.copy_(stacked.frequency[r, :, :, 0])
            theirs.linear.weight.copy_(stacked.weight[r].transpose(1, 2))
            theirs.linear.bias.copy_(stacked.bias[r, :, :, 0])
        expected = theirs(x[r, :, :P]).flatten(1)
        torch.testing.assert_close(out[r, :, : P * 4], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["piecewise_quantile", "piecewise_tree"])
def test_piecewise_linear_embeddings_equal_the_authors_with_their_bins(kind):
    stacked, (x, y) = embedding(kind, bins=6), rows()
    stacked.learn_from(x, y)
    with torch.no_grad():
        stacked.bend.copy_(normal(*stacked.bend.shape, seed=3))
    outside = torch.cat([x, 3 * x[:, :5] + 9], dim=1)
    out = stacked(outside)
    for r in range(REPLICAS):
        numeric = x[r, :, :P]
        if kind == "piecewise_tree":
            tree = {"min_samples_leaf": 8, "random_state": 0}
            bins = compute_bins(
                numeric, n_bins=6, tree_kwargs=tree, y=y[r], regression=False, verbose=False
            )
        else:
            bins = compute_bins(numeric, n_bins=6)
        theirs = PiecewiseLinearEmbeddings(bins, 4, activation=False, version="B")
        most = theirs.linear.weight.shape[1]
        assert most > 2
        with torch.no_grad():
            theirs.linear0.weight.copy_(stacked.weight[r, :, :, 0])
            theirs.linear0.bias.copy_(stacked.bias[r, :, :, 0])
            for feature, edges in enumerate(bins):
                count = len(edges) - 1
                # Theirs keeps the last bin of a feature with few of them at the end.
                ours = stacked.bend[r, feature].T
                theirs.linear.weight[feature, : count - 1] = ours[: count - 1]
                theirs.linear.weight[feature, -1] = ours[count - 1]
        expected = theirs(outside[r, :, :P]).flatten(1)
        torch.testing.assert_close(out[r, :, : P * 4], expected, rtol=1e-4, atol=1e-4)


def test_a_constant_feature_has_no_bins_and_stays_finite():
    stacked, (x, y) = embedding("piecewise_quantile", bins=6), rows()
    x[:, :, 1] = 2.0
    stacked.learn_from(x, y)
    assert (stacked.slope[:, 1] == 0).all()
    assert torch.isfinite(stacked(x)).all()


@pytest.mark.parametrize("kind", ["pbld", "plr", "piecewise_quantile", "piecewise_tree"])
def test_a_replica_does_not_depend_on_the_others_and_learns(kind):
    settings = {"bins": 5} if kind.startswith("piecewise") else {}
    together = embedding(kind, 4, 5, **settings)
    alone = embedding(kind, 5, **settings)
    x, y = rows()
    together.learn_from(x, y)
    alone.learn_from(x[1:], y[1:])
    torch.testing.assert_close(together(x)[1:], alone(x[1:]))
    together(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in together.parameters())


def test_no_embedding_where_nothing_is_numeric_or_none_is_asked_for():
    config = ModelConfig(
        depth=1, width_1=4, embedding="pbld", embedding_width=4, frequency_scale=1.0
    )
    assert make_embedding(config, 0, generators(0)) is None
    assert make_embedding(ModelConfig(depth=1, width_1=4), P, generators(0)) is None
    assert isinstance(make_embedding(config, P, generators(0)), nn.Module)
