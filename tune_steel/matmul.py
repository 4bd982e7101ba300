"""Batched matrix products, by the faster of the two libraries that torch brings for a CPU.

torch gives float32 matrices to MKL, which leaves half of the AVX-512 units of AMD's Zen 5 idle;
oneDNN, in the same torch, takes about half of the time there (benchmarks/fit.py). torch gives
them to oneDNN only where products may be computed in bfloat16. On a CPU that has no matrix units
for bfloat16, and AMD's have none, they are computed in float32 all the same; that is checked.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CPU = Path("/proc/cpuinfo")
_backend: Any = torch.backends.mkldnn
# Multiplications. A call of oneDNN takes about 12 us longer, which smaller products do not save.
_WORTHWHILE = 2**21
# Kernels that oneDNN keeps, one for each shape, some .3 MB: a step has about two dozen, and a
# worker's hundred trials would fill the 1024 places that there are by default. Torch's layer above
# it would keep them too, each with memory to work in: 13 MB at a large network's peak, and no
# faster. It cannot keep none.
_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 24, "LRU_CACHE_CAPACITY": 1}


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`torch.bmm`, or with a bias `torch.baddbmm`: [R, n, m] times [R, m, k] is [R, n, k].

    The bias is [R, 1 or n, 1 or k].
    """
    if a.numel() * b.shape[2] < _WORTHWHILE or not a.is_cpu or not onednn_is_better():
        return _plain(a, b, bias, out)
    if out is None and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b, bias)  # type: ignore[no-any-return, no-untyped-call]
    with onednn:
        return _plain(a, b, bias, out)


def _plain(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(a, b, out=out)
    return torch.baddbmm(bias, a, b, out=out)


class _Product(torch.autograd.Function):
    """A product whose gradients are products of the function above, too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.shape = None if bias is None else bias.shape
        return product(a, b, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a, of_b, of_bias = ctx.needs_input_grad
        return (
            product(gradient, b.transpose(1, 2)) if of_a else None,
            product(a.transpose(1, 2), gradient) if of_b else None,
            gradient.sum_to_size(ctx.shape) if of_bias else None,
        )


class _OneDNN:
    """While it is entered, products of float32 matrices go to oneDNN: also those of other threads.

    Their precision is the same; the setting is one of the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = "none"

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = _backend.matmul.fp32_precision
                if self._before == _backend.fp32_precision:
                    self._before = "none"  # it was not set, but is the one above it
                _backend.matmul.fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _backend.matmul.fp32_precision = self._before


onednn = _OneDNN()


@cache
def onednn_is_better() -> bool:
    """Whether this is such a CPU, and oneDNN computes in float32 here."""
    if _vendor() != "AuthenticAMD" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    for name, capacity in _CAPACITIES.items():  # read when oneDNN is used first
        os.environ.setdefault(name, str(capacity))
    # Whole numbers of which some have too many bits for bfloat16, and sums that float32 holds.
    drawn = torch.randint(-300, 301, (2, 1, 128, 128), generator=torch.Generator().manual_seed(0))
    a, b = drawn.float()
    with onednn:
        found = torch.bmm(a, b)
    return torch.equal(found, torch.bmm(*drawn).float())


def _vendor() -> str | None:
    """Who made the CPU, where Linux says it."""
    try:
        with _CPU.open() as lines:
            named = (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
            return next(named, None)
    except OSError:
        return None
