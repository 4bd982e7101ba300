"""Networks of R stacked replicas: every parameter has a leading replica axis.

One batched matmul per layer trains all replicas; replica r computes exactly what the same network
written with `torch.nn` computes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_steel.config import ModelConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,  # in place: fresh memory for many rows takes longer than the function
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class StackedLinear(nn.Module):
    """R linear layers: [R, B, in] -> [R, B, out]; weights are [R, in, out].

    Initial weights and biases are uniform within 1 / sqrt(in), as in `torch.nn.Linear`, each
    replica's drawn from its own generator.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = _draw(inputs, (inputs, outputs), generators)
        self.register_parameter("bias", _draw(inputs, (1, outputs), generators) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Applies replica r's layer to x[r]."""
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


class StackedHead(nn.Module):
    """R linear layers with few outputs; weights are [R, out, in], initialised as above.

    Written to memory with the outputs last, a matmul with one output takes seven times as long.
    """

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.weight = _draw(inputs, (outputs, inputs), generators)
        self.bias = _draw(inputs, (outputs, 1), generators)

    def forward(self, x: Tensor) -> Tensor:
        """Applies replica r's layer to x[r]."""
        return torch.baddbmm(self.bias, self.weight, x.transpose(1, 2)).transpose(1, 2)


def _draw(
    inputs: int, shape: tuple[int, int], generators: Sequence[torch.Generator]
) -> nn.Parameter:
    bound = 1 / math.sqrt(inputs)
    drawn = [
        torch.empty(shape).uniform_(-bound, bound, generator=generator) for generator in generators
    ]
    return nn.Parameter(torch.stack(drawn))


class StackedBatchNorm(nn.Module):
    """R batch norms over the rows of [R, B, width], as `torch.nn.BatchNorm1d` defines them."""

    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5
    momentum = 0.1

    def __init__(self, replicas: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(replicas, 1, width))
        self.bias = nn.Parameter(torch.zeros(replicas, 1, width))
        self.register_buffer("running_mean", torch.zeros(replicas, 1, width))
        self.register_buffer("running_var", torch.ones(replicas, 1, width))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Normalises with the running statistics, in place."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return torch.addcmul(self.bias - self.running_mean * scale, x, scale, out=x)


class StackedMLP(nn.Module):
    """R multi-layer perceptrons: [R, B, D] -> logits [R, B, K].

    K is 1 for two classes (the logit of the second class), else the number of classes. This is
    the trained network; `fused.Backprop` is how it is trained. A linear layer before a batch norm
    has no bias: the norm would take it out again.

    Attributes:
        activation: Name of the activation.
        dropout: Dropout probability of each hidden layer in training.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Draws the initial weights.

        Args:
            config: Depth, widths, activation, batch norm, dropout.
            inputs: Features D.
            outputs: Logits K.
            generators: One for each replica.
        """
        super().__init__()
        self.activation = config.activation
        self.dropout = config.dropout
        self._activate = _ACTIVATIONS[config.activation]
        sizes = [inputs, *config.widths]
        replicas = len(generators)
        self.linears = nn.ModuleList(
            StackedLinear(a, b, generators, bias=not config.batch_norm) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(
            StackedBatchNorm(replicas, width) if config.batch_norm else nn.Identity()
            for width in config.widths
        )
        self.head = StackedHead(sizes[-1], outputs, generators)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits of features, without dropout and with the running statistics."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self._activate(norm(linear(x)))
        return self.head(x)  # type: ignore[no-any-return]


def output_width(classes: int) -> int:
    """Logits of a network: 1 for two classes, else one a class."""
    return 1 if classes == 2 else classes


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [..., C] of logits [..., K], in double precision."""
    logits = logits.double()
    if logits.shape[-1] == 1:
        return torch.cat([functional.logsigmoid(-logits), functional.logsigmoid(logits)], dim=-1)
    return functional.log_softmax(logits, dim=-1)
