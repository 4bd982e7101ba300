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
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tune_steel.architectures import make_network
from tune_steel.captured import CapturedStep
from tune_steel.config import TrialConfig
from tune_steel.dropout import DropoutMasks
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Floats, Ints
from tune_steel.fused import Adam, Backprop, Recorded
from tune_steel.loss import TrainingLoss
from tune_steel.metrics import IGNORED, Scorer
from tune_steel.networks import StackedMLP, log_probabilities, output_width
from tune_steel.preprocess import fit_preprocessing
from tune_steel.seeds import derive
from tune_steel.splits import Development

_ROWS_A_CHUNK = 65_536
_ROWS_A_BLOCK = 1024


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean training loss (with the config's class weights) of each replica [R].
        scores: Validation scores of each replica, by name (`scores.SCORES`), each [R].
        val_loss: Mean over the replicas of the score `loss`.
        best_val_loss: The lowest `val_loss` so far.
        best_epoch: The epoch it came from.
        learning_rate: Used in this epoch.
        seconds: Wall time of training and scoring.
        scoring_seconds: That of scoring alone.
        converged: Early stopping, or the end of a cosine, ends the run after this epoch.
    """

    epoch: int
    train_loss: Floats
    scores: dict[str, Floats]
    val_loss: float
    best_val_loss: float
    best_epoch: int
    learning_rate: float
    seconds: float
    scoring_seconds: float
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
        self._x = x.to(self._device)
        self._y = y.to(self._device)
        self._train = [torch.tensor(rows) for rows in train]
        # Folds differ by a few rows; a few rows, other ones each epoch, sit out in the larger.
        self._rows_an_epoch = min(len(rows) for rows in train)
        self._val = self._pad([rows for _, rows in folds])

        classes = len(development.classes)
        self.network = make_network(
            config.model,
            len(development.schema.numeric),
            self.preprocessing.width,
            output_width(classes),
            [_generator(seed, "weights") for seed in seeds],
        )
        # Equally many for each replica, as an epoch has; the rest of a larger fold is left out.
        known = torch.stack([rows[: self._rows_an_epoch] for rows in self._train])
        self.network.learn_from(x[torch.arange(len(x)).unsqueeze(1), known], y[known])
        self.network.to(self._device)
        self._batches = [_generator(seed, "batches") for seed in seeds]
        self._masks = DropoutMasks(
            self.network.masked,
            config.model.dropout,
            [_generator(seed, "dropout", device) for seed in seeds],
        )
        self._backprop: Backprop | Recorded
        if isinstance(self.network, StackedMLP) and self.network.embedding is None:
            self._backprop = Backprop(self.network)
        else:
            self._backprop = Recorded(self.network)
        self._masked = self.network.dropout > 0 and len(self.network.masked) > 0
        self._context = self.network.context(self._rows_an_epoch)
        self._optimizer = Adam(config.optimizer, self._backprop)
        self._captured = CapturedStep() if self._device.type == "cuda" else None
        self._loss = TrainingLoss(config, development, self._device)
        self._scorer = Scorer(development.reference_weights, self._device)

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
            if schedule.cosine_epochs is None:
                learning_rate = float(self._optimizer.param_groups[0]["lr"])
            else:
                turn = math.pi * (epoch - 1) / schedule.cosine_epochs
                learning_rate = self._config.optimizer.lr * (1 + math.cos(turn)) / 2
            train_loss = self.train_epoch(learning_rate)
            trained = time.perf_counter()
            scores = self.score()
            scoring_seconds = time.perf_counter() - trained
            val_loss = float(scores["loss"].mean())
            for name, values in (("training", train_loss), ("validation", scores["loss"])):
                if not np.isfinite(values).all():
                    raise NonFiniteLossError(f"the {name} loss of epoch {epoch} is not finite")
            if val_loss < best:
                best, best_epoch = val_loss, epoch
            if schedule.cosine_epochs is None:
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
                scoring_seconds=scoring_seconds,
                converged=(
                    converged := stopping.step(val_loss) or epoch == schedule.cosine_epochs
                ),
            )
            if converged:
                return

    def train_epoch(self, learning_rate: float) -> Floats:
        """One pass over the training rows in a new order; the mean training loss [R]."""
        self._optimizer.set_rate(learning_rate)
        with self._backprop.mode():
            return self._train_epoch()

    def _train_epoch(self) -> Floats:
        order = torch.stack(
            [
                train[torch.randperm(len(train), generator=generator)[: self._rows_an_epoch]]
                for train, generator in zip(self._train, self._batches, strict=True)
            ]
        ).to(self._device)
        step = self._step if self._captured is None else partial(self._captured, self._step)
        total = torch.zeros(len(order), dtype=self._x.dtype, device=self._device)
        seen = 0
        # Features and targets of many batches are looked up at once; their losses come after.
        for rows, size in self._blocks():
            index = self._batches_of(order, rows, size)  # [steps, R, B + context]
            y = self._y[index]
            each = y[..., :size].repeat_interleave(self.network.outputs_a_row, dim=-1)
            targets = self._loss.targets(each, self._x.dtype)
            batches = zip(self._rows_of(index), y, *targets, strict=True)
            logits = torch.stack(
                [step(*batch, *self._draw_masks(index.shape[-1])) for batch in batches]
            )
            total += self._loss.values(logits, targets).sum(0) * size
            seen += len(index) * size
        return (total.double() / seen).cpu().numpy()

    def _batches_of(self, order: Tensor, rows: slice, size: int) -> Tensor:
        """Positions of the batches of a block, and after each the rows that follow in the order.

        The order begins again at its end.
        """
        # In a small table fewer rows are left; a row of the batch must not come twice.
        context = min(self._context, order.shape[1] - size)
        starts = torch.arange(rows.start, rows.stop, size, device=self._device).unsqueeze(1)
        steps = starts + torch.arange(size + context, device=self._device)
        return order[:, steps % order.shape[1]].transpose(0, 1)

    def _blocks(self) -> Iterator[tuple[slice, int]]:
        """Positions of the epoch's order, block by block, and the rows of a batch in each.

        The last batch may be shorter, but not one row: batch norm needs a variance.
        """
        size, rows = self._config.optimizer.batch_size, self._rows_an_epoch
        whole = rows - rows % size
        most = max(_ROWS_A_BLOCK // size, 1) * size
        for start in range(0, whole, most):
            yield slice(start, min(start + most, whole)), size
        if rows - whole > 1:
            yield slice(whole, rows), rows - whole

    def _step(
        self, x: Tensor, y: Tensor, counted: Tensor, weight: Tensor, *masks: Tensor
    ) -> Tensor:
        """One step on a batch; its logits."""
        if isinstance(self._backprop, Backprop):
            logits = self._backprop.forward(x, masks)
        else:
            batch = counted.shape[1] // self.network.outputs_a_row
            logits = self._backprop.forward(x, y, batch, masks)
        self._backprop.backward(self._loss.gradient(logits, counted, weight))
        self._optimizer.update()
        return logits

    def _draw_masks(self, rows: int) -> list[Tensor]:
        return self._masks.draw(rows) if self._masked else []

    def _rows_of(self, index: Tensor) -> Tensor:
        """Features [..., R, n, D] of the rows at positions [..., R, n]."""
        replica = torch.arange(len(self._x), device=self._device).unsqueeze(1)
        return self._x[replica, index]

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
        return predict_logits(self.network, self._rows_of(positions))

    def _pad(self, folds: Sequence[Ints]) -> Tensor:
        """Validation positions [R, longest], filled up with `IGNORED`."""
        padded = torch.full((len(folds), max(len(rows) for rows in folds)), IGNORED)
        for row, positions in zip(padded, folds, strict=True):
            row[: len(positions)] = torch.tensor(positions)
        return padded.to(self._device)


def _generator(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derive(seed, purpose))


@torch.no_grad()
def predict_logits(network: torch.nn.Module, x: Tensor) -> Tensor:
    """Logits [R, N, K] of features [R, N, D] in evaluation mode, in chunks of rows."""
    chunk = max(_ROWS_A_CHUNK // len(x), 1)
    return torch.cat([network(part) for part in torch.split(x, chunk, dim=1)], dim=1)


def predict_log_probabilities(network: torch.nn.Module, x: NDArray[np.float32]) -> Floats:
    """Log-probabilities of features [R, n, D] by each replica, float64 [R, n, C]."""
    device = next(network.parameters()).device
    logits = predict_logits(network, torch.from_numpy(x).to(device))
    return log_probabilities(logits).cpu().numpy()


def prepare_process(threads: int) -> None:
    """Makes a process fit as every other one does: the number of threads changes last bits."""
    torch.set_num_threads(threads)
