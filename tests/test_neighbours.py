import pytest
import torch
from plain_network import normal
from torch.nn import functional

import tune_steel.neighbours
from tune_steel.neighbours import class_shares, class_shares_of_batch

REPLICAS, ROWS, BATCH, WIDTH, CLASSES = 3, 30, 12, 5, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def given():
    points = normal(REPLICAS, ROWS, WIDTH, seed=1).double()
    points[:, 20] = points[:, 4]  # two rows in one place
    points[:, 21] = points[:, 5] + 1e-9
    points[:, 22] += 500  # far from all others
    one_hot = functional.one_hot(torch.arange(ROWS) % CLASSES, CLASSES).T.double()
    return points, one_hot.repeat(REPLICAS, 1, 1)


def plain(points, neighbours, one_hot, *, itself):
    # By differences: no square of a distance that could be lost to rounding.
    difference = points.unsqueeze(2) - neighbours.unsqueeze(1)
    square = difference.square().sum(-1)
    same = square == 0
    distance = torch.where(same, 1.0, square).sqrt().masked_fill(same, 0.0)
    if not itself:
        eye = torch.eye(*distance.shape[1:], dtype=torch.bool)
        distance = distance.masked_fill(eye, torch.inf)
    return torch.softmax(-distance, dim=-1) @ one_hot.transpose(1, 2)


@pytest.fixture(params=["replica by replica", "all at once"])
def _parts(request, monkeypatch):
    if request.param == "all at once":  # as on a GPU
        monkeypatch.setattr(tune_steel.neighbours, "_replicas", lambda x: [slice(None)])


@pytest.mark.usefixtures("_parts")
def test_shares_are_those_of_a_softmax_of_distances():
    points, one_hot = given()
    queries = normal(REPLICAS, 7, WIDTH, seed=2).double()
    expected = plain(queries, points, one_hot, itself=True)
    torch.testing.assert_close(class_shares(queries, points, one_hot), expected)
    torch.testing.assert_close(expected.sum(-1), torch.ones(REPLICAS, 7).double())


@pytest.mark.usefixtures("_parts")
def test_in_training_values_and_gradients_are_those_of_autograd():
    points, one_hot = given()
    points.requires_grad_()
    weights = normal(REPLICAS, BATCH, CLASSES, seed=3).double()
    expected = plain(points[:, :BATCH], points, one_hot, itself=False)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), points)
    shares = class_shares_of_batch(points, BATCH, one_hot)
    (got,) = torch.autograd.grad((shares * weights).sum(), points)
    torch.testing.assert_close(shares, expected, rtol=1e-6, atol=1e-6)
    # A billionth apart: the direction is lost in the squares, as in `torch.cdist`.
    lost = torch.zeros(ROWS, dtype=torch.bool)
    lost[[5, 21]] = True
    torch.testing.assert_close(got[:, ~lost], wanted[:, ~lost], rtol=1e-6, atol=1e-6)
    assert torch.isfinite(got).all()


def of_cdist(points, batch, one_hot):
    distance = torch.cdist(points[:, :batch], points)
    distance = distance.masked_fill(torch.eye(*distance.shape[1:], dtype=torch.bool), torch.inf)
    return torch.softmax(-distance, dim=-1) @ one_hot.transpose(1, 2)


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("repeated", [False, True])
def test_single_precision_loses_no_more_than_it_does_in_torchs_own_distances(offset, repeated):
    _, one_hot = given()
    points = normal(REPLICAS, ROWS, WIDTH, seed=4) + offset
    if repeated:  # rows in one place
        points = points[:, torch.arange(ROWS) % 20]
    weights = normal(REPLICAS, BATCH, CLASSES, seed=3)

    def results(function, dtype):
        given = points.to(dtype).requires_grad_()
        shares = function(given, BATCH, one_hot.to(dtype))
        (gradient,) = torch.autograd.grad((shares * weights.to(dtype)).sum(), given)
        return shares.detach().double(), gradient.double()

    def errors(function):
        return [
            (found - right).abs().max()
            for found, right in zip(results(function, torch.float32), exact, strict=True)
        ]

    exact = results(lambda x, batch, y: plain(x[:, :batch], x, y, itself=False), torch.float64)
    ours, torchs = errors(class_shares_of_batch), errors(of_cdist)
    for one, other, size in zip(ours, torchs, exact, strict=True):
        assert one <= 4 * other + 1e-6 * size.abs().max()
