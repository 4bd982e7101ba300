"""The loss that trains a trial, and its gradient; the loss that judges it is in `metrics.py`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tune_steel.config import TrialConfig
from tune_steel.features import Floats
from tune_steel.networks import log_probabilities
from tune_steel.splits import Development

_LEAST_REST = 1e-12


def class_weights(config: TrialConfig, development: Development) -> Floats:
    """Weights [C] of the classes in the training loss."""
    loss = config.loss
    if len(development.classes) == 2:
        return np.array([1.0, loss.pos_weight or 1.0])
    if loss.class_weights is not None:
        return np.array([loss.class_weights[name] for name in development.classes])
    weights: Floats = development.reference_weights ** (loss.class_weight_power or 0.0)
    return weights


class TrainingLoss:
    """The loss that trains a trial: cross-entropy on logits with the config's class weights.

    Two classes: the mean of `binary_cross_entropy_with_logits` with `pos_weight`. More: the
    weighted mean of `cross_entropy`, that is, over the sum of the rows' weights.

    A row's loss is -sum_c q_c log p_c, where q is the smoothed one-hot vector of its class times
    the class weights: the gradient of its logits is p sum(q) - q. With `focal_gamma` each term is
    multiplied with (1 - p_c)^gamma; the mean stays over the same weights.
    """

    def __init__(
        self, config: TrialConfig, development: Development, device: torch.device
    ) -> None:
        loss, classes = config.loss, len(development.classes)
        weights = class_weights(config, development)
        even = loss.label_smoothing / classes
        self._gamma = loss.focal_gamma
        q = ((1 - loss.label_smoothing) * np.eye(classes) + even) * weights

        self._minus_q = torch.tensor(-q[:, 1:] if classes == 2 else -q, device=device)
        self._sum = torch.tensor(q.sum(axis=1, keepdims=True), device=device)
        self._shares = torch.tensor(np.ones(2) if classes == 2 else weights, device=device)

    def targets(self, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the loss needs of the classes [..., B] of a batch: -q [..., B, K] and sum(q)."""
        total = self._shares[y].sum(-1)[..., None, None]
        return (self._minus_q[y] / total).to(dtype), (self._sum[y] / total).to(dtype)

    def values(self, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss [...] of logits [..., B, K]."""
        minus_q, total = targets
        logits = logits.double()
        if self._gamma:
            q = _both(total, -minus_q) if logits.shape[-1] == 1 else -minus_q
            log_p = log_probabilities(logits)
            return -(q * (1 - log_p.exp()) ** self._gamma * log_p).sum((-2, -1))
        if logits.shape[-1] == 1:
            normalizer = -functional.logsigmoid(-logits)
        else:
            normalizer = logits.logsumexp(-1, keepdim=True)
        rows = total * normalizer + (minus_q * logits).sum(-1, keepdim=True)
        return rows.sum((-2, -1))

    def gradient(self, logits: Tensor, minus_q: Tensor, total: Tensor) -> Tensor:
        """The gradient of the mean loss in the logits."""
        if self._gamma:
            return self._focal_gradient(logits, minus_q, total)
        p = logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)
        return torch.addcmul(minus_q, p, total)

    def _focal_gradient(self, logits: Tensor, minus_q: Tensor, total: Tensor) -> Tensor:
        gamma, one = self._gamma, logits.shape[-1] == 1
        q = _both(total, -minus_q) if one else -minus_q
        log_p = log_probabilities(logits)
        p = log_p.exp()
        rest = (1 - p).clamp(min=_LEAST_REST)
        # Of each term in its p, times p; then through the softmax.
        slope = q * rest**gamma * (gamma * p / rest * log_p - 1)
        gradient = slope - p * slope.sum(-1, keepdim=True)
        return (gradient[..., 1:] if one else gradient).to(logits.dtype)


def _both(total: Tensor, second: Tensor) -> Tensor:
    """The targets of both classes, from their sum and that of the second class."""
    return torch.cat([total - second, second], dim=-1)
