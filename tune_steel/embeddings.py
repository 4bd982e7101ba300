"""Embeddings of numeric features, stacked: [R, B, P] -> [R, B, P * width].

Each feature of each replica has weights of its own. Columns behind the P numeric ones (flags,
one-hot categories) pass through unchanged.
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
        """Embeds the numeric columns."""
        numeric, rest = x[..., : self.numeric], x[..., self.numeric :]
        by_feature = self._embed(numeric.transpose(1, 2).unsqueeze(-1))  # [R, P, B, width]
        return torch.cat([by_feature.transpose(1, 2).flatten(2), rest], dim=-1)

    def _embed(self, x: Tensor) -> Tensor:
        """[R, P, B, 1] -> [R, P, B, width]."""
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
        self.frequency = _normal(config.frequency_scale, (numeric, 1, waves), generators)
        self.phase = uniform(math.pi, (numeric, 1, waves), generators)
        bound = 1 / math.sqrt(waves)
        self.weight = uniform(bound, (numeric, waves, self.width - 1), generators)
        self.bias = uniform(bound, (numeric, 1, self.width - 1), generators)

    def _embed(self, x: Tensor) -> Tensor:
        given = (x, self.frequency, self.phase, self.weight, self.bias)
        flat: Tensor = _Waves.apply(  # type: ignore[no-untyped-call]
            *(part.flatten(0, 1) for part in given)
        )
        return torch.cat([x, flat.view(*x.shape[:3], -1)], dim=-1)


class _Waves(torch.autograd.Function):
    """cos(2 pi f x + phase) and a linear layer, a few features at a time.

    Autograd would write every wave of every row to memory half a dozen times, which takes longer
    than the arithmetic; here they stay in the cache, and are computed anew on the way back. The
    first axis is the features of all replicas; x itself gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frequency: Tensor, phase: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, frequency, phase, weight)
        out = x.new_empty(*x.shape[:2], weight.shape[2])
        for part in _parts(x, weight):
            angle = torch.addcmul(phase[part], frequency[part], x[part], value=2 * math.pi)
            torch.baddbmm(bias[part], angle.cos_(), weight[part], out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, frequency, phase, weight = ctx.saved_tensors
        of_weight = torch.empty_like(weight)
        of_both = x.new_empty(len(x), 2, weight.shape[1])
        both = torch.cat([x * (2 * math.pi), torch.ones_like(x)], dim=2).transpose(1, 2)
        for part in _parts(x, weight):
            angle = torch.addcmul(phase[part], frequency[part], x[part], value=2 * math.pi)
            torch.bmm(angle.cos().transpose(1, 2), gradient[part], out=of_weight[part])
            slope = torch.bmm(gradient[part], weight[part].transpose(1, 2)).mul_(angle.sin_())
            torch.bmm(both[part], slope, out=of_both[part])
        of_frequency, of_phase = of_both.neg_().split(1, dim=1)
        return None, of_frequency, of_phase, of_weight, gradient.sum(1, keepdim=True)


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Features whose waves fit into the cache of a core together; on a GPU, all of them."""
    each = x.shape[1] * weight.shape[1]
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
        self.frequency = _normal(config.frequency_scale, (numeric, 1, waves), generators)
        bound = 1 / math.sqrt(2 * waves)
        self.weight = uniform(bound, (numeric, 2 * waves, self.width), generators)
        self.bias = uniform(bound, (numeric, 1, self.width), generators)

    def _embed(self, x: Tensor) -> Tensor:
        angle = self.frequency * (2 * math.pi) * x
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
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
        self.weight = uniform(1.0, (numeric, 1, self.width), generators)
        self.bias = uniform(1.0, (numeric, 1, self.width), generators)
        shape = (len(generators), numeric, 1, config.bins)
        self.bend = nn.Parameter(torch.zeros(*shape[:2], config.bins, self.width))
        for name in ("slope", "offset", "low", "high"):
            self.register_buffer(name, torch.zeros(shape))

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Cuts the bins of each replica's training rows."""
        most = self.slope.shape[-1]
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
            buffer[r, feature, 0, :count] = torch.from_numpy(values).to(buffer)

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
    """A linear layer for each feature: [R, P, B, in] -> [R, P, B, out], one batched matmul."""
    flat, matrices = x.flatten(0, 1), weight.flatten(0, 1)
    if bias is None:
        out = torch.bmm(flat, matrices)
    else:
        out = torch.baddbmm(bias.flatten(0, 1), flat, matrices)
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
