"""An epoch of nearest neighbours on all folds: this project's loop and one in torch's functions.

`benchmarks/fit.py` times them beside the perceptrons.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_steel.config import TrialConfig
from tune_steel.fit import Fit
from tune_steel.metrics import Scorer
from tune_steel.splits import Development

# The size of `steel` in `starts.NAMED`.
POINT, WAVES, EMBEDDED, SCALE = 128, 16, 4, 0.3
POS_WEIGHT, LR, BATCH = 1.6, 4e-3, 256


class Stacked:
    """This project's fit of nearest neighbours."""

    tree: ClassVar = {
        "model": {
            "family": "nca",
            "blocks": 0,
            "width": POINT,
            "dropout": 0.0,
            "embedding": "pbld",
            "embedding_width": EMBEDDED,
            "frequencies": WAVES,
            "frequency_scale": SCALE,
        },
        "loss": {"pos_weight": POS_WEIGHT},
        "optimizer": {"lr": LR, "batch_size": BATCH},
    }

    def __init__(self, development: Development) -> None:
        folds = development.folds
        config = TrialConfig.model_validate(self.tree)
        self.fit = Fit(config, development, folds, range(len(folds)))

    def train(self) -> None:
        self.fit.train_epoch(LR)

    def score(self) -> list[float]:
        """Validation loss of each fold."""
        return [float(loss) for loss in self.fit.score()["loss"]]


class PlainPoints(nn.Module):
    """Where a row lies, in torch's own functions: [n, D] -> [n, POINT]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(inputs, WAVES) * SCALE)
        self.phase = nn.Parameter((torch.rand(inputs, WAVES) * 2 - 1) * math.pi)
        bound = 1 / math.sqrt(WAVES)
        self.weight = nn.Parameter((torch.rand(inputs, WAVES, EMBEDDED - 1) * 2 - 1) * bound)
        self.bias = nn.Parameter((torch.rand(inputs, EMBEDDED - 1) * 2 - 1) * bound)
        self.linear = nn.Linear(inputs * EMBEDDED, POINT)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.cos(2 * math.pi * self.frequency * x.unsqueeze(2) + self.phase)
        embedded = torch.einsum("npk,pkw->npw", waves, self.weight) + self.bias
        out: Tensor = self.linear(torch.cat([x.unsqueeze(2), embedded], dim=2).flatten(1))
        return out


class Plain:
    """The same networks in torch's own functions, one a fold, one after the other."""

    def __init__(self, development: Development) -> None:
        preprocessing = Stacked(development).fit.preprocessing
        self.x = torch.from_numpy(preprocessing.transform(development.features))
        self.y = torch.tensor(development.y)
        self.folds = [(torch.tensor(train), torch.tensor(val)) for train, val in development.folds]
        self.networks = [PlainPoints(self.x.shape[2]) for _ in self.folds]
        self.optimizers = [torch.optim.Adam(n.parameters(), lr=LR) for n in self.networks]
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POS_WEIGHT))
        self.scorer = Scorer(development.reference_weights, torch.device("cpu"))

    @staticmethod
    def _logits(distances: Tensor, y: Tensor) -> Tensor:
        one_hot = functional.one_hot(y, 2).float()
        log_p = torch.log(torch.softmax(-distances, dim=1) @ one_hot + 1e-7)
        return log_p[:, 1] - log_p[:, 0]

    def train(self) -> None:
        for fold, (rows, _) in enumerate(self.folds):
            order = rows[torch.randperm(len(rows))]
            twice = torch.cat([order, order])
            for start in range(0, len(rows), BATCH):
                size = min(BATCH, len(rows) - start)
                near = twice[start : start + size + len(rows) // 4]
                points = self.networks[fold](self.x[fold, near])
                distances = torch.cdist(points[:size], points)
                itself = torch.eye(*distances.shape, dtype=torch.bool)
                logits = self._logits(distances.masked_fill(itself, torch.inf), self.y[near])
                loss = self.criterion(logits, self.y[near[:size]].float())
                self.optimizers[fold].zero_grad()
                loss.backward()
                self.optimizers[fold].step()

    @torch.no_grad()
    def score(self) -> list[float]:
        losses = []
        for fold, (known, rows) in enumerate(self.folds):
            points, neighbours = (
                self.networks[fold](self.x[fold, index]) for index in (rows, known)
            )
            logits = self._logits(torch.cdist(points, neighbours), self.y[known])
            scores = self.scorer(logits[None, :, None], self.y[rows][None])
            losses.append(scores["loss"].item())
        return losses
