"""What the peers train: networks of `torch.nn`, one a fold, an epoch of each in turn.

Configs are flat, by dotted key, as `benchmarks/spaces/binary.toml` has them. A key whose condition
does not hold is not read, so a searcher without conditions may give it a value all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

Config = Mapping[str, Any]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Request:
    """What a search is asked for.

    Attributes:
        data: The arrays that `Data` reads.
        space: The space, a TOML file.
        samples: Trials.
        max_epochs: The most epochs of a trial.
        grace_period: Epochs before a trial may be stopped.
        reduction_factor: One in so many goes on.
        workers: Trials at once.
        seed: Of the sampler and of the networks.
        folder: Where everything is written; `trials.json` is the result.
    """

    data: str
    space: str
    samples: int
    max_epochs: int
    grace_period: int
    reduction_factor: int
    workers: int
    seed: int
    folder: str

    @classmethod
    def read(cls, path: str) -> Request:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def answer(self, trials: Sequence[Trial], **versions: str) -> None:
        """Writes what the search gave."""
        result = {"trials": [asdict(trial) for trial in trials], "versions": versions}
        (Path(self.folder) / "trials.json").write_text(json.dumps(result), encoding="utf-8")


@dataclass(frozen=True)
class Trial:
    """A trial that ended.

    Attributes:
        config: Its config.
        best_val_loss: Its lowest validation loss.
        epochs: Epochs that were trained.
        ended: When, in Unix seconds.
    """

    config: Config
    best_val_loss: float
    epochs: int
    ended: float


@dataclass(frozen=True)
class Data:
    """The development rows, scaled in each of the three ways by each fold's training rows.

    Attributes:
        x: Features [folds, n, D] by the name of the scaling.
        y: Classes, 0 or 1 [n].
        folds: Training and validation positions of each fold.
        weights: The task's class weights [2]: they judge a trial, they do not train it.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    weights: np.ndarray

    @classmethod
    def read(cls, path: str) -> Data:
        with np.load(path) as arrays:
            folds = len(arrays["standard"])
            return cls(
                {name: arrays[name] for name in ("standard", "robust", "quantile")},
                arrays["y"],
                [(arrays[f"train_{i}"], arrays[f"val_{i}"]) for i in range(folds)],
                arrays["weights"],
            )


def network(config: Config, inputs: int) -> nn.Module:
    """A multi-layer perceptron with one logit."""
    depth = config["model.depth"]
    widths = [inputs, *(config[f"model.width_{i}"] for i in range(1, depth + 1))]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers.append(nn.Linear(a, b))
        if config["model.batch_norm"]:
            layers.append(nn.BatchNorm1d(b))
        layers += [ACTIVATIONS[config["model.activation"]](), nn.Dropout(config["model.dropout"])]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    if config["optimizer.name"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=config["optimizer.lr"])
    decay = config["optimizer.weight_decay"]
    return torch.optim.AdamW(model.parameters(), lr=config["optimizer.lr"], weight_decay=decay)


def training_loss(config: Config, logits: Tensor, y: Tensor) -> Tensor:
    """The loss that trains: with the config's class weight and label smoothing."""
    smoothing = config["loss.label_smoothing"]
    target = y * (1 - smoothing) + smoothing / 2
    weight = torch.tensor(config["loss.pos_weight"])
    return functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)


def weighted_nll(logits: Tensor, y: Tensor, weights: Tensor) -> tuple[float, float]:
    """Sums over rows of the weighted negative log-likelihood, and of the weights."""
    weight = weights[y.long()]
    nll = functional.binary_cross_entropy_with_logits(
        logits.double(), y.double(), reduction="none"
    )
    return float((weight * nll).sum()), float(weight.sum())


class Fold:
    """One network and its rows; the shortest loop, with all rows in two tensors."""

    def __init__(self, config: Config, data: Data, fold: int) -> None:
        x = torch.from_numpy(data.x[config["preprocessing.scaling"]][fold])
        y = torch.from_numpy(data.y).float()
        train, val = (torch.from_numpy(rows) for rows in data.folds[fold])
        self.config, self.weights = config, torch.from_numpy(data.weights)
        self.model = network(config, x.shape[1])
        self.optimizer = optimizer(config, self.model)
        self._set_rows(x[train], y[train], x[val], y[val], config["optimizer.batch_size"])

    def _set_rows(self, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, size: int) -> None:
        self.x, self.y, self.x_val, self.y_val, self.size = x, y, x_val, y_val, size

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = training_loss(self.config, self.model(x).squeeze(1), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def train(self) -> None:
        self.model.train()
        for rows in torch.split(torch.randperm(len(self.y)), self.size):
            if len(rows) > 1:  # batch norm needs a variance
                self.step(self.x[rows], self.y[rows])

    @torch.no_grad()
    def validate(self) -> float:
        """The cross-entropy with the task's class weights."""
        self.model.eval()
        logits = self.model(self.x_val).squeeze(1)
        total, weight = weighted_nll(logits, self.y_val, self.weights)
        return total / weight


@dataclass(frozen=True)
class Epoch:
    """What is reported.

    Attributes:
        number: From 1.
        val_loss: Mean over the folds.
        best_val_loss: The lowest so far.
    """

    number: int
    val_loss: float
    best_val_loss: float


def epochs(
    config: Config, data: Data, most: int, seed: int, kind: type[Fold] = Fold
) -> Iterator[Epoch]:
    """Trains until early stopping or `most` epochs.

    Raises:
        FloatingPointError: The validation loss is not finite.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    folds = [kind(config, data, fold) for fold in range(len(data.folds))]
    plateaus = [
        ReduceLROnPlateau(
            fold.optimizer,
            factor=config["schedule.plateau_factor"],
            patience=config["schedule.plateau_patience"],
        )
        for fold in folds
    ]
    best = reference = math.inf
    waited = 0
    for number in range(1, most + 1):
        for fold in folds:
            fold.train()
        loss = sum(fold.validate() for fold in folds) / len(folds)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss of epoch {number} is {loss}")
        for plateau in plateaus:
            plateau.step(loss)
        best = min(best, loss)
        yield Epoch(number, loss, best)
        waited += 1
        if loss < reference - config["schedule.early_stop_min_delta"]:
            reference, waited = loss, 0
        if waited >= config["schedule.early_stop_patience"]:
            return
