import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from tune_steel.config import ModelConfig
from tune_steel.networks import (
    DropoutMasks,
    StackedBatchNorm,
    StackedLinear,
    StackedMLP,
    log_probabilities,
    output_width,
)

PLAIN_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
FEATURES, ROWS, WIDTHS = 5, 13, (7, 6, 4, 3)


pytestmark = pytest.mark.usefixtures("one_thread")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(stacked, plain, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(stacked, plain, rtol=rtol, atol=atol)


def model_config(depth, **settings):
    widths = {f"width_{layer}": WIDTHS[layer - 1] for layer in range(1, depth + 1)}
    return ModelConfig(depth=depth, **widths, **settings)


def copy_linear(stacked, replica):
    inputs, outputs = stacked.weight.shape[1:]
    plain = nn.Linear(inputs, outputs)
    with torch.no_grad():
        plain.weight.copy_(stacked.weight[replica].T)
        plain.bias.copy_(stacked.bias[replica, 0])
    return plain


class PlainMLP(nn.Module):
    """Replica r of a stacked network, written with torch.nn."""

    def __init__(self, stacked, config, replica):
        super().__init__()
        self.linears = nn.ModuleList(copy_linear(linear, replica) for linear in stacked.linears)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if config.batch_norm else nn.Identity()
            for width in config.widths
        )
        self.activation = PLAIN_ACTIVATIONS[config.activation]()
        self.head = copy_linear(stacked.head, replica)

    def forward(self, x, masks=None):
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self.activation(norm(linear(x)))
            if masks is not None:
                x = x * masks[layer]
        return self.head(x)


def pairs_of_parameters(stacked, plain, replica):
    """Stacked parameter, how to read the replica's out of it, plain parameter."""
    linears = [*zip(stacked.linears, plain.linears, strict=True), (stacked.head, plain.head)]
    for ours, theirs in linears:
        yield ours.weight, lambda t: t[replica].T, theirs.weight
        yield ours.bias, lambda t: t[replica, 0], theirs.bias
    for ours, theirs in zip(stacked.norms, plain.norms, strict=True):
        if isinstance(ours, StackedBatchNorm):
            yield ours.weight, lambda t: t[replica, 0], theirs.weight
            yield ours.bias, lambda t: t[replica, 0], theirs.bias


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
def test_a_stacked_batch_norm_equals_nn_batch_norm_in_output_gradients_and_statistics(replicas):
    stacked = StackedBatchNorm(replicas, 6)
    plains = [nn.BatchNorm1d(6) for _ in range(replicas)]
    with torch.no_grad():
        stacked.weight.copy_(normal(replicas, 1, 6, seed=1))
        stacked.bias.copy_(normal(replicas, 1, 6, seed=2))
        for r, plain in enumerate(plains):
            plain.weight.copy_(stacked.weight[r, 0])
            plain.bias.copy_(stacked.bias[r, 0])
    # Batches of several sizes, the smallest where the unbiased variance matters most.
    for step, rows in enumerate((ROWS, 2, 5)):
        x = (3 * normal(replicas, rows, 6, seed=step) + 2).requires_grad_()
        stacked.zero_grad()
        out = stacked(x)
        out.pow(3).sum().backward()
        for r, plain in enumerate(plains):
            x_r = x.detach()[r].clone().requires_grad_()
            plain.zero_grad()
            expected = plain(x_r)
            expected.pow(3).sum().backward()
            assert_close(out[r], expected)
            assert_close(x.grad[r], x_r.grad, rtol=1e-3, atol=1e-3)
            assert_close(stacked.weight.grad[r, 0], plain.weight.grad)
            assert_close(stacked.bias.grad[r, 0], plain.bias.grad)
            assert_close(stacked.running_mean[r, 0], plain.running_mean)
            assert_close(stacked.running_var[r, 0], plain.running_var)
    stacked.eval()
    x = normal(replicas, ROWS, 6, seed=9)
    before = stacked.running_mean.clone()
    for r, plain in enumerate(plains):
        assert_close(stacked(x)[r], plain.eval()(x[r]))
    assert torch.equal(stacked.running_mean, before)


def test_a_stacked_batch_norm_of_a_constant_feature_is_its_bias():
    stacked = StackedBatchNorm(2, 3)
    x = torch.full((2, 4, 3), 7.5)
    assert_close(stacked(x), torch.zeros(2, 4, 3))


def test_a_stacked_batch_norm_whose_running_variance_is_tiny_equals_nn_batch_norm():
    stacked, plain = StackedBatchNorm(1, 2).eval(), nn.BatchNorm1d(2).eval()
    for variance in (0.0, 1e-6, 1e-5):
        stacked.running_var.fill_(variance)
        plain.running_var.fill_(variance)
        x = normal(1, ROWS, 2)
        assert_close(stacked(x)[0], plain(x[0]))


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_each_replica_of_a_stacked_mlp_equals_the_network_written_with_torch_nn(
    depth, activation, batch_norm, replicas
):
    config = model_config(depth, activation=activation, batch_norm=batch_norm)
    stacked = StackedMLP(config, FEATURES, 3, generators(*range(replicas)))
    plains = [PlainMLP(stacked, config, r) for r in range(replicas)]
    for step in range(2):
        x = normal(replicas, ROWS, FEATURES, seed=step)
        masks = [
            (normal(replicas, ROWS, width, seed=10 + layer) > -0.5).float() * 1.5
            for layer, width in enumerate(config.widths)
        ]
        stacked.zero_grad()
        out = stacked(x, masks)
        assert out.shape == (replicas, ROWS, 3)
        out.square().sum().backward()
        for r, plain in enumerate(plains):
            plain.zero_grad()
            expected = plain(x[r], [mask[r] for mask in masks])
            expected.square().sum().backward()
            assert_close(out[r], expected)
            for ours, of_replica, theirs in pairs_of_parameters(stacked, plain, r):
                assert_close(of_replica(ours.grad), theirs.grad, rtol=1e-3, atol=1e-4)
    stacked.eval()
    x = normal(replicas, ROWS, FEATURES, seed=5)
    for r, plain in enumerate(plains):
        assert_close(stacked(x)[r], plain.eval()(x[r]))
        for ours, theirs in zip(stacked.norms, plain.norms, strict=True):
            if batch_norm:
                assert_close(ours.running_mean[r, 0], theirs.running_mean)
                assert_close(ours.running_var[r, 0], theirs.running_var)


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


@pytest.mark.parametrize("dropout", [0.05, 0.35, 0.5, 0.9])
def test_dropout_masks_drop_their_share_and_have_mean_one(dropout):
    masks = DropoutMasks([200, 100], dropout, generators(0, 1)).draw(500)
    assert [tuple(mask.shape) for mask in masks] == [(2, 500, 200), (2, 500, 100)]
    for mask in masks:
        for replica in mask:
            units = replica.numel()
            deviation = math.sqrt(dropout * (1 - dropout) / units)
            assert float((replica == 0).double().mean()) == pytest.approx(
                dropout, abs=5 * deviation + 2**-16
            )
            kept = replica[replica != 0].unique()
            assert len(kept) == 1
            # The probability is right to 2^-16, and the factor is exact for that probability.
            assert 1 - 1 / float(kept) == pytest.approx(dropout, abs=2**-16)
            assert float(replica.double().mean()) == pytest.approx(
                1, abs=5 * deviation / (1 - dropout)
            )


def test_dropout_masks_are_independent_over_units_rows_layers_and_draws():
    masks = DropoutMasks([8, 8], 0.5, generators(0))
    first, second = masks.draw(4000), masks.draw(4000)
    columns = torch.cat([first[0][0], first[1][0], second[0][0], second[1][0]], dim=1)
    shifted = columns.roll(1, dims=0)
    correlation = np.corrcoef(torch.cat([columns, shifted], dim=1).T.numpy())
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / math.sqrt(4000)


def test_dropout_masks_of_a_replica_do_not_depend_on_the_other_replicas():
    # 3 * 7 units are no whole number of 64-bit draws.
    together = DropoutMasks([4, 3], 0.4, generators(1, 2, 3))
    alone = [DropoutMasks([4, 3], 0.4, generators(seed)) for seed in (1, 2, 3)]
    for rows in (3, 5, 3):
        drawn = together.draw(rows)
        for r, masks in enumerate(alone):
            for ours, own in zip(drawn, masks.draw(rows), strict=True):
                assert torch.equal(ours[r : r + 1], own)


def test_replicas_have_different_dropout_masks():
    (mask,) = DropoutMasks([50], 0.5, generators(1, 2)).draw(50)
    assert 0.4 < float((mask[0] != mask[1]).double().mean()) < 0.6


def test_dropout_zero_keeps_every_unit():
    (mask,) = DropoutMasks([300], 0.0, generators(0)).draw(300)
    assert torch.equal(mask, torch.ones(1, 300, 300))


def test_dropout_just_under_one_stays_finite():
    for dropout in (1 - 2**-16, 0.999999):
        (mask,) = DropoutMasks([300], dropout, generators(0)).draw(300)
        assert torch.isfinite(mask).all()
        assert (mask == 0).double().mean() > 0.999


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
