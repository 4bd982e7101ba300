"""A training step as one launch: on a GPU the step's calls take longer than what they compute.

The first batch of a shape runs as it is, so that the libraries set themselves up and constants are
made; the second is recorded as a CUDA graph; it and all further ones are replays. A replay reads
and writes the memory of the recording, so nothing in a step may depend on numbers that Python
saw: what changes from batch to batch is copied into the recorded inputs first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Step: TypeAlias = Callable[..., Tensor]
# Takes what to record; gives its output and what runs it again.
Record: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Records a function's kernels, without running them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return output, graph.replay


class CapturedStep:
    """Calls a step, from the third batch of a shape on as a replay of the second.

    The first runs on a stream of its own, as recording wants it. The step is given with each call
    and not kept: it is a method of what keeps this, and the two would outlive their last user.
    """

    def __init__(self, record: Record = cuda_graph) -> None:
        """Has seen no batch yet.

        Args:
            record: How a step is recorded; `cuda_graph` but in tests on machines without a GPU.
        """
        self._record = record
        # By shapes: the inputs, the output and the replay; None after the first batch.
        self._recorded: dict[
            tuple[torch.Size, ...], tuple[list[Tensor], Tensor, Callable[[], None]] | None
        ] = {}

    def __call__(self, step: Step, *inputs: Tensor) -> Tensor:
        """The step's output for these inputs, in memory of its own.

        Args:
            step: From tensors to a tensor, with whatever effects on memory that stays; the same
                one in each call.
            inputs: Its tensors.
        """
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = None
            return _beside(step, *inputs)
        found = self._recorded[shapes]
        if found is None:
            copies = [tensor.clone() for tensor in inputs]
            found = self._recorded[shapes] = copies, *self._record(lambda: step(*copies))
        own, output, replay = found
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        replay()
        return output.clone()


def _beside(step: Step, *inputs: Tensor) -> Tensor:
    if inputs[0].device.type != "cuda":
        return step(*inputs)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        output = step(*inputs)
    here.wait_stream(stream)
    return output
