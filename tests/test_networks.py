import itertools
import math

import pytest
import torch
from plain_network import PlainMLP, copy_linear, generators, model_config, normal
from torch import nn

from tune_steel.networks import (
    StackedBatchNorm,
    StackedLinear,
    StackedMLP,
    log_probabilities,
    output_width,
)

FEATURES, ROWS = 5, 13


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_close(stacked, plain, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(stacked, plain, rtol=rtol, atol=atol)


def trained_norm(replicas, width):
    """A batch norm whose parameters and statistics are not the initial ones."""
    norm = StackedBatchNorm(replicas, width)
    with torch.no_grad():
        for seed, tensor in enumerate((norm.weight, norm.bias, norm.running_mean)):
            tensor.copy_(normal(replicas, 1, width, seed=seed))
        norm.running_var.copy_(normal(replicas, 1, width, seed=3).exp())
    return norm


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_stacked_linear_layer_equals_nn_linear_in_output_and_gradients(replicas):
    stacked = StackedLinear(FEATURES, 4, generators(*range(replicas)))
    x = normal(replicas, ROWS, FEATURES).requires_grad_()
    out = stacked(x)
    out.square().sum().backward()
    for r in range(replicas):
        plain = copy_linear(stacked, r)
        x_r = x.detach()[r].clone().requires_grad_()
        expected = plain(x_r)
        expected.square().sum().backward()
        assert_close(out[r], expected)
        assert_close(x.grad[r], x_r.grad)
        assert_close(stacked.weight.grad[r].T, plain.weight.grad)
        assert_close(stacked.bias.grad[r, 0], plain.bias.grad)


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_stacked_batch_norm_equals_nn_batch_norm_in_evaluation(replicas):
    stacked = trained_norm(replicas, 6)
    x = normal(replicas, ROWS, 6, seed=9)
    out = stacked(x.clone())
    for r in range(replicas):
        plain = nn.BatchNorm1d(6).eval()
        plain.load_state_dict(
            {name: tensor[r, 0] for name, tensor in stacked.state_dict().items()}, strict=False
        )
        assert_close(out[r], plain(x[r]))


def test_a_stacked_batch_norm_whose_running_variance_is_tiny_equals_nn_batch_norm():
    stacked, plain = StackedBatchNorm(1, 2), nn.BatchNorm1d(2).eval()
    for variance in (0.0, 1e-6, 1e-5):
        stacked.running_var.fill_(variance)
        plain.running_var.fill_(variance)
        x = normal(1, ROWS, 2)
        assert_close(stacked(x.clone())[0], plain(x[0]))


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_each_replica_of_a_stacked_mlp_equals_the_network_written_with_torch_nn(
    depth, activation, batch_norm, replicas
):
    config = model_config(depth, activation=activation, batch_norm=batch_norm)
    stacked = StackedMLP(config, FEATURES, 3, generators(*range(replicas)))
    if batch_norm:
        stacked.norms = nn.ModuleList(trained_norm(replicas, width) for width in config.widths)
    x = normal(replicas, ROWS, FEATURES)
    before = x.clone()
    out = stacked(x)
    assert torch.equal(x, before)
    assert out.shape == (replicas, ROWS, 3)
    for r in range(replicas):
        assert_close(out[r], PlainMLP(stacked, config, r).eval()(x[r]))


def test_a_stacked_mlp_has_no_parameter_that_the_plain_network_has_not():
    config = model_config(3)
    stacked = StackedMLP(config, FEATURES, 2, generators(0))
    plain = PlainMLP(stacked, config, 0)
    assert sum(p.numel() for p in stacked.parameters()) == sum(
        p.numel() for p in plain.parameters()
    )


@pytest.mark.parametrize("inputs", [1, 9, 400])
def test_initial_weights_fill_the_bounds_of_nn_linear(inputs):
    stacked = StackedLinear(inputs, 300, generators(3, 4))
    bound = 1 / math.sqrt(inputs)
    plain = nn.Linear(inputs, 300)
    for drawn, reference in ((stacked.weight, plain.weight), (stacked.bias, plain.bias)):
        ours, theirs = drawn.detach(), reference.detach()
        assert ours.abs().max() <= bound
        assert ours.abs().max() > 0.97 * bound
        assert ours.mean().abs() < 0.1 * bound
        assert float(ours.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.15)


def test_initial_weights_of_a_replica_do_not_depend_on_the_other_replicas():
    config = model_config(3)
    together = StackedMLP(config, FEATURES, 2, generators(1, 2, 3)).state_dict()
    for r, seed in enumerate((1, 2, 3)):
        alone = StackedMLP(config, FEATURES, 2, generators(seed)).state_dict()
        assert together.keys() == alone.keys()
        for name, tensor in together.items():
            assert torch.equal(tensor[r : r + 1], alone[name])


def test_replicas_start_from_different_weights():
    stacked = StackedMLP(model_config(2), FEATURES, 2, generators(1, 2))
    for linear in (*stacked.linears, stacked.head):
        assert not torch.isclose(linear.weight[0], linear.weight[1]).any()


def test_two_classes_have_one_logit_and_more_have_one_each():
    assert [output_width(classes) for classes in (2, 3, 7)] == [1, 3, 7]


def test_log_probabilities_of_one_logit_are_those_of_the_sigmoid():
    logits = normal(3, ROWS, 1) * 4
    log_p = log_probabilities(logits)
    assert log_p.shape == (3, ROWS, 2)
    assert log_p.dtype == torch.float64
    double = logits[..., 0].double()
    torch.testing.assert_close(log_p[..., 1], nn.functional.logsigmoid(double))
    torch.testing.assert_close(log_p[..., 0], nn.functional.logsigmoid(-double))
    two = torch.stack([torch.zeros_like(double), double], dim=-1)
    torch.testing.assert_close(log_p, two.log_softmax(-1))


@pytest.mark.parametrize("classes", [3, 7])
def test_log_probabilities_of_more_logits_are_those_of_the_softmax(classes):
    logits = normal(3, ROWS, classes) * 4
    log_p = log_probabilities(logits)
    assert log_p.dtype == torch.float64
    torch.testing.assert_close(log_p, logits.double().log_softmax(-1))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, ROWS, dtype=torch.float64))


def test_log_probabilities_stay_finite_where_probabilities_underflow():
    for classes, sign in itertools.product((1, 3), (-1, 1)):
        logits = torch.zeros(1, 1, classes)
        logits[..., 0] = sign * 2000.0
        log_p = log_probabilities(logits)
        assert torch.isfinite(log_p).all()
        assert float(log_p.min()) == pytest.approx(-2000, abs=1)
