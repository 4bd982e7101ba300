"""Dropout's random numbers, drawn in bulk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_UNITS_A_DRAW = 2**15


class DropoutMasks:
    """Draws each replica's dropout masks from that replica's own generator.

    A random byte decides each unit, 8 to a 64-bit draw: the draws are most of what masks cost on a
    CPU. So the probability is a multiple of 1 / 256, at most 255 / 256, and kept units are scaled
    by exactly that one.
    """

    def __init__(
        self, widths: Sequence[int], dropout: float, generators: Sequence[torch.Generator]
    ) -> None:
        self._widths = list(widths)
        self._generators = generators
        dropped = min(round(dropout * 256), 255)
        self._threshold = dropped - 128
        self._scale = 256 / (256 - dropped)
        self._rows = 0
        self._drawn: list[list[Tensor]] = []

    def draw(self, rows: int) -> list[Tensor]:
        """Masks [R, rows, width] of each hidden layer, scaled so that the mean is 1."""
        if rows != self._rows or not self._drawn:
            self._rows, self._drawn = rows, self._batches(rows)
        return self._drawn.pop()

    def _batches(self, rows: int) -> list[list[Tensor]]:
        """Masks of several batches: for small networks a call costs more than its numbers.

        How many does not depend on the number of replicas, nor does what a replica draws.
        """
        parts = [rows * width for width in self._widths]
        batches = max(_UNITS_A_DRAW // sum(parts), 1)
        words = torch.empty(
            (len(self._generators), -(-batches * sum(parts) // 8)),
            dtype=torch.int64,
            device=self._generators[0].device,
        )
        for row, generator in zip(words, self._generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        kept = words.view(torch.int8).ge_(self._threshold)[:, : batches * sum(parts)]
        masks = kept.to(torch.float32).mul_(self._scale)
        views = [
            part.view(-1, rows, width)
            for part, width in zip(
                torch.split(masks, parts * batches, dim=1), self._widths * batches, strict=True
            )
        ]
        return [views[i : i + len(parts)] for i in range(0, len(views), len(parts))]
