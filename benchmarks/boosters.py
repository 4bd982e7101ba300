"""LightGBM, XGBoost and CatBoost, at their defaults and tuned by Optuna.

Each is tuned with as many trials as the product: TPE, on the mean log-loss of the inner folds,
each of which stops its own trees early, so a trial is as many fits as there are folds. Folds run
side by side, one thread each: on tables this small more threads in one model only wait. A trial
ends early when it is not in the best quarter of the trials before it on the same folds. The best
config is refitted on all outer training rows with the mean of the folds' best iterations.

The spaces are those of TabArena (Erickson et al., 2025), without what concerns categories, which
these tables have none of. Where it has learning rates of .005 to .1 and 10000 trees, these have
.02 to .2 and 1000; that and ending trials early costs little: on fold 0 of `binary` LightGBM's
best inner log-loss is .362 in 40 s, and was .359 in 136 s from .005 on, with 2000 trees and whole
trials. The first trial is near the library's defaults, as the product's first trial is its
default config.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from benchmarks.rivals import Fold, Method, MissingError, Outcome, spread
from tune_steel.features import Floats, Ints
from tune_steel.seeds import derive

MOST_TREES, PATIENCE = 1000, 50
KEPT_PERCENT, NEVER_PRUNED = 25.0, 10


@dataclass(frozen=True)
class Booster:
    """A library.

    Attributes:
        title: Its name in the table.
        package: What is imported; without it the method is left out, and that is said.
        make: The module and a seed to a model of its defaults, of one thread.
        stopping: Parameters that stop early on `eval_set`.
        trees: Trees of the best iteration of a fitted model.
        space: A trial to parameters.
        first: The first trial.
    """

    title: str
    package: str
    make: Callable[[Any, int], Any]
    stopping: Mapping[str, Any]
    trees: Callable[[Any], int]
    space: Callable[[optuna.Trial], dict[str, Any]]
    first: Mapping[str, Any]

    def module(self) -> Any:
        """The library.

        Raises:
            MissingError: It is not installed.
        """
        try:
            return importlib.import_module(self.package)
        except ImportError as error:
            raise MissingError(f"{error}; pip install 'tune-steel[benchmark]'") from None

    def default(self, fold: Fold) -> Outcome:
        """The library's own defaults on all training rows."""
        seed = derive(fold.seed, self.package)
        model = self.make(self.module(), seed)
        model.fit(fold.x, fold.y)
        return Outcome({f"{self.title} default": _predict(model, fold.x_test, fold)})

    def tuned(self, fold: Fold) -> Outcome:
        """The best of so many trials."""
        module, x, y = self.module(), fold.x, fold.y
        seed = derive(fold.seed, self.package, "tuned")
        inner = StratifiedKFold(fold.settings.inner_folds, shuffle=True, random_state=seed)
        folds = list(inner.split(x, y))

        def one(params: Mapping[str, Any], train: Ints, val: Ints) -> tuple[float, int]:
            model = self.make(module, seed)
            model.set_params(**params, **self.stopping, n_estimators=MOST_TREES)
            quiet = {} if self.package == "lightgbm" else {"verbose": False}
            model.fit(x[train], y[train], eval_set=[(x[val], y[val])], **quiet)
            p = _predict(model, x[val], fold)
            return float(log_loss(y[val], p, labels=range(fold.classes))), self.trees(model)

        with ThreadPoolExecutor(fold.settings.threads) as pool:

            def objective(trial: optuna.Trial) -> float:
                params = self.space(trial)
                losses: list[float] = []
                trees: list[int] = []
                for start in range(0, len(folds), fold.settings.threads):
                    some = folds[start : start + fold.settings.threads]
                    done = list(pool.map(lambda pair: one(params, *pair), some))
                    losses += [loss for loss, _ in done]
                    trees += [count for _, count in done]
                    trial.report(float(np.mean(losses)), len(losses))
                    if len(losses) < len(folds) and trial.should_prune():
                        raise optuna.TrialPruned
                trial.set_user_attr("params", params)
                trial.set_user_attr("trees", max(round(np.mean(trees)), 1))
                return float(np.mean(losses))

            optuna.logging.set_verbosity(optuna.logging.ERROR)
            study = optuna.create_study(
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=optuna.pruners.PercentilePruner(KEPT_PERCENT, NEVER_PRUNED),
            )
            study.enqueue_trial(dict(self.first))
            study.optimize(objective, n_trials=fold.settings.trials)
        best = study.best_trial
        trees = int(best.user_attrs["trees"])
        model = self.make(module, seed)
        model.set_params(**best.user_attrs["params"], n_estimators=trees)
        model.fit(x, y)
        note = f"trial {best.number} of {len(study.trials)}, inner log-loss {best.value:.4f}, "
        return Outcome(
            {f"{self.title} tuned": _predict(model, fold.x_test, fold)}, f"{note}{trees} trees"
        )


def _predict(model: Any, x: Floats, fold: Fold) -> Floats:
    return spread(model.predict_proba(x), model.classes_, fold)


def _quiet(method: Method) -> Method:
    """Without the libraries' warnings about each other; filters are no thread's own."""

    def quiet(fold: Fold) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return method(fold)

    return quiet


def _lightgbm_space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.4, 1.0),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.7, 1.0),
        "bagging_freq": 1,
        "num_leaves": trial.suggest_int("num_leaves", 2, 200, log=True),
        "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 1, 64, log=True),
        "extra_trees": trial.suggest_categorical("extra_trees", [False, True]),
        "lambda_l1": trial.suggest_float("lambda_l1", 1e-5, 1.0, log=True),
        "lambda_l2": trial.suggest_float("lambda_l2", 1e-5, 2.0, log=True),
    }


def _xgboost_space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
        "max_depth": trial.suggest_int("max_depth", 4, 10, log=True),
        "min_child_weight": trial.suggest_float("min_child_weight", 1e-3, 5.0, log=True),
        "subsample": trial.suggest_float("subsample", 0.6, 1.0),
        "colsample_bylevel": trial.suggest_float("colsample_bylevel", 0.6, 1.0),
        "colsample_bynode": trial.suggest_float("colsample_bynode", 0.6, 1.0),
        "reg_alpha": trial.suggest_float("reg_alpha", 1e-4, 5.0, log=True),
        "reg_lambda": trial.suggest_float("reg_lambda", 1e-4, 5.0, log=True),
        "grow_policy": trial.suggest_categorical("grow_policy", ["depthwise", "lossguide"]),
        "max_leaves": trial.suggest_int("max_leaves", 8, 1024, log=True),
    }


def _catboost_space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
        "bootstrap_type": "Bernoulli",
        "subsample": trial.suggest_float("subsample", 0.7, 1.0),
        "grow_policy": trial.suggest_categorical("grow_policy", ["SymmetricTree", "Depthwise"]),
        "depth": trial.suggest_int("depth", 4, 8),
        "colsample_bylevel": trial.suggest_float("colsample_bylevel", 0.85, 1.0),
        "l2_leaf_reg": trial.suggest_float("l2_leaf_reg", 1e-4, 5.0, log=True),
        "leaf_estimation_iterations": trial.suggest_int(
            "leaf_estimation_iterations", 1, 20, log=True
        ),
    }


BOOSTERS = (
    Booster(
        "LightGBM",
        "lightgbm",
        lambda module, seed: module.LGBMClassifier(random_state=seed, n_jobs=1, verbosity=-1),
        {"early_stopping_round": PATIENCE},
        lambda model: int(model.best_iteration_),
        _lightgbm_space,
        {
            "learning_rate": 0.1,
            "feature_fraction": 1.0,
            "bagging_fraction": 1.0,
            "num_leaves": 31,
            "min_data_in_leaf": 20,
            "extra_trees": False,
            "lambda_l1": 1e-5,
            "lambda_l2": 1e-5,
        },
    ),
    Booster(
        "XGBoost",
        "xgboost",
        lambda module, seed: module.XGBClassifier(random_state=seed, n_jobs=1),
        {"early_stopping_rounds": PATIENCE},
        lambda model: int(model.best_iteration) + 1,
        _xgboost_space,
        {
            "learning_rate": 0.1,
            "max_depth": 6,
            "min_child_weight": 1.0,
            "subsample": 1.0,
            "colsample_bylevel": 1.0,
            "colsample_bynode": 1.0,
            "reg_alpha": 1e-4,
            "reg_lambda": 1.0,
            "grow_policy": "depthwise",
            "max_leaves": 1024,
        },
    ),
    Booster(
        "CatBoost",
        "catboost",
        lambda module, seed: module.CatBoostClassifier(
            random_seed=seed, thread_count=1, verbose=False, allow_writing_files=False
        ),
        {"early_stopping_rounds": PATIENCE},
        lambda model: int(model.get_best_iteration()) + 1,
        _catboost_space,
        {
            "learning_rate": 0.05,
            "subsample": 0.8,
            "grow_policy": "SymmetricTree",
            "depth": 6,
            "colsample_bylevel": 1.0,
            "l2_leaf_reg": 3.0,
            "leaf_estimation_iterations": 1,
        },
    ),
)

METHODS: dict[str, Method] = {
    **{f"{booster.title} default": _quiet(booster.default) for booster in BOOSTERS},
    **{f"{booster.title} tuned": _quiet(booster.tuned) for booster in BOOSTERS},
}
