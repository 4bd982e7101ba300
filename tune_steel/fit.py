"""The shared fit/evaluate loop: R replicas trained in lock-step as one stacked network.

It knows torch and the development rows; it does not know Ray, Optuna or the test rows. Whatever
decides (plateau, early stopping, the best epoch) reads the mean over the replicas, so that a trial
has one learning-rate schedule and one best epoch, which a retrained model can repeat. Between two
decisions each replica of equally large folds is exactly the run that it would be alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tune_steel.config import OptimizerConfig, TrialConfig
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Features, Floats, Ints
from tune_steel.metrics import IGNORED, Scorer
from tune_steel.networks import DropoutMasks, StackedMLP, log_probabilities, output_width
from tune_steel.preprocess import Preprocessing, fit_preprocessing
from tune_steel.seeds import derive
from tune_steel.splits import Development

_ROWS_A_CHUNK = 65_536


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean training loss (with the config's class weights) of each replica [R].
        scores: Validation scores of each replica, by name (`metrics.SCORES`), each [R].
        val_loss: Mean over the replicas of the score `loss`.
        best_val_loss: The lowest `val_loss` so far.
        best_epoch: The epoch it came from.
        learning_rate: Used in this epoch.
        seconds: Wall time of training and scoring.
        converged: Early stopping ends the run after this epoch.
    """

    epoch: int
    train_loss: Floats
    scores: dict[str, Floats]
    val_loss: float
    best_val_loss: float
    best_epoch: int
    learning_rate: float
    seconds: float
    converged: bool


class EarlyStopping:
    """Ends a run after `patience` epochs in a row without an improvement above `min_delta`."""

    def __init__(self, patience: int, min_delta: float) -> None:
        self._patience = patience
        self._min_delta = min_delta
        self._best = math.inf
        self._waited = 0

    def step(self, loss: float) -> bool:
        """Takes an epoch's validation loss; true when the run should end."""
        if loss < self._best - self._min_delta:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        return self._waited >= self._patience


class Fit:
    """One stacked network, its optimizer and its data.

    Attributes:
        network: The network, [R] replicas.
        preprocessing: The fitted feature transforms, [R] replicas.
        best_state: Copy of the network's state after the best epoch of `epochs`; None before.
    """

    def __init__(
        self,
        config: TrialConfig,
        development: Development,
        folds: Sequence[tuple[Ints, Ints]],
        seeds: Sequence[int],
        device: str = "cpu",
    ) -> None:
        """Fits the preprocessing and draws the initial weights.

        Args:
            config: The trial's config.
            development: The development rows.
            folds: Training and validation positions of each replica. `train_epoch` alone also
                takes empty validation positions.
            seeds: One seed for each replica; a replica's weights, batches and dropout masks
                depend on its own seed only.
            device: A torch device.
        """
        assert len(folds) == len(seeds)
        self._config = config
        self._device = torch.device(device)
        train = [rows for rows, _ in folds]
        self.preprocessing = fit_preprocessing(
            config.preprocessing.scaling, development.schema, development.features, train
        )
        x = torch.from_numpy(self.preprocessing.transform(development.features))
        y = torch.tensor(development.y)  # a copy: Ray's shared arrays are read-only
        self._rows = len(y)
        self._x = x.to(self._device)
        self._x_flat = self._x.flatten(0, 1)
        self._y = y.to(self._device)
        self._train = [torch.tensor(rows) for rows in train]
        # Folds differ by a few rows; a few rows, other ones each epoch, sit out in the larger.
        self._rows_an_epoch = min(len(rows) for rows in train)
        self._val = self._pad([rows for _, rows in folds])
        self._offsets = torch.arange(len(seeds)).unsqueeze(1) * self._rows

        classes = len(development.classes)
        self.network = StackedMLP(
            config.model,
            self.preprocessing.width,
            output_width(classes),
            [_generator(seed, "weights") for seed in seeds],
        ).to(self._device)
        self._batches = [_generator(seed, "batches") for seed in seeds]
        self._masks = DropoutMasks(
            config.model.widths,
            config.model.dropout,
            [_generator(seed, "dropout", device) for seed in seeds],
        )
        self._optimizer = _optimizer(config.optimizer, self.network)
        self._loss = TrainingLoss(config, development, self._device)
        self._scorer = Scorer(development.reference_weights, self._device)
        self.best_state: dict[str, Tensor] | None = None

    def epochs(self, most: int) -> Iterator[EpochRecord]:
        """Trains until early stopping or `most` epochs; yields after each epoch.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite.
        """
        schedule = self._config.schedule
        plateau = ReduceLROnPlateau(
            self._optimizer, factor=schedule.plateau_factor, patience=schedule.plateau_patience
        )
        stopping = EarlyStopping(schedule.early_stop_patience, schedule.early_stop_min_delta)
        best, best_epoch = math.inf, 0
        for epoch in range(1, most + 1):
            started = time.perf_counter()
            learning_rate = float(self._optimizer.param_groups[0]["lr"])
            train_loss = self.train_epoch(learning_rate)
            scores = self.score()
            val_loss = float(scores["loss"].mean())
            for name, values in (("training", train_loss), ("validation", scores["loss"])):
                if not np.isfinite(values).all():
                    raise NonFiniteLossError(f"the {name} loss of epoch {epoch} is not finite")
            if val_loss < best:
                best, best_epoch = val_loss, epoch
                self._keep()
            plateau.step(val_loss)
            yield EpochRecord(
                epoch=epoch,
                train_loss=train_loss,
                scores=scores,
                val_loss=val_loss,
                best_val_loss=best,
                best_epoch=best_epoch,
                learning_rate=learning_rate,
                seconds=time.perf_counter() - started,
                converged=(converged := stopping.step(val_loss)),
            )
            if converged:
                return

    def train_epoch(self, learning_rate: float) -> Floats:
        """One pass over the training rows in a new order; the mean training loss [R]."""
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self.network.train()
        batch_size = self._config.optimizer.batch_size
        rows = self._rows_an_epoch
        order = torch.stack(
            [
                train[torch.randperm(len(train), generator=generator)[:rows]]
                for train, generator in zip(self._train, self._batches, strict=True)
            ]
        )
        flat = (order + self._offsets).to(self._device)
        order = order.to(self._device)
        total = torch.zeros(len(order), device=self._device)
        # The last batch may be shorter, but not one row: batch norm needs a variance.
        starts = [s for s in range(0, rows, batch_size) if rows - s > 1]
        for start in starts:
            batch = slice(start, min(start + batch_size, rows))
            size = batch.stop - batch.start
            x = self._x_flat[flat[:, batch]]
            masks = self._masks.draw(size) if self.network.dropout > 0 else None
            losses = self._loss(self.network(x, masks), self._y[order[:, batch]])
            self._optimizer.zero_grad(set_to_none=True)
            # Replicas share no parameter: the gradient of the sum is each one's own gradient.
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += losses.detach() * size
        seen = min(starts[-1] + batch_size, rows)
        return (total.double() / seen).cpu().numpy()

    def score(self) -> dict[str, Floats]:
        """Validation scores of each replica with the current weights, by name, each [R]."""
        target = torch.where(self._val >= 0, self._y[self._val.clamp(min=0)], IGNORED)
        return self._scorer(self._logits(self._val.clamp(min=0)), target)

    def validation_logits(self) -> list[NDArray[np.float32]]:
        """Logits of each replica's validation rows, in the order of its fold, [N_r, K]."""
        logits = self._logits(self._val.clamp(min=0)).cpu().numpy()
        return [
            values[kept]
            for values, kept in zip(logits, (self._val >= 0).cpu().numpy(), strict=True)
        ]

    def _logits(self, positions: Tensor) -> Tensor:
        replica = torch.arange(len(positions), device=self._device).unsqueeze(1)
        return predict_logits(self.network, self._x[replica, positions])

    def _pad(self, folds: Sequence[Ints]) -> Tensor:
        """Validation positions [R, longest], filled up with `IGNORED`."""
        padded = torch.full((len(folds), max(len(rows) for rows in folds)), IGNORED)
        for row, positions in zip(padded, folds, strict=True):
            row[: len(positions)] = torch.tensor(positions)
        return padded.to(self._device)

    def _keep(self) -> None:
        state = self.network.state_dict()
        if self.best_state is None:
            self.best_state = {name: tensor.clone() for name, tensor in state.items()}
        for name, tensor in state.items():
            self.best_state[name].copy_(tensor)


class TrainingLoss:
    """The loss that trains a trial: cross-entropy on logits with the config's class weights."""

    def __init__(
        self, config: TrialConfig, development: Development, device: torch.device
    ) -> None:
        loss = config.loss
        self._smoothing = loss.label_smoothing
        self._pos_weight = torch.tensor(loss.pos_weight or 1.0, device=device)
        if loss.class_weights is not None:
            weights = np.array([loss.class_weights[name] for name in development.classes])
        else:
            weights = development.reference_weights ** (loss.class_weight_power or 0.0)
        self._weights = torch.tensor(weights, dtype=torch.float32, device=device)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean loss [R] of logits [R, B, K] and class indices [R, B].

        Two classes: the mean of `binary_cross_entropy_with_logits` with `pos_weight`. More: the
        weighted mean of `cross_entropy`, that is, over the sum of the rows' weights.
        """
        replicas, rows, outputs = logits.shape
        if outputs == 1:
            target = y.to(logits.dtype) * (1 - self._smoothing) + self._smoothing / 2
            return functional.binary_cross_entropy_with_logits(
                logits.squeeze(-1), target, pos_weight=self._pos_weight, reduction="none"
            ).mean(1)
        losses = functional.cross_entropy(
            logits.flatten(0, 1),
            y.flatten(),
            weight=self._weights,
            label_smoothing=self._smoothing,
            reduction="none",
        )
        return losses.view(replicas, rows).sum(1) / self._weights[y].sum(1)


def _generator(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derive(seed, purpose))


def _optimizer(config: OptimizerConfig, network: torch.nn.Module) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


@torch.no_grad()
def predict_logits(network: torch.nn.Module, x: Tensor) -> Tensor:
    """Logits [R, N, K] of features [R, N, D] in evaluation mode, in chunks of rows."""
    network.eval()
    chunk = max(_ROWS_A_CHUNK // len(x), 1)
    return torch.cat([network(part) for part in torch.split(x, chunk, dim=1)], dim=1)


def predict_probabilities(
    network: torch.nn.Module, preprocessing: Preprocessing, features: Features
) -> Floats:
    """Class probabilities of raw rows by each replica, float64 [R, n, C]."""
    device = next(network.parameters()).device
    x = torch.from_numpy(preprocessing.transform(features)).to(device)
    return log_probabilities(predict_logits(network, x)).exp().cpu().numpy()


def prepare_process(threads: int) -> None:
    """Makes a process fit as every other one does: the number of threads changes last bits."""
    torch.set_num_threads(threads)
