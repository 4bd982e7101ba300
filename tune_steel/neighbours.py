"""How much of its neighbours' weight each class has: the head of a nearest-neighbour network.

A neighbour's weight is the softmax of minus its distance. Written with torch's own functions this
takes a dozen passes over the distances, which are many more numbers than anything else in the
network; here few passes are made, replica by replica, over what the cache still holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tune_steel.matmul import product


@torch.no_grad()
def class_shares(points: Tensor, neighbours: Tensor, one_hot: Tensor) -> Tensor:
    """Shares [R, B, C] of the classes among the neighbours of each point.

    Args:
        points: [R, B, W].
        neighbours: [R, n, W].
        one_hot: Their classes [R, C, n].
    """
    left, right = _left(points), _right(neighbours)
    return torch.cat(
        [
            _shares(_weights(_distances(left[part], right[part])), one_hot[part])
            for part in _replicas(left)
        ]
    )


def class_shares_of_batch(points: Tensor, batch: int, one_hot: Tensor) -> Tensor:
    """Shares [R, B, C] of the first B rows, whose neighbours are all rows but itself.

    Unlike those above they have a gradient, in the points.

    Args:
        points: [R, n, W].
        batch: B.
        one_hot: The rows' classes [R, C, n].
    """
    shares: Tensor = _ClassShares.apply(points, batch, one_hot)  # type: ignore[no-untyped-call]
    return shares


class _ClassShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, batch: int, one_hot: Tensor) -> Tensor:
        left, right = _left(points[:, :batch]), _right(points)
        distances = points.new_empty(len(points), batch, points.shape[1])
        weights = torch.empty_like(distances)
        shares = points.new_empty(len(points), batch, one_hot.shape[1])
        for part in _replicas(left):
            distance = _distances(left[part], right[part], out=distances[part])
            distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
            shares[part] = _shares(_weights(distance, out=weights[part]), one_hot[part])
            # What backward divides by: two rows in one place do not pull at each other.
            torch.threshold_(distance, 0, math.inf)
        ctx.save_for_backward(left, right, distances, weights, shares, one_hot)
        return shares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        left, right, distances, weights, shares, one_hot = ctx.saved_tensors
        # Each neighbour has one class, so that a number of the row may go through `one_hot`.
        of_class = (gradient * shares).sum(2, keepdim=True) - gradient
        of_left, of_right = torch.empty_like(left), torch.empty_like(right)
        for part in _replicas(left):
            # Of a distance, divided by it: what the difference of its two points is times.
            pull = product(of_class[part], one_hot[part])
            pull.mul_(weights[part]).div_(distances[part])
            product(pull, right[part], out=of_left[part])  # [pull b, sums of rows, _]
            product(pull.transpose(1, 2), left[part], out=of_right[part])  # [-2 pull' a, _, sums]
        width = right.shape[2] - 2
        points = right[..., :width]
        out = (of_right[..., :width] / 2).addcmul_(points, of_right[..., width + 1 :])
        batch = out[:, : left.shape[1]]
        batch.sub_(of_left[..., :width])
        batch.addcmul_(points[:, : left.shape[1]], of_left[..., width : width + 1])
        return out, None, None


def _left(points: Tensor) -> Tensor:
    """[-2 a, |a|^2, 1]: its product with `_right` is the squared distance."""
    square = points.square().sum(2, keepdim=True)
    return torch.cat([points * -2, square, torch.ones_like(square)], dim=2)


def _right(points: Tensor) -> Tensor:
    """[b, 1, |b|^2]."""
    square = points.square().sum(2, keepdim=True)
    return torch.cat([points, torch.ones_like(square), square], dim=2)


def _distances(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    return product(left, right.transpose(1, 2), out=out).clamp_min_(0).sqrt_()


def _weights(distance: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.softmax(distance.neg(), -1, out=out)


def _shares(weights: Tensor, one_hot: Tensor) -> Tensor:
    """With few classes first, the matmul takes a fifth of the time."""
    return product(one_hot, weights.transpose(1, 2)).transpose(1, 2)


def _replicas(x: Tensor) -> Iterator[slice]:
    """One at a time, whose distances a core's cache holds; on a GPU, all."""
    step = 1 if x.device.type == "cpu" else len(x)
    return (slice(start, start + step) for start in range(0, len(x), step))
