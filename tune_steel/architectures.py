"""The stacked networks beside the multi-layer perceptron, and which one a config means.

They are trained through autograd (`fused.Recorded`): most of their time is in large matmuls, which
hand-written passes would not make faster. Waves and neighbours have passes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tune_steel.config import ModelConfig
from tune_steel.embeddings import Embedding, make_embedding
from tune_steel.matmul import product
from tune_steel.neighbours import class_shares, class_shares_of_batch
from tune_steel.networks import (
    ACTIVATIONS,
    Network,
    StackedBatchNorm,
    StackedHead,
    StackedLinear,
    StackedMLP,
    log_probabilities,
    uniform,
)

_MOST_NEIGHBOURS = 8192
_LEAST_OF_A_CLASS = 8
_MOST_CONTEXT = 2048
_ROWS_A_PART = 256
_QUERIES_A_CHUNK = 512
_LEAST_SHARE = 1e-7


class _Embedded(Network):
    """A network whose numeric features may be embedded first."""

    def __init__(self, config: ModelConfig, embedding: Embedding | None) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embedding = embedding

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Gives the training rows to the embedding."""
        if self.embedding is not None:
            self.embedding.learn_from(x, y)

    def _embed(self, x: Tensor) -> Tensor:
        return x if self.embedding is None else self.embedding(x)


class _Block(nn.Module):
    """x + linear(dropout(relu(linear(norm(x))))), the hidden layer twice as wide."""

    def __init__(self, width: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.norm = StackedBatchNorm(len(generators), width)
        self.up = StackedLinear(width, 2 * width, generators)
        self.down = StackedLinear(2 * width, width, generators)
        self.eval()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # In evaluation a batch norm overwrites what it is given.
        hidden: Tensor = self.up(self.norm(x if self.training else x.clone()))
        hidden = (
            hidden.relu_() if mask is None else _MaskedReLU.apply(hidden, mask)  # type: ignore[no-untyped-call]
        )
        out: Tensor = self.down(hidden)
        return out.add_(x)


class _MaskedReLU(torch.autograd.Function):
    """relu(x) * mask in place of x, for masks of 0 and above; autograd would keep relu(x), too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        out = x.relu_().mul_(mask)
        ctx.mark_dirty(x)
        ctx.save_for_backward(out, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out, mask = ctx.saved_tensors
        masked = gradient * mask
        torch.ops.aten.threshold_backward.grad_input(masked, out, 0, grad_input=masked)
        return masked, None


class StackedResNet(_Embedded):
    """R residual networks (Gorishniy et al. 2021, arXiv 2106.11959, section 3.2).

    A linear layer, `blocks` blocks, and a linear layer on relu(norm(x)). Dropout only within the
    blocks, which are twice as wide inside.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__(config, embedding)
        assert config.width is not None
        assert config.blocks is not None
        self.masked = (2 * config.width,) * config.blocks
        self.input = StackedLinear(inputs, config.width, generators)
        self.blocks = nn.ModuleList(_Block(config.width, generators) for _ in self.masked)
        self.norm = StackedBatchNorm(len(generators), config.width)
        self.head = StackedHead(config.width, outputs, generators)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits [R, B, K] of features [R, B, D]."""
        return self._logits(x, ())

    def training_logits(self, x: Tensor, y: Tensor, batch: int, masks: Sequence[Tensor]) -> Tensor:
        """Logits of a batch in training."""
        return self._logits(x, masks)

    def _logits(self, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        x = self.input(self._embed(x))
        for i, block in enumerate(self.blocks):
            x = block(x, masks[i] if masks else None)
        return self.head(self.norm(x).relu())  # type: ignore[no-any-return]


class StackedTabM(_Embedded):
    """R ensembles of `members` networks that share their matrices (TabM, arXiv 2410.24210).

    Every linear layer multiplies its inputs and its outputs with numbers that each member has of
    its own, and has a bias and a last layer for each member; the members are trained each on its
    own loss, and their probabilities are averaged. Initialised as in the authors' `tabm`: the
    first multipliers are random signs, or normal where features are embedded, all others 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__(config, embedding)
        assert config.members is not None
        self.outputs_a_row = members = config.members
        self.masked = tuple(members * width for width in config.widths)
        self._activate = ACTIVATIONS[config.activation]
        sizes = [inputs, *config.widths]
        replicas = len(generators)
        first = [
            torch.empty(members, inputs).normal_(generator=generator) for generator in generators
        ]
        self.first = nn.Parameter(torch.stack(first if embedding else [f.sign() for f in first]))
        self.linears = nn.ModuleList(
            StackedLinear(a, b, generators, bias=False) for a, b in pairwise(sizes)
        )
        self.before = nn.ParameterList(
            nn.Parameter(torch.ones(replicas, members, width)) for width in config.widths[:-1]
        )
        self.after = nn.ParameterList(
            nn.Parameter(torch.ones(replicas, members, width)) for width in config.widths
        )
        self.biases = nn.ParameterList(
            uniform(1 / math.sqrt(a), (members, b), generators) for a, b in pairwise(sizes)
        )
        bound = 1 / math.sqrt(sizes[-1])
        self.head = uniform(bound, (members, sizes[-1], outputs), generators)
        self.head_bias = uniform(bound, (members, 1, outputs), generators)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits [R, B, K] of the members' mean probabilities."""
        logits = self._logits(x, ())  # [R, k, B, K]
        mean = log_probabilities(logits).logsumexp(1) - math.log(self.outputs_a_row)
        if logits.shape[-1] == 1:
            return (mean[..., 1:] - mean[..., :1]).to(x.dtype)
        return mean.to(x.dtype)

    def training_logits(self, x: Tensor, y: Tensor, batch: int, masks: Sequence[Tensor]) -> Tensor:
        """Logits [R, B * members, K] of a batch in training, a row's members together."""
        return self._logits(x, masks).transpose(1, 2).flatten(1, 2)

    def _logits(self, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Logits [R, k, B, K] of each member."""
        rows, members = x.shape[1], self.outputs_a_row
        x = self._embed(x).unsqueeze(1) * self.first.unsqueeze(2)  # [R, k, B, in]
        for i, linear in enumerate(self.linears):
            if i:
                x = x * self.before[i - 1].unsqueeze(2)
            x = linear(x.flatten(1, 2)).view(len(x), members, rows, -1)
            x = torch.addcmul(self.biases[i].unsqueeze(2), x, self.after[i].unsqueeze(2))
            x = self._activate(x)
            if masks:
                x = x * masks[i].view(len(x), rows, members, -1).transpose(1, 2)
        flat = product(x.flatten(0, 1), self.head.flatten(0, 1), self.head_bias.flatten(0, 1))
        return flat.view(*x.shape[:2], *flat.shape[1:])


class StackedNCA(_Embedded):
    """R learnt nearest-neighbour classifiers (ModernNCA, Ye et al. 2024, arXiv 2407.03257).

    Rows are mapped to points; a class's probability is the share of training rows of that class,
    each weighted with exp(-distance to the row), and the logits are its logarithm. In training a
    batch's neighbours are the batch and other rows, an eighth of all, those that come next in the
    epoch's random order (the paper draws up to 60 % anew for each batch), without the row itself;
    afterwards all training rows, which the network keeps. Of more than 8192 the first ones of a
    fixed random order stand for all, but of a rare class its first 8 in any case.
    """

    neighbours: Tensor
    classes: Tensor

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__(config, embedding)
        assert config.width is not None
        assert config.blocks is not None
        self.masked = (2 * config.width,) * config.blocks
        self._outputs = outputs
        self.input = StackedLinear(inputs, config.width, generators)
        self.blocks = nn.ModuleList(_Block(config.width, generators) for _ in self.masked)
        norm = StackedBatchNorm(len(generators), config.width) if config.blocks else None
        self.norm = norm or nn.Identity()
        self.register_buffer("neighbours", torch.empty(len(generators), 0, 0))
        self.register_buffer("classes", torch.empty(len(generators), 0, dtype=torch.int64))

    def context(self, rows: int) -> int:
        """An eighth of the training rows of an epoch, 2048 at most."""
        return min(rows // 8, _MOST_CONTEXT)

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Keeps the training rows as neighbours."""
        super().learn_from(x, y)
        if x.shape[1] > _MOST_NEIGHBOURS:
            kept = torch.stack([_standing_for_all(classes) for classes in y])
            replica = torch.arange(len(x), device=x.device).unsqueeze(1)
            x, y = x[replica, kept], y[replica, kept]
        self.neighbours, self.classes = x.clone(), y.clone()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits [R, B, K] of features [R, B, D] by all neighbours."""
        neighbours, points = (self._points_in_parts(rows) for rows in (self.neighbours, x))
        one_hot = self._one_hot(self.classes)
        shares = [
            class_shares(part, neighbours, one_hot)
            for part in torch.split(points, _QUERIES_A_CHUNK, dim=1)
        ]
        return self._logits(torch.cat(shares, dim=1))

    def training_logits(self, x: Tensor, y: Tensor, batch: int, masks: Sequence[Tensor]) -> Tensor:
        """Logits [R, B, K] of the first B rows; all rows but a row itself are its neighbours."""
        return self._logits(class_shares_of_batch(self._points(x, masks), batch, self._one_hot(y)))

    def _points_in_parts(self, x: Tensor) -> Tensor:
        """Points of many rows: what lies between them and their features is far larger."""
        parts = torch.split(x, _ROWS_A_PART, dim=1)
        return torch.cat([self._points(part, ()) for part in parts], dim=1)

    def _points(self, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        x = self.input(self._embed(x))
        for i, block in enumerate(self.blocks):
            x = block(x, masks[i] if masks else None)
        return self.norm(x)  # type: ignore[no-any-return]

    def _one_hot(self, classes: Tensor) -> Tensor:
        """[R, n] -> [R, C, n]."""
        numbers = torch.arange(max(self._outputs, 2), device=classes.device)
        return (classes.unsqueeze(1) == numbers.unsqueeze(1)).to(self.input.weight.dtype)

    def _logits(self, shares: Tensor) -> Tensor:
        log_p = torch.log(shares + _LEAST_SHARE)
        return log_p[..., 1:] - log_p[..., :1] if self._outputs == 1 else log_p

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Makes room for as many neighbours as were stored."""
        for name in ("neighbours", "classes"):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name]))
        super()._load_from_state_dict(state, prefix, *rest)


def _standing_for_all(classes: Tensor) -> Tensor:
    """Positions of `_MOST_NEIGHBOURS` rows, the first of each class before the others.

    A class without any would have the least probability everywhere.
    """
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    order = order.to(classes.device)
    known = classes[order]
    numbers = range(int(known.max()) + 1)
    first = [(known == c).nonzero().flatten()[:_LEAST_OF_A_CLASS] for c in numbers]
    later = torch.ones_like(known).index_fill_(0, torch.cat(first), 0)
    return order[later.argsort(stable=True)[:_MOST_NEIGHBOURS]]


_FAMILIES: dict[str, Callable[..., Network]] = {
    "mlp": StackedMLP,
    "resnet": StackedResNet,
    "tabm": StackedTabM,
    "nca": StackedNCA,
}


def make_network(
    config: ModelConfig,
    numeric: int,
    inputs: int,
    outputs: int,
    generators: Sequence[torch.Generator],
) -> Network:
    """The stacked network of a config, with its initial weights.

    Args:
        config: What network.
        numeric: How many of the features are numeric; the first ones.
        inputs: Features D.
        outputs: Logits K.
        generators: One for each replica.
    """
    embedding = make_embedding(config, numeric, generators)
    inputs = inputs if embedding is None else embedding.outputs(inputs)
    return _FAMILIES[config.family](config, inputs, outputs, generators, embedding).eval()
