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
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class StackedLinear(nn.Module):
    """R linear layers: [R, B, in] -> [R, B, out]; weights are [R, in, out].

    Initial weights and biases are uniform within 1 / sqrt(in), as in `torch.nn.Linear`, each
    replica's drawn from its own generator.
    """

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)

        def draw(rows: int) -> nn.Parameter:
            drawn = [
                torch.empty(rows, outputs).uniform_(-bound, bound, generator=generator)
                for generator in generators
            ]
            return nn.Parameter(torch.stack(drawn))

        self.weight = draw(inputs)
        self.bias = draw(1)

    def forward(self, x: Tensor) -> Tensor:
        """Applies replica r's layer to x[r]."""
        return torch.baddbmm(self.bias, x, self.weight)


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

    def forward(self, x: Tensor) -> Tensor:
        """Normalises with the batch's statistics in training, with the running ones else."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return torch.addcmul(self.bias - self.running_mean * scale, x, scale)
        # Two means instead of torch.var_mean, which takes about twenty times as long over this
        # axis on a CPU.
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        var = (centred * centred).mean(1, keepdim=True)
        with torch.no_grad():
            rows = x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (rows / (rows - 1)), self.momentum)
        return torch.addcmul(self.bias, centred * torch.rsqrt(var + self.eps), self.weight)


class StackedMLP(nn.Module):
    """R multi-layer perceptrons: [R, B, D] -> logits [R, B, K].

    K is 1 for two classes (the logit of the second class), else the number of classes.

    Attributes:
        widths: Units of each hidden layer.
        dropout: Dropout probability of each hidden layer.
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
        self.widths = config.widths
        self.dropout = config.dropout
        self._activation = _ACTIVATIONS[config.activation]
        sizes = [inputs, *self.widths]
        replicas = len(generators)
        self.linears = nn.ModuleList(StackedLinear(a, b, generators) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(
            StackedBatchNorm(replicas, width) if config.batch_norm else nn.Identity()
            for width in self.widths
        )
        self.head = StackedLinear(sizes[-1], outputs, generators)

    def forward(self, x: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            x: Features [R, B, D].
            masks: In training, for each hidden layer what its output [R, B, width] is multiplied
                with: 0 or 1 / (1 - dropout).
        """
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self._activation(norm(linear(x)))
            if masks is not None:
                x = x * masks[layer]
        return self.head(x)  # type: ignore[no-any-return]


class DropoutMasks:
    """Draws each replica's dropout masks from that replica's own generator.

    A 16-bit random integer decides each unit, 4 to a 64-bit draw: an eighth of the time of
    `bernoulli_` on a CPU, and a probability that is right to 2^-16.
    """

    def __init__(
        self, widths: Sequence[int], dropout: float, generators: Sequence[torch.Generator]
    ) -> None:
        self._widths = list(widths)
        self._generators = generators
        threshold = round(dropout * 2**16)
        self._threshold = threshold - 2**15
        self._scale = 2**16 / (2**16 - threshold) if threshold < 2**16 else 0.0

    def draw(self, rows: int) -> list[Tensor]:
        """Masks [R, rows, width] of each hidden layer, scaled so that the mean is 1."""
        units = rows * sum(self._widths)
        device = self._generators[0].device
        # One row per replica, whole 64-bit words each, so that what a replica draws does not
        # depend on how many others there are.
        words = torch.empty(
            (len(self._generators), -(-units // 4)), dtype=torch.int64, device=device
        )
        for row, generator in zip(words, self._generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        kept = words.view(torch.int16)[:, :units] >= self._threshold
        masks = kept.to(torch.float32).mul_(self._scale)
        parts = torch.split(masks, [rows * width for width in self._widths], dim=1)
        return [
            part.reshape(len(words), rows, width)
            for part, width in zip(parts, self._widths, strict=True)
        ]


def output_width(classes: int) -> int:
    """Logits of a network: 1 for two classes, else one a class."""
    return 1 if classes == 2 else classes


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [..., C] of logits [..., K], in double precision."""
    logits = logits.double()
    if logits.shape[-1] == 1:
        return torch.cat([functional.logsigmoid(-logits), functional.logsigmoid(logits)], dim=-1)
    return functional.log_softmax(logits, dim=-1)
