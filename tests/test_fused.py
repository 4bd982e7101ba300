import itertools
import math

import numpy as np
import pytest
import torch
from plain_network import PlainMLP, generators, model_config, normal
from torch import nn

from tune_steel.config import OptimizerConfig
from tune_steel.dropout import DropoutMasks
from tune_steel.fused import Adam, Backprop, _BatchNorm, _Statistics
from tune_steel.networks import StackedBatchNorm, StackedMLP

FEATURES, ROWS = 5, 13

pytestmark = pytest.mark.usefixtures("one_thread")


def network(replicas=1, outputs=3, depth=2, dropout=0.4, **settings):
    config = model_config(depth, dropout=dropout, **settings)
    stacked = StackedMLP(config, FEATURES, outputs, generators(*range(replicas)))
    return stacked, config


def masks_of(config, replicas, rows=ROWS, seed=10):
    """Masks as `DropoutMasks` draws them, none without dropout."""
    if config.dropout == 0:
        return []
    return [
        (normal(replicas, rows, width, seed=seed + layer) > -0.5).float() * 1.5
        for layer, width in enumerate(config.widths)
    ]


def parts_of(flat, stacked, backprop):
    """The part of a flat tensor that belongs to each parameter, by name."""
    start = backprop.parameters.data_ptr()
    out = {}
    for name, parameter in stacked.named_parameters():
        assert parameter.data_ptr() % 64 == 0
        offset = (parameter.data_ptr() - start) // parameter.element_size()
        out[name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
    return out


def plain_gradients(plain, like):
    """Gradients of a plain network under the names and in the shapes of a stacked one."""
    out = {}
    for name, parameter in plain.named_parameters():
        turned = parameter.ndim == 2 and not name.startswith("head")
        gradient = parameter.grad.T if turned else parameter.grad
        out[name] = gradient.reshape(like[name].shape[1:])
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_training_pass_of_each_replica_equals_torch_nn_and_autograd(
    depth, activation, batch_norm, dropout, replicas, dtype, tolerance
):
    def assert_close(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    stacked, config = network(
        replicas, depth=depth, activation=activation, batch_norm=batch_norm, dropout=dropout
    )
    with torch.no_grad():
        for norm in stacked.norms if batch_norm else ():
            norm.weight.copy_(normal(*norm.weight.shape, seed=20))
            norm.bias.copy_(normal(*norm.bias.shape, seed=21))
    plains = [PlainMLP(stacked, config, r).to(dtype) for r in range(replicas)]
    backprop = Backprop(stacked.to(dtype))
    # Batches of several sizes, the smallest where the unbiased variance matters most.
    for step, rows in enumerate((ROWS, 2, 5)):
        x = normal(replicas, rows, FEATURES, seed=step).to(dtype)
        masks = masks_of(config, replicas, rows, seed=10 + step)
        logits = backprop.forward(x.clone(), masks)
        backprop.backward(2 * logits)
        ours = parts_of(backprop.gradients, stacked, backprop)
        for r, plain in enumerate(plains):
            plain.zero_grad()
            expected = plain(x[r], [mask[r] for mask in masks] or None)
            expected.square().sum().backward()
            assert_close(logits[r], expected)
            theirs = plain_gradients(plain, ours)
            assert ours.keys() == theirs.keys()
            for name, gradient in ours.items():
                assert_close(gradient[r], theirs[name])
    for r, plain in enumerate(plains):
        for norm, theirs in zip(stacked.norms, plain.norms, strict=True):
            if batch_norm:
                assert_close(norm.running_mean[r, 0], theirs.running_mean)
                assert_close(norm.running_var[r, 0], theirs.running_var)


class Traced(torch.autograd.Function):
    """The training pass as autograd sees a function: parameters in, logits out."""

    @staticmethod
    def forward(ctx, x, parameters, stacked, masks):
        ctx.backprop = Backprop(stacked)
        ctx.backprop.parameters.copy_(parameters)
        return ctx.backprop.forward(x.clone(), masks)

    @staticmethod
    def backward(ctx, gradient):
        ctx.backprop.backward(gradient.clone())
        return None, ctx.backprop.gradients.clone(), None, None


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_gradients_pass_gradcheck_in_double_precision(activation, batch_norm, dropout):
    stacked, config = network(2, activation=activation, batch_norm=batch_norm, dropout=dropout)
    stacked.double()
    x, masks = normal(2, ROWS, FEATURES).double(), masks_of(config, 2)
    parameters = Backprop(stacked).parameters.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: Traced.apply(x, values, stacked, masks), (parameters,)
    )


def test_the_parameters_of_the_network_are_views_of_the_flat_ones():
    stacked, _ = network(2)
    before = {name: tensor.clone() for name, tensor in stacked.state_dict().items()}
    backprop = Backprop(stacked)
    for name, tensor in stacked.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    backprop.parameters.fill_(7.0)
    assert all((parameter == 7).all() for parameter in stacked.parameters())
    stacked.load_state_dict(before)
    for name, part in parts_of(backprop.parameters, stacked, backprop).items():
        assert torch.equal(part, before[name]), name


def norm_alone(norm):
    """The training pass of a single batch norm: its backward gives the gradient of its input."""
    parameters = dict.fromkeys(norm.parameters())
    gradients = {parameter: torch.zeros_like(parameter) for parameter in parameters}
    statistics = _Statistics([norm])
    return _BatchNorm(norm, gradients, *statistics.batch[0]), statistics


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_batch_statistics_equal_var_mean_where_the_mean_is_far_larger_than_the_deviation(ratio):
    norm = StackedBatchNorm(2, 50)
    layer, statistics = norm_alone(norm)
    # Steps of 1/64 are exact in single precision up to here.
    x = (normal(2, 32, 50) * 64).round() / 64 + ratio
    out = layer.forward(x.clone())
    statistics.move(32)
    var, mean = torch.var_mean(x.double(), 1, keepdim=True)
    momentum = StackedBatchNorm.momentum
    torch.testing.assert_close(norm.running_mean, (momentum * mean).float(), rtol=1e-6, atol=1e-6)
    expected = (1 - momentum) + momentum * var
    torch.testing.assert_close(norm.running_var, expected.float(), rtol=1e-6, atol=0)
    exact = nn.functional.batch_norm(
        x.double().transpose(0, 1).flatten(1), None, None, training=True
    )
    exact = exact.view(32, 2, 50).transpose(0, 1)
    # The rounding of the mean is all that is left: half a unit in the last place of `ratio`.
    torch.testing.assert_close(out, exact.float(), rtol=0, atol=1e-5 + 1e-7 * ratio)


def test_a_batch_norm_of_a_constant_feature_is_its_bias():
    norm = StackedBatchNorm(2, 3)
    with torch.no_grad():
        norm.bias.copy_(normal(2, 1, 3))
    layer, _ = norm_alone(norm)
    assert torch.equal(layer.forward(torch.full((2, 4, 3), 7.5)), norm.bias.expand(2, 4, 3))
    gradient = layer.backward(normal(2, 4, 3))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_each_update_equals_that_of_torch_on_separate_parameters(name, weight_decay, dtype):
    stacked, _ = network(2)
    backprop = Backprop(stacked.to(dtype))
    ours = Adam(
        OptimizerConfig(name=name, lr=0.01, weight_decay=weight_decay, batch_size=2), backprop
    )
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in stacked.parameters()]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    plain = kind(theirs, lr=0.01, weight_decay=weight_decay, foreach=False, fused=False)
    for step in range(20):
        if step == 10:
            ours.set_rate(0.003)
            plain.param_groups[0]["lr"] = 0.003
        backprop.gradients.copy_(normal(len(backprop.gradients), seed=step))
        gradients = parts_of(backprop.gradients, stacked, backprop)
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        ours.update()
        plain.step()
        for own, parameter in zip(stacked.parameters(), theirs, strict=True):
            torch.testing.assert_close(own, parameter)
        for moment, key in zip(ours.moments, ("exp_avg", "exp_avg_sq"), strict=True):
            parts = parts_of(moment, stacked, backprop).values()
            for part, parameter in zip(parts, theirs, strict=True):
                torch.testing.assert_close(part, plain.state[parameter][key])
    assert int(ours.steps) == int(plain.state[theirs[0]]["step"]) == 20


@pytest.mark.parametrize("dropout", [0.05, 0.35, 0.5, 0.9])
def test_dropout_masks_drop_their_share_and_have_mean_one(dropout):
    masks = DropoutMasks([200, 100], dropout, generators(0, 1)).draw(500)
    assert [tuple(mask.shape) for mask in masks] == [(2, 500, 200), (2, 500, 100)]
    for mask in masks:
        for replica in mask:
            units = replica.numel()
            deviation = math.sqrt(dropout * (1 - dropout) / units)
            assert float((replica == 0).double().mean()) == pytest.approx(
                round(dropout * 256) / 256, abs=5 * deviation
            )
            kept = replica[replica != 0].unique()
            assert len(kept) == 1
            # The probability is the next 256th, and the factor is exact for that probability.
            assert 1 - 1 / float(kept) == pytest.approx(round(dropout * 256) / 256, abs=1e-6)
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
        assert (mask == 0).double().mean() > 0.99


def test_masks_drawn_in_bulk_are_those_of_a_replica_alone_whatever_the_sizes_of_the_batches():
    together = DropoutMasks([60, 37], 0.4, generators(1, 2, 3))
    alone = DropoutMasks([60, 37], 0.4, generators(2))
    for rows in (32, 32, 7, 500, 1, 32) * 8:
        for ours, own in zip(together.draw(rows), alone.draw(rows), strict=True):
            assert torch.equal(ours[1:2], own)


def test_no_two_draws_share_a_mask():
    masks = DropoutMasks([50], 0.5, generators(1))
    drawn = [masks.draw(20)[0].clone() for _ in range(60)]
    equal = torch.stack([(a == b).double().mean() for a, b in itertools.pairwise(drawn)])
    assert 0.4 < float(equal.min()) <= float(equal.max()) < 0.6
