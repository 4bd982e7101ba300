"""Embeddings of numeric features, stacked: [R, B, P] -> [R, B, P * width].

Each feature of each replica has weights of its own. Columns behind the P numeric ones (flags,
one-hot categories) pass through unchanged. Inside, rows are the last axis: a feature has many rows
and few numbers, and matmuls and copies over a long last axis take a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tune_steel.config import ModelConfig
from tune_steel.matmul import product
from tune_steel.networks import uniform

_LEAST_ROWS_A_LEAF = 8
_NUMBERS_IN_CACHE = 2**16


class Embedding(nn.Module):
    """What all embeddings share.

    Attributes:
        numeric: How many columns P are embedded; the first ones.
        width: Numbers that each of them becomes.
    """

    def __init__(self, numeric: int, width: int) -> None:
        super().__init__()
        self.numeric, self.width = numeric, width

    def outputs(self, inputs: int) -> int:
        """Columns that so many become."""
        return inputs + self.numeric * (self.width - 1)

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Reads the training rows [R, n, D] and their classes [R, n]; most embeddings do not."""

    def forward(self, x: Tensor) -> Tensor:
        """Embeds the numeric columns; the rows are the last axis in memory."""
        columns = x.transpose(1, 2)
        embedded = self._embed(columns[:, : self.numeric].unsqueeze(2)).flatten(1, 2)
        if columns.shape[1] > self.numeric:
            embedded = torch.cat([embedded, columns[:, self.numeric :]], dim=1)
        return embedded.transpose(1, 2)

    def _embed(self, x: Tensor) -> Tensor:
        """[R, P, 1, B] -> [R, P, width, B]."""
        raise NotImplementedError


class Pbld(Embedding):
    """cos(2 pi f x + phase), a linear layer, and the feature itself.

    The PBLD embedding of RealMLP (Holzmueller et al. 2024, arXiv 2407.04491, section 3).
    """

    def __init__(
        self, config: ModelConfig, numeric: int, generators: Sequence[torch.Generator]
    ) -> None:
        assert config.embedding_width is not None
        assert config.frequency_scale is not None
        super().__init__(numeric, config.embedding_width)
        waves = config.frequencies
        self.frequency = _normal(config.frequency_scale, (numeric, waves, 1), generators)
        self.phase = uniform(math.pi, (numeric, waves, 1), generators)
        bound = 1 / math.sqrt(waves)
        self.weight = uniform(bound, (numeric, self.width - 1, waves), generators)
        self.bias = uniform(bound, (numeric, self.width - 1, 1), generators)

    def _embed(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x)
        flat: Tensor = _Waves.apply(  # type: ignore[no-untyped-call]
            torch.cat([x * (2 * math.pi), ones], dim=2).flatten(0, 1),
            torch.cat([self.frequency, self.phase], dim=3).flatten(0, 1),
            self.weight.flatten(0, 1),
            self.bias.flatten(0, 1),
        )
        return torch.cat([x, flat.view(*x.shape[:2], *flat.shape[1:])], dim=2)


class _Waves(torch.autograd.Function):
    """A linear layer on cosines of linear functions of a feature, a few features at a time.

    Autograd would write every wave of every row to memory half a dozen times, which takes longer
    than the arithmetic; here they stay in the cache, and are computed anew on the way back. The
    first axis is the features of all replicas; x is [.., 2, B], the feature and 1, and gets no
    gradient; the linear functions are [.., waves, 2].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, linear, weight)
        out = x.new_empty(len(x), weight.shape[1], x.shape[2])
        for part in _parts(x, weight):
            waves = product(linear[part], x[part]).cos_()
            product(weight[part], waves, bias[part], out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, linear, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_weight, of_linear = torch.empty_like(weight), torch.empty_like(linear)
        for part in _parts(x, weight):
            angle = product(linear[part], x[part])
            product(gradient[part], angle.cos().transpose(1, 2), out=of_weight[part])
            slope = product(weight[part].transpose(1, 2), gradient[part]).mul_(angle.sin_())
            product(slope, x[part].transpose(1, 2), out=of_linear[part])
        return None, of_linear.neg_(), of_weight, gradient.sum(2, keepdim=True)


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Features whose waves fit into the cache of a core together; on a GPU, all of them."""
    each = max(x.shape[2] * weight.shape[2], 1)
    step = max(_NUMBERS_IN_CACHE // each, 1) if x.device.type == "cpu" else len(x)
    return (slice(start, start + step) for start in range(0, len(x), step))


class Plr(Embedding):
    """cos and sin of 2 pi f x, a linear layer, ReLU.

    The PLR embedding of Gorishniy et al. 2022 (arXiv 2203.05556); `PeriodicEmbeddings` of the
    authors' `rtdl_num_embeddings` with `lite=False`.
    """

    def __init__(
        self, config: ModelConfig, numeric: int, generators: Sequence[torch.Generator]
    ) -> None:
        assert config.embedding_width is not None
        assert config.frequency_scale is not None
        super().__init__(numeric, config.embedding_width)
        waves = config.frequencies
        self.frequency = _normal(config.frequency_scale, (numeric, waves, 1), generators)
        bound = 1 / math.sqrt(2 * waves)
        self.weight = uniform(bound, (numeric, self.width, 2 * waves), generators)
        self.bias = uniform(bound, (numeric, self.width, 1), generators)

    def _embed(self, x: Tensor) -> Tensor:
        angle = self.frequency * (2 * math.pi) * x
        waves = torch.cat([angle.cos(), angle.sin()], dim=2)
        return _each(waves, self.weight, self.bias).relu()


class PiecewiseLinear(Embedding):
    """A linear function of the feature, plus one that bends at the edges of its bins.

    `PiecewiseLinearEmbeddings` of the authors' `rtdl_num_embeddings`, version B, without
    activation (Gorishniy et al. 2022, arXiv 2203.05556; version B: TabM, arXiv 2410.24210). The
    bends begin at 0. A bin's number is 0 below it, 1 above it and linear within; the first is
    unbounded below, the last above. Bins that a feature has too few values for are 0.
    """

    slope: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, config: ModelConfig, numeric: int, generators: Sequence[torch.Generator]
    ) -> None:
        assert config.embedding_width is not None
        assert config.bins is not None
        super().__init__(numeric, config.embedding_width)
        self._tree = config.embedding == "piecewise_tree"
        # One input a feature: the bound of the linear layer is 1.
        self.weight = uniform(1.0, (numeric, self.width, 1), generators)
        self.bias = uniform(1.0, (numeric, self.width, 1), generators)
        shape = (len(generators), numeric, config.bins, 1)
        self.bend = nn.Parameter(torch.zeros(*shape[:2], self.width, config.bins))
        for name in ("slope", "offset", "low", "high"):
            self.register_buffer(name, torch.zeros(shape))

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Cuts the bins of each replica's training rows."""
        most = self.slope.shape[2]
        for r in range(len(x)):
            rows, classes = x[r].cpu().numpy().astype(np.float64), y[r].cpu().numpy()
            for feature in range(self.numeric):
                column = rows[:, feature]
                edges = _tree_edges(column, classes, most) if self._tree else None
                if edges is None:
                    edges = np.unique(np.quantile(column, np.linspace(0, 1, most + 1)))
                if len(edges) > 1:
                    self._set(r, feature, edges)

    def _set(self, r: int, feature: int, edges: NDArray[np.float64]) -> None:
        count = len(edges) - 1
        slope = 1 / np.diff(edges)
        low, high = np.zeros(count), np.ones(count)
        low[0], high[-1] = -np.inf, np.inf
        for buffer, values in (
            (self.slope, slope),
            (self.offset, -edges[:-1] * slope),
            (self.low, low),
            (self.high, high),
        ):
            buffer[r, feature, :count, 0] = torch.from_numpy(values).to(buffer)

    def _embed(self, x: Tensor) -> Tensor:
        bins = torch.addcmul(self.offset, self.slope, x)
        bins = torch.minimum(torch.maximum(bins, self.low), self.high)
        return _each(x, self.weight, self.bias) + _each(bins, self.bend)


def make_embedding(
    config: ModelConfig, numeric: int, generators: Sequence[torch.Generator]
) -> Embedding | None:
    """The embedding of a config; None where features stay as they are."""
    if config.embedding == "none" or not numeric:
        return None
    if config.embedding == "pbld":
        return Pbld(config, numeric, generators)
    if config.embedding == "plr":
        return Plr(config, numeric, generators)
    return PiecewiseLinear(config, numeric, generators)


def _each(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer for each feature: [R, P, in, B] -> [R, P, out, B], one batched matmul."""
    flat, matrices = x.flatten(0, 1), weight.flatten(0, 1)
    out = product(matrices, flat, None if bias is None else bias.flatten(0, 1))
    return out.view(*x.shape[:2], *out.shape[1:])


def _normal(
    scale: float, shape: tuple[int, ...], generators: Sequence[torch.Generator]
) -> nn.Parameter:
    drawn = [torch.empty(shape).normal_(0, scale, generator=g) for g in generators]
    return nn.Parameter(torch.stack(drawn))


def _tree_edges(
    column: NDArray[np.float64], y: NDArray[np.int64], most: int
) -> NDArray[np.float64]:
    """Both ends and the thresholds of a decision tree on this column alone."""
    # Costs every worker a second and 80 MB; one embedding of many needs it.
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(
        max_leaf_nodes=most, min_samples_leaf=min(_LEAST_ROWS_A_LEAF, len(column)), random_state=0
    ).fit(column[:, None], y)
    inner = tree.tree_.threshold[tree.tree_.children_left != -1]
    ends = np.array([column.min(), column.max()])
    return np.unique(np.concatenate([ends, inner]))
