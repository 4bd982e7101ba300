"""The Optuna study behind Ray Tune: ask for a config, report each epoch, tell how it ended.

Ray's own OptunaSearch tells every stopped trial as COMPLETE with its last value and leaves a
trial with a NaN running for ever; this one tells PRUNED and FAIL, and keeps every epoch.
"""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from tune_steel.config import TrialConfig
from tune_steel.errors import SpaceError
from tune_steel.scheduler import METRIC
from tune_steel.seeds import derive
from tune_steel.space import Params, Space

_EPOCH_KEYS = frozenset(
    [
        *("epoch", "train_loss", "fold_val_loss", METRIC, "best_epoch", "learning_rate"),
        *("seconds", "node"),
    ]
)


@dataclass
class TrialRecord:
    """What is known of a trial, in plain values.

    Attributes:
        number: Its number in the study; 0 is the space's default.
        seed: Its seed.
        params: Its sampled parameters, the active ones.
        config: Its whole config.
        state: `RUNNING`, then `COMPLETE`, `PRUNED`, `FAIL` or `INTERRUPTED`.
        epochs: The reported row of each epoch, in order.
        error: What it raised.
        seconds: Wall time in its worker.
    """

    number: int
    seed: int
    params: Params
    config: TrialConfig
    state: str = "RUNNING"
    epochs: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best epoch; None before the first epoch."""
        return self.epochs[self.epochs[-1]["best_epoch"] - 1] if self.epochs else None


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE at Optuna 5's defaults: multivariate, running trials count as bad ones."""
    return optuna.samplers.TPESampler(seed=derive(seed, "sampler"))


def open_study(journal: Path, name: str, seed: int) -> optuna.Study:
    """Opens or makes the study in a run's journal."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = JournalFileBackend(str(journal))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=name,
        direction="minimize",
        sampler=make_sampler(seed),
        load_if_exists=True,
    )


def ask(study: optuna.Study, space: Space, seed: int) -> tuple[optuna.Trial, TrialRecord]:
    """Samples the next trial of a study.

    Args:
        study: The study.
        space: What to sample.
        seed: Seed of the run; the trial's own is derived from it and the trial's number.
    """
    trial = study.ask()
    params = space.suggest(trial)
    trial_seed = derive(seed, "trial", trial.number)
    try:
        config = space.config(params)
    except SpaceError:
        study.tell(trial, state=TrialState.FAIL)  # before the mistake ends the search
        raise
    return trial, TrialRecord(trial.number, trial_seed, params, config)


class StudySearcher(Searcher):
    """Ray Tune's searcher interface over an Optuna study.

    Attributes:
        records: Every trial, in the order they were asked for.
    """

    def __init__(self, space: Space, study: optuna.Study, seed: int, max_epochs: int) -> None:
        """Puts the space's default first.

        Args:
            space: What to sample.
            study: Where trials are kept.
            seed: Seed of the run.
            max_epochs: Epochs after which a trial is complete.
        """
        super().__init__(metric=METRIC, mode="min")
        self._space = space
        self._study = study
        self._seed = seed
        self._max_epochs = max_epochs
        self._asked: dict[str, tuple[optuna.Trial, TrialRecord]] = {}
        self.records: list[TrialRecord] = []
        study.enqueue_trial(space.defaults())

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Samples the next trial: its number, its seed and its config."""
        trial, record = ask(self._study, self._space, self._seed)
        self._asked[trial_id] = (trial, record)
        self.records.append(record)
        return {
            "number": record.number,
            "seed": record.seed,
            "config": record.config.as_dict(),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keeps an epoch and reports its running best to the study."""
        trial, record = self._asked[trial_id]
        self._keep(trial, record, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the study how a trial ended.

        Tune brings the result that a scheduler stops on only here. Of a trial that raised, the
        reason comes next, through `ErrorKeeper`.
        """
        trial, record = self._asked[trial_id]
        if error or record.state != "RUNNING":
            return
        if result is None or "epoch" not in result:
            self._end(trial, record, "INTERRUPTED", "the search ended before the first epoch")
            return
        self._keep(trial, record, result)
        at_its_end = result["converged"] or result["epoch"] >= self._max_epochs
        self._end(trial, record, "COMPLETE" if at_its_end else "PRUNED")

    def fail(self, trial_id: str, reason: str) -> None:
        """Tells the study that a trial raised, and why."""
        trial, record = self._asked[trial_id]
        self._end(trial, record, "FAIL", reason)

    def close(self) -> None:
        """Ends what is still running as INTERRUPTED: no trial stays RUNNING in the study."""
        for trial, record in self._asked.values():
            if record.state == "RUNNING":
                self._end(trial, record, "INTERRUPTED", "the search ended first")

    def _keep(self, trial: optuna.Trial, record: TrialRecord, result: dict[str, Any]) -> None:
        epoch = result["epoch"]
        if epoch != len(record.epochs) + 1:
            return  # Tune brings the last result twice
        row = {k: v for k, v in result.items() if k in _EPOCH_KEYS or k.startswith("val_")}
        record.epochs.append(row)
        record.seconds = float(result["time_total_s"])
        trial.report(result[METRIC], epoch)

    def _end(
        self, trial: optuna.Trial, record: TrialRecord, state: str, reason: str | None = None
    ) -> None:
        record.state, record.error = state, reason
        best = record.best
        attributes = {
            "seed": record.seed,
            "config": record.config.as_dict(),
            "seconds": record.seconds,
            "best_epoch": best["epoch"] if best else None,
            "node": best["node"] if best else None,
            "error": reason,
        }
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if state == "COMPLETE":
            assert best is not None
            self._study.tell(trial, best[METRIC])
        else:
            self._study.tell(
                trial, state=TrialState.PRUNED if state == "PRUNED" else TrialState.FAIL
            )

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal is the source of truth."""
        Path(checkpoint_path).write_text(json.dumps({"trials": len(self.records)}))

    def restore(self, checkpoint_path: str) -> None:
        """Tune's own restore is not used."""
        raise NotImplementedError


class ErrorKeeper(Callback):
    """Brings the reason of a failure to the searcher, which Tune tells only that it failed."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Called by Tune after the searcher's `on_trial_complete(error=True)`."""
        self._searcher.fail(trial.trial_id, _reason(trial))


def _reason(trial: Trial) -> str:
    name = trial.run_metadata.pickled_error_filename
    if name is None or trial.local_path is None:
        return "the trial failed and left no error"
    try:
        with (Path(trial.local_path) / name).open("rb") as file:
            error = cloudpickle.load(file)
    except Exception as unreadable:  # an exception of the trial that cannot be unpickled here
        return f"the trial failed; its error cannot be read ({unreadable})"
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
