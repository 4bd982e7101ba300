"""Layers of R stacked replicas, and the multi-layer perceptron: parameters [R, ...].

One batched matmul per layer trains all replicas; replica r computes exactly what the same network
written with `torch.nn` computes alone. The other families are in `architectures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_steel.config import ModelConfig
from tune_steel.matmul import product

if TYPE_CHECKING:
    from tune_steel.embeddings import Embedding

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
        bound = 1 / math.sqrt(inputs)
        self.weight = uniform(bound, (inputs, outputs), generators)
        drawn = uniform(bound, (1, outputs), generators) if bias else None
        self.register_parameter("bias", drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Applies replica r's layer to x[r]."""
        return product(x, self.weight, self.bias)


class StackedHead(nn.Module):
    """R linear layers with few outputs; weights are [R, out, in], initialised as above.

    Written to memory with the outputs last, a matmul with one output takes seven times as long.
    """

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = uniform(bound, (outputs, inputs), generators)
        self.bias = uniform(bound, (outputs, 1), generators)

    def forward(self, x: Tensor) -> Tensor:
        """Applies replica r's layer to x[r]."""
        return product(self.weight, x.transpose(1, 2), self.bias).transpose(1, 2)


def uniform(
    bound: float, shape: tuple[int, ...], generators: Sequence[torch.Generator]
) -> nn.Parameter:
    """Numbers within a bound [R, *shape], each replica's drawn from its own generator."""
    drawn = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
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
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalises: in training with the batch's statistics, which move the running ones.

        In evaluation the running ones are used, and x is overwritten.
        """
        return self._by_the_batch(x) if self.training else self._by_the_running(x)

    def _by_the_batch(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        variance = centred.square().mean(1, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (rows / (rows - 1)), self.momentum)
        return self.bias + centred * (self.weight * torch.rsqrt(variance + self.eps))

    @torch.no_grad()
    def _by_the_running(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return torch.addcmul(self.bias - self.running_mean * scale, x, scale, out=x)


class Network(nn.Module):
    """A stacked network of any family.

    Attributes:
        dropout: Dropout probability in training.
        masked: Units a row of each dropout mask that `training_logits` takes.
        outputs_a_row: Rows of logits that a training row gives.
        embedding: What is done to the features first, if anything is.
    """

    dropout: float
    masked: tuple[int, ...]
    outputs_a_row: int = 1
    embedding: Embedding | None

    def context(self, rows: int) -> int:
        """How many other rows go through the network beside each batch of an epoch's rows."""
        return 0

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Keeps what the network needs of the training rows beside its weights.

        Args:
            x: Their preprocessed features [R, n, D].
            y: Their classes [R, n].
        """

    def training_logits(self, x: Tensor, y: Tensor, batch: int, masks: Sequence[Tensor]) -> Tensor:
        """Logits [R, B * outputs_a_row, K] of a batch in training, differentiable.

        Args:
            x: Features [R, B + m, D]: the batch, then the m rows beside it.
            y: Classes of all these rows [R, B + m].
            batch: The rows B of the batch.
            masks: For each of `masked`, what is multiplied, [R, B + m, units]; none without
                dropout.
        """
        raise NotImplementedError


class StackedMLP(Network):
    """R multi-layer perceptrons: [R, B, D] -> logits [R, B, K].

    K is 1 for two classes (the logit of the second class), else the number of classes. This is
    the trained network; `fused.Backprop` is how it is trained, unless its features are embedded.
    A linear layer before a batch norm has no bias: the norm would take it out again.

    Attributes:
        activation: Name of the activation.
        embedding: What is done to the features first.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
        embedding: Embedding | None = None,
    ) -> None:
        """Draws the initial weights.

        Args:
            config: Depth, widths, activation, batch norm, dropout.
            inputs: Features, after the embedding if there is one.
            outputs: Logits K.
            generators: One for each replica.
            embedding: What is done to the features first.
        """
        super().__init__()
        self.activation = config.activation
        self.dropout = config.dropout
        self.masked = config.widths
        self.embedding = embedding
        self._activate = ACTIVATIONS[config.activation]
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
        if self.embedding is not None:
            x = self.embedding(x)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self._activate(norm(linear(x)))
        return self.head(x)  # type: ignore[no-any-return]

    def training_logits(self, x: Tensor, y: Tensor, batch: int, masks: Sequence[Tensor]) -> Tensor:
        """Logits [R, B, K] of a batch in training."""
        if self.embedding is not None:
            x = self.embedding(x)
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self._activate(norm(linear(x)))
            if masks:
                x = x * masks[layer]
        return self.head(x)  # type: ignore[no-any-return]

    def learn_from(self, x: Tensor, y: Tensor) -> None:
        """Gives the training rows to the embedding."""
        if self.embedding is not None:
            self.embedding.learn_from(x, y)


def output_width(classes: int) -> int:
    """Logits of a network: 1 for two classes, else one a class."""
    return 1 if classes == 2 else classes


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [..., C] of logits [..., K], in double precision."""
    logits = logits.double()
    if logits.shape[-1] == 1:
        return torch.cat([functional.logsigmoid(-logits), functional.logsigmoid(logits)], dim=-1)
    return functional.log_softmax(logits, dim=-1)
