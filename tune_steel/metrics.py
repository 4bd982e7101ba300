"""The scores of one epoch: torchmetrics, once per epoch, on the stacked validation logits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tune_steel.networks import log_probabilities
from tune_steel.scores import score_names


@contextmanager
def _without_scipy_signal() -> Iterator[None]:
    """Lets torchmetrics (1.8, 1.9) import without scipy.signal.

    It imports it only to patch it for an audio package, which costs each worker a second and
    65 MB. Who imports scipy.signal afterwards gets the real one.
    """
    if "scipy.signal" in sys.modules:
        yield
        return
    placeholder = ModuleType("scipy.signal")
    placeholder.__dict__["hamming"] = None
    sys.modules["scipy.signal"] = placeholder
    try:
        yield
    finally:
        del sys.modules["scipy.signal"]


with _without_scipy_signal():
    from torchmetrics import MetricCollection
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassF1Score,
        MulticlassPrecision,
    )
    from torchmetrics.functional.classification import multilabel_auroc

IGNORED = -1
"""The target of padding rows, which no score counts."""


class Scorer:
    """Scores stacked logits against the task's fixed reference weights."""

    def __init__(self, reference_weights: NDArray[np.float64], device: torch.device) -> None:
        """Prepares the metrics.

        Args:
            reference_weights: Class weights of the task [C], the same for every trial.
            device: Where the logits will be.
        """
        classes = len(reference_weights)
        self._weights = torch.tensor(reference_weights, device=device)
        settings: dict[str, Any] = {
            "num_classes": classes,
            "multidim_average": "samplewise",
            "ignore_index": IGNORED,
            "validate_args": False,
        }
        # A replica is a sample here, its validation rows the extra dimension: one update for all
        # replicas, and torchmetrics shares the counts between the metrics.
        self._collection = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **settings),
                "macro_accuracy": MulticlassAccuracy(average="macro", **settings),
                "macro_precision": MulticlassPrecision(average="macro", **settings),
                "macro_f1": MulticlassF1Score(average="macro", **settings),
                "precision": MulticlassPrecision(average="none", **settings),
            },
        ).to(device)

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, NDArray[np.float64]]:
        """The scores of each replica.

        Args:
            logits: [R, N, K].
            target: Class indices [R, N]; `IGNORED` marks padding.

        Returns:
            For each score of `score_names`, an array [R].
        """
        log_p = log_probabilities(logits)
        counted = target != IGNORED
        truth = target.clamp(min=0)
        nll = -log_p.gather(-1, truth.unsqueeze(-1)).squeeze(-1)
        weight = self._weights[truth] * counted
        self._collection.reset()
        self._collection.update(log_p.argmax(-1), target)
        scores: dict[str, Tensor] = {
            "loss": (weight * nll).sum(1) / weight.sum(1),
            "log_loss": (counted * nll).sum(1) / counted.sum(1),
            **self._collection.compute(),
            "auroc": _auroc(log_p, truth, counted),
        }
        precision = scores.pop("precision")
        if len(self._weights) == 2:
            scores["negative_precision"], scores["positive_precision"] = precision.unbind(1)
        names = score_names(len(self._weights))
        stacked = torch.stack([scores[name].reshape(-1).double() for name in names])
        return dict(zip(names, stacked.cpu().numpy(), strict=True))  # one wait for a GPU


def _auroc(log_p: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Macro one-versus-rest AUROC of each replica, every class of every replica in one call."""
    replicas, rows, classes = log_p.shape
    one_hot = functional.one_hot(truth, classes).masked_fill(~counted.unsqueeze(-1), IGNORED)
    if classes == 2:  # both classes have the same curve
        log_p, one_hot, classes = log_p[..., 1:], one_hot[..., 1:], 1
    labels = replicas * classes
    curves = multilabel_auroc(
        log_p.exp().permute(1, 0, 2).reshape(rows, labels),
        one_hot.permute(1, 0, 2).reshape(rows, labels),
        num_labels=labels,
        average="none",
        ignore_index=IGNORED,
        validate_args=False,
    )
    return curves.reshape(replicas, classes).mean(1)
