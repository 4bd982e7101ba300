"""The search as a script of Ray Tune's documentation: a function, OptunaSearch, ASHAScheduler.

    python -m benchmarks.peers.ray_tune REQUEST

Its loggers (CSV, JSON, TensorBoard) are on, as they are by default. The fold has DataLoaders and
counts loss and accuracy batch by batch, as the tutorials do.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.training import Data, Fold, Request, Trial, epochs, weighted_nll
from tune_steel.space import Space, load_space


class LoaderFold(Fold):
    """A fold with DataLoaders."""

    def _set_rows(self, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, size: int) -> None:
        alone = len(y) % size == 1  # batch norm needs a variance
        self.loader = DataLoader(TensorDataset(x, y), size, shuffle=True, drop_last=alone)
        self.val_loader = DataLoader(TensorDataset(x_val, y_val), size)

    def train(self) -> None:
        self.model.train()
        running = 0.0
        for x, y in self.loader:
            running += self.step(x, y).item()

    @torch.no_grad()
    def validate(self) -> float:
        self.model.eval()
        total = weight = 0.0
        correct = 0
        for x, y in self.val_loader:
            logits = self.model(x).squeeze(1)
            loss, weights = weighted_nll(logits, y, self.weights)
            total, weight = total + loss, weight + weights
            correct += int(((logits > 0) == (y > 0.5)).sum().item())
        self.accuracy = correct / len(self.val_loader.dataset)  # type: ignore[arg-type]
        return total / weight


def train(config: dict[str, Any], data: Data, request: Request) -> None:
    """The trainable."""
    for epoch in epochs(config, data, request.max_epochs, request.seed, LoaderFold):
        tune.report({"val_loss": epoch.val_loss, "best_val_loss": epoch.best_val_loss})


def define_by_run(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Samples the leaves whose conditions hold; returns the constants."""
    space.suggest(trial)
    return {".".join(path): value for path, value in space.fixed.items()}


def main(request: Request) -> None:
    space = load_space(Path(request.space))
    ray.init(address="local", num_cpus=request.workers)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(train, data=Data.read(request.data), request=request), {"cpu": 1}
        ),
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            num_samples=request.samples,
            search_alg=OptunaSearch(
                partial(define_by_run, space=space),
                metric="val_loss",
                mode="min",
                seed=request.seed,
                points_to_evaluate=[space.defaults()],
            ),
            scheduler=ASHAScheduler(
                max_t=request.max_epochs,
                grace_period=request.grace_period,
                reduction_factor=request.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(name="trials", storage_path=request.folder),
    )
    trials = []
    for result in tuner.fit():  # type: ignore[attr-defined]  # it has __getitem__
        curve = result.metrics_dataframe
        if result.error is None and curve is not None:
            loss, ended = float(curve["val_loss"].min()), float(curve["timestamp"].max())
            trials.append(Trial(result.config or {}, loss, len(curve), ended))
    versions = {"ray": ray.__version__, "optuna": optuna.__version__}
    request.answer(trials, torch=torch.__version__, **versions)


if __name__ == "__main__":
    main(Request.read(sys.argv[1]))
