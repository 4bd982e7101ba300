import pytest
import tabm
import torch
from plain_network import copy_linear, generators, normal
from torch import nn
from torch.nn import functional

from tune_steel.architectures import (
    StackedNCA,
    StackedResNet,
    StackedTabM,
    _MaskedReLU,
    make_network,
)
from tune_steel.config import ModelConfig, OptimizerConfig
from tune_steel.dropout import DropoutMasks
from tune_steel.fused import Adam, Backprop, Recorded
from tune_steel.neighbours import class_shares
from tune_steel.networks import StackedBatchNorm, StackedMLP

D, ROWS, REPLICAS, OUTPUTS = 5, 24, 2, 3
FAMILIES = {
    "mlp": {"depth": 2, "width_1": 7, "width_2": 6},
    "resnet": {"blocks": 2, "width": 6},
    "tabm": {"depth": 2, "width_1": 7, "width_2": 6, "members": 4},
    "nca": {"blocks": 1, "width": 6},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(family, **settings):
    return ModelConfig(family=family, **(FAMILIES[family] | settings))


def network_of(family, *seeds, outputs=OUTPUTS, **settings):
    made = make_network(config_of(family, **settings), 3, D, outputs, generators(*seeds))
    for i, norm in enumerate(m for m in made.modules() if isinstance(m, StackedBatchNorm)):
        with torch.no_grad():  # statistics that are not the initial ones
            norm.running_mean.copy_(normal(1, *norm.running_mean.shape[1:], seed=90) + i)
            norm.running_var.fill_(2.0 + i)
    return made


def rows(classes=OUTPUTS):
    x = normal(REPLICAS, ROWS, D, seed=7)
    y = torch.randint(0, classes, (REPLICAS, ROWS), generator=torch.Generator().manual_seed(1))
    return x, y


def plain_norm(norm, r, training=False):
    plain = nn.BatchNorm1d(norm.weight.shape[-1])
    state = {name: tensor[r, 0] for name, tensor in norm.state_dict().items()}
    plain.load_state_dict(state, strict=False)
    return plain.train(training)


class PlainBlocks(nn.Module):
    """The residual blocks of replica r, written with torch.nn."""

    def __init__(self, blocks, r, training):
        super().__init__()
        self.norms = nn.ModuleList(plain_norm(b.norm, r, training) for b in blocks)
        self.ups = nn.ModuleList(copy_linear(b.up, r) for b in blocks)
        self.downs = nn.ModuleList(copy_linear(b.down, r) for b in blocks)

    def forward(self, x, masks=None):
        for i, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs, strict=True)):
            hidden = functional.relu(up(norm(x)))
            x = x + down(hidden if masks is None else hidden * masks[i])
        return x


@pytest.mark.parametrize("training", [False, True])
def test_each_replica_of_a_resnet_equals_the_network_written_with_torch_nn(training):
    stacked = network_of("resnet", 1, 2)
    assert isinstance(stacked, StackedResNet)
    x, y = rows()
    masks = [(normal(REPLICAS, ROWS, 12, seed=s) > 0).float() * 2 for s in (3, 4)]
    plain = [
        (
            copy_linear(stacked.input, r),
            PlainBlocks(stacked.blocks, r, training),
            plain_norm(stacked.norm, r, training),
            copy_linear(stacked.head, r),
        )
        for r in range(REPLICAS)
    ]
    out = stacked.train().training_logits(x, y, ROWS, masks) if training else stacked(x)
    for r, (first, blocks, norm, head) in enumerate(plain):
        hidden = blocks(first(x[r]), [mask[r] for mask in masks] if training else None)
        expected = head(functional.relu(norm(hidden)))
        torch.testing.assert_close(out[r], expected, rtol=1e-4, atol=1e-5)
        if training:  # and the running statistics have moved alike
            moved = stacked.norm.running_var[r, 0]
            torch.testing.assert_close(moved, norm.running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3])
def test_each_replica_of_tabm_equals_the_authors_network(outputs):
    stacked = network_of("tabm", 1, 2, outputs=outputs)
    assert isinstance(stacked, StackedTabM)
    with torch.no_grad():
        for i, parameter in enumerate([*stacked.before, *stacked.after]):
            parameter.copy_(normal(*parameter.shape, seed=20 + i))
    x, y = rows()
    in_training = stacked.training_logits(x, y, ROWS, ())
    assert in_training.shape == (REPLICAS, ROWS * 4, outputs)
    mean = stacked(x)
    for r in range(REPLICAS):
        backbone = tabm.MLPBackboneBatchEnsemble(
            d_in=D, n_blocks=2, d_block=7, dropout=0.0, k=4, tabm_init=True,
            scaling_init="ones", start_scaling_init_chunks=None,
        )  # fmt: skip
        layers = [block[0] for block in backbone.blocks]
        hidden = x[r].unsqueeze(1).expand(-1, 4, -1)
        for i, layer in enumerate(layers):
            first = stacked.first[r] if i == 0 else stacked.before[0][r]
            layer = tabm.LinearBatchEnsemble(
                first.shape[1], (7, 6)[i], bias=True, k=4, scaling_init="ones"
            )
            with torch.no_grad():
                layer.weight.copy_(stacked.linears[i].weight[r].T)
                layer.r.copy_(first)
                layer.s.copy_(stacked.after[i][r])
                layer.bias.copy_(stacked.biases[i][r])
            hidden = functional.relu(layer(hidden))
        head = tabm.LinearEnsemble(6, outputs, k=4)
        with torch.no_grad():
            head.weight.copy_(stacked.head[r])
            head.bias.copy_(stacked.head_bias[r, :, 0])
        expected = head(hidden)  # [B, k, K]
        torch.testing.assert_close(in_training[r], expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
        if outputs == 1:
            p = expected.sigmoid().mean(1)
            torch.testing.assert_close(mean[r].sigmoid(), p, rtol=1e-4, atol=1e-5)
        else:
            p = expected.softmax(-1).mean(1)
            torch.testing.assert_close(mean[r].softmax(-1), p, rtol=1e-4, atol=1e-5)


def plain_nca(query, neighbours, classes, outputs, itself=None):
    """Class shares by a loop over rows and neighbours."""
    out = []
    for i, point in enumerate(query):
        weights = torch.tensor(
            [0.0 if itself == (i, j) or (itself == "same" and i == j)
             else float(torch.exp(-(point - other).norm())) for j, other in enumerate(neighbours)]
        )  # fmt: skip
        shares = [float(weights[classes == c].sum() / weights.sum()) for c in range(outputs)]
        out.append(shares)
    return torch.tensor(out)


@pytest.mark.parametrize("outputs", [1, 3])
def test_each_replica_of_nca_equals_a_loop_over_rows_and_neighbours(outputs):
    stacked = network_of("nca", 1, 2, outputs=outputs)
    assert isinstance(stacked, StackedNCA)
    classes = max(outputs, 2)
    x, y = rows(classes)
    stacked.learn_from(x[:, 4:], y[:, 4:])
    logits = stacked(x)
    trained = stacked.train().training_logits(x, y, 10, ())
    assert trained.shape == (REPLICAS, 10, outputs)
    for r in range(REPLICAS):
        for training in (False, True):
            first = copy_linear(stacked.input, r)
            other = network_of("nca", 1, 2, outputs=outputs)  # its statistics have not moved
            blocks = PlainBlocks(other.blocks, r, training)
            points = plain_norm(other.norm, r, training)(blocks(first(x[r]))).detach()
            if training:
                shares = plain_nca(points[:10], points, y[r], classes, "same")
                got = trained[r]
            else:
                shares = plain_nca(points, points[4:], y[r, 4:], classes)
                got = logits[r]
            log_p = (shares + 1e-7).log()
            expected = log_p if outputs > 1 else log_p[:, 1:] - log_p[:, :1]
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_the_classes_of_a_row_itself_do_not_reach_its_logits_in_training():
    stacked = network_of("nca", 1, 2)
    x, y = rows()
    before = stacked.training_logits(x, y, 10, ())
    changed = y.clone()
    changed[:, 3] = (y[:, 3] + 1) % OUTPUTS
    after = stacked.training_logits(x, changed, 10, ())
    assert torch.equal(before[:, 3], after[:, 3])
    assert not torch.isclose(before[:, 4], after[:, 4]).all()


def test_many_queries_are_answered_in_parts_alike_and_many_neighbours_are_cut():
    stacked = network_of("nca", 1, 2, blocks=0)
    x, y = normal(REPLICAS, 9000, D), torch.zeros(REPLICAS, 9000, dtype=torch.int64)
    stacked.learn_from(x, y)
    assert stacked.neighbours.shape == (REPLICAS, 8192, D)
    last = torch.randperm(9000, generator=torch.Generator().manual_seed(0))[-9:]
    y[0, last], y[1, last[:5]] = 1, 2  # of which none would be left
    stacked.learn_from(x, y)
    assert stacked.classes.shape == (REPLICAS, 8192)
    assert (stacked.classes[0] == 1).sum() == 8
    assert (stacked.classes[1] == 2).sum() == 5
    of_rare = stacked.neighbours[1, stacked.classes[1] == 2]
    assert sorted(of_rare.tolist()) == sorted(x[1, last[:5]].tolist())
    stacked.learn_from(x[:, :50], y[:, :50])
    many = stacked(x[:, :1100])
    few = torch.cat([stacked(part) for part in x[:, :1100].split(100, dim=1)], dim=1)
    torch.testing.assert_close(many, few)
    stacked.learn_from(x[:, :700], y[:, :700])
    neighbours, queries = stacked._points(x[:, :700], ()), stacked._points(x[:, :300], ())
    whole = class_shares(queries, neighbours, stacked._one_hot(y[:, :700]))
    torch.testing.assert_close(stacked(x[:, :300]), stacked._logits(whole))


@pytest.mark.parametrize("embedding", ["none", "pbld"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_of_any_family_is_trained_as_it_would_be_alone(family, embedding):
    embedded = {"embedding": embedding}
    if embedding == "pbld":
        embedded |= {"embedding_width": 4, "frequency_scale": 0.3}
    x, y = rows()

    def trained(*seeds, data):
        network = network_of(family, *seeds, dropout=0.3, **embedded).double()
        x, y = (part[data] for part in (normal(REPLICAS, ROWS, D, seed=7).double(), rows()[1]))
        network.learn_from(x, y)
        passes = Recorded(network)
        adam = Adam(OptimizerConfig(lr=0.01, batch_size=ROWS), passes)
        draws = DropoutMasks(network.masked, 0.3, generators(*seeds))
        for _ in range(4):
            masks = [m.double() for m in draws.draw(ROWS)] if network.masked else ()
            with passes.mode():
                logits = passes.forward(x, y, ROWS, masks)
                passes.backward(logits.tanh() / ROWS)
                adam.update()
        return network(x), network.state_dict()

    assert x.shape == (REPLICAS, ROWS, D)
    assert y.shape == (REPLICAS, ROWS)
    together, state = trained(5, 6, data=slice(0, 2))
    alone, alone_state = trained(6, data=slice(1, 2))
    torch.testing.assert_close(together[1:], alone, rtol=1e-7, atol=1e-8)
    for name, tensor in alone_state.items():
        torch.testing.assert_close(state[name][1:], tensor, rtol=1e-6, atol=1e-8)
    assert not torch.isclose(together[0], together[1]).all()


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_hand_written_passes_of_a_perceptron_equal_the_recorded_ones(activation, batch_norm):
    config = config_of("mlp", activation=activation, batch_norm=batch_norm, dropout=0.4)
    x, y = rows()
    masks = [(normal(REPLICAS, ROWS, width, seed=width) > 0).double() * 2 for width in (7, 6)]
    results = []
    for recorded in (False, True):
        network = StackedMLP(config, D, OUTPUTS, generators(1, 2)).double()
        if recorded:
            passes = Recorded(network)
            with passes.mode():
                logits = passes.forward(x.double(), y, ROWS, masks)
        else:
            passes = Backprop(network)
            with passes.mode():
                logits = passes.forward(x.double(), masks)
        with passes.mode():
            passes.backward(logits.clone().tanh())
        gradients = passes.gradients.clone()
        results.append((logits.clone(), gradients, network(x.double())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_network_that_was_stored_comes_back_with_its_neighbours():
    network = network_of("nca", 1, 2)
    x, y = rows()
    network.learn_from(x, y)
    again = network_of("nca", 3, 4)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x), network(x))


def test_a_masked_relu_equals_the_product_to_the_bit():
    x, gradient = normal(2, 9, 7, seed=0), normal(2, 9, 7, seed=1)
    x[0, 0] = 0
    mask = (normal(2, 9, 7, seed=2) > -0.5).float() * 1.5
    plain = x.clone().requires_grad_()
    expected = plain.relu() * mask
    expected.backward(gradient)
    ours = x.clone().requires_grad_()
    out = _MaskedReLU.apply(ours.clone(), mask)
    out.backward(gradient)
    assert torch.equal(out, expected)
    assert torch.equal(ours.grad, plain.grad)
    assert 0.2 < float((out > 0).double().mean()) < 0.8
