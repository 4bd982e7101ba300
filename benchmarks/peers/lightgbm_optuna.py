"""LightGBM tuned by Optuna, processes that share a journal, for a given time.

    python -m benchmarks.peers.lightgbm_optuna REQUEST

The ranges are those of Optuna's LightGBM example, and the learning rate. `lightgbm.cv` stops
when the mean loss of the folds has not fallen for 50 rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

ROUNDS, PATIENCE = 3000, 50


def open_study(request: dict[str, Any], worker: int) -> optuna.Study:
    return optuna.create_study(
        study_name="lightgbm",
        storage=JournalStorage(JournalFileBackend(f"{request['folder']}/study.journal")),
        sampler=TPESampler(seed=request["seed"] * 1000 + worker, constant_liar=True),
        load_if_exists=True,
    )


def work(request: dict[str, Any], worker: int) -> None:
    """One process."""
    with np.load(request["data"]) as arrays:
        x, y = arrays["x"], arrays["y"]
        folds = [(arrays[f"train_{i}"], arrays[f"val_{i}"]) for i in range(request["folds"])]

    def objective(trial: optuna.Trial) -> float:
        params = {
            "objective": "binary",
            "metric": "binary_logloss",
            "verbosity": -1,
            "num_threads": 1,
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            "lambda_l1": trial.suggest_float("lambda_l1", 1e-8, 10.0, log=True),
            "lambda_l2": trial.suggest_float("lambda_l2", 1e-8, 10.0, log=True),
            "num_leaves": trial.suggest_int("num_leaves", 2, 256),
            "feature_fraction": trial.suggest_float("feature_fraction", 0.4, 1.0),
            "bagging_fraction": trial.suggest_float("bagging_fraction", 0.4, 1.0),
            "bagging_freq": trial.suggest_int("bagging_freq", 1, 7),
            "min_child_samples": trial.suggest_int("min_child_samples", 5, 100),
        }
        curves = lightgbm.cv(
            params,
            lightgbm.Dataset(x, y),
            num_boost_round=ROUNDS,
            folds=folds,
            callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
        )
        return float(min(curves["valid binary_logloss-mean"]))

    open_study(request, worker).optimize(objective, timeout=request["seconds"])


def main(request: dict[str, Any]) -> None:
    study = open_study(request, 0)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(request, i)) for i in range(request["workers"])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    points = [
        (trial.datetime_complete.timestamp(), trial.value)
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_complete is not None and trial.value is not None
    ]
    versions = {"lightgbm": lightgbm.__version__, "optuna": optuna.__version__}
    answer = {"points": points, "versions": versions}
    Path(request["folder"], "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
