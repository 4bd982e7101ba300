"""Ray Tune's searcher interface over the study: suggest a config, report, tell how a trial ended.

Ray's own OptunaSearch tells every stopped trial as COMPLETE with its last value, leaves a trial
with a NaN or at the end of a time budget running for ever, and cannot go on with its study after
a kill; this one tells PRUNED and FAIL, keeps every epoch, and goes on.
"""

from __future__ import annotations

import tune_steel.ray_environment  # noqa: F401

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from tune_steel.budget import Budget, Stop
from tune_steel.profile import Times
from tune_steel.samplers import SearchName, grid
from tune_steel.space import Space
from tune_steel.study import (
    ENDED,
    METRIC,
    Report,
    TrialRecord,
    ask,
    enqueue_again,
    read_records,
    reclaim,
    report,
    tell,
)

# Of an epoch that is written alone, two thirds of the time are the journal's lock and its file.
_SECONDS_BETWEEN_REPORTS = 0.5

_EPOCH_KEYS = frozenset(
    [
        *("epoch", "train_loss", "fold_val_loss", METRIC, "best_epoch", "learning_rate"),
        *("seconds", "node"),
    ]
)


class StudySearcher(Searcher):
    """Ray Tune's searcher interface over an Optuna study.

    Attributes:
        records: Every trial that has begun, by number, those of an earlier process included.
        stop: Whether and why the search ends.
        samples: Trials that it ends with, at most.
        ended: Trials that have ended and count.
        queued: Trials of an earlier process whose configs are tried again.
        background: Samples in a thread, so that a slow sampler does not keep the reports of
            other trials waiting.
        unwritable: Whether the journal could not be written.
        times: Where the time went.
    """

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        *,
        search: SearchName,
        seed: int,
        max_epochs: int,
        budget: Budget,
        max_failures: int = 0,
    ) -> None:
        """Takes over what the study holds.

        Args:
            space: What to sample.
            study: Where trials are kept.
            search: How to sample.
            seed: Seed of the run.
            max_epochs: Epochs after which a trial is complete.
            budget: When to end.
            max_failures: How often a config is tried again when its worker dies.

        Raises:
            OptionError: A grid of an endless space.
        """
        super().__init__(metric=METRIC, mode="min")
        self._space = space
        self._study = study
        self._search = search
        self._seed = seed
        self._max_epochs = max_epochs
        self._max_failures = max_failures
        self._grid = dict(enumerate(grid(space, seed))) if search == "grid" else None
        self.samples = min(budget.samples, len(self._grid or range(budget.samples)))
        self.stop = Stop(budget)
        self.times = Times()
        self.queued = reclaim(study, space)
        self.records = read_records(study, space, seed)
        self._order = sorted(
            (r for r in self.records if r.state != "INTERRUPTED"), key=lambda r: r.ended or 0.0
        )
        self._earlier = len(self._order)
        self.ended = sum(r.state in ENDED for r in self.records)
        self._epochs = 0
        self._reports: list[Report] = []
        self._reported = 0.0
        self._asked: dict[str, tuple[optuna.Trial, TrialRecord]] = {}
        self._running = 0
        self.background = False
        self._thread: ThreadPoolExecutor | None = None
        self.unwritable = False
        self._asking: Future[tuple[optuna.Trial, TrialRecord]] | None = None

    def suggest(self, trial_id: str) -> Any:
        """The next trial: its number, slot, seed and config; None while there is none yet."""
        if self.stop.reason is not None or self.ended >= self.samples:
            return Searcher.FINISHED
        if self.ended + self._running >= self.samples:
            return None  # should a worker die, its config is tried again
        asked = self._guarded(self._ask)
        if asked is None:
            return None
        self._asked[trial_id] = asked
        record = asked[1]
        self.records.append(record)
        self._running += 1
        return {
            "number": record.number,
            "slot": record.slot,
            "seed": record.seed,
            "config": record.config.as_dict(),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keeps an epoch, and reports its running best to the study soon."""
        trial, record = self._asked[trial_id]
        self._keep(trial, record, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the study how a trial ended.

        Tune brings the result that a scheduler stops on only here. Of a trial that failed, the
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

    def fail(self, trial_id: str, reason: str, *, lost: bool) -> None:
        """Tells the study that a trial failed, and why.

        Args:
            trial_id: Tune's name of the trial.
            reason: What it raised, or what became of its worker.
            lost: Whether its worker died, which is no fault of the config: it is tried again.
        """
        trial, record = self._asked[trial_id]
        if record.state != "RUNNING":
            return
        tries = sum(r.slot == record.slot and r.state == "LOST" for r in self.records)
        if lost and tries < self._max_failures:
            self._guarded(
                lambda: enqueue_again(self._study, record.number, record.slot, record.params)
            )
            self._end(trial, record, "LOST", reason)
        else:
            again = f" ({tries + 1} times)" if lost and tries else ""
            self._end(trial, record, "FAIL", reason + again)

    def close(self) -> None:
        """Ends what is still running as INTERRUPTED: no trial stays RUNNING in the study."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._asking is not None and self._asking.exception() is None:
            trial, record = self._asking.result()
            self._end(trial, record, "INTERRUPTED", "the search ended before it began")
        for trial, record in self._asked.values():
            if record.state == "RUNNING":
                self._end(trial, record, "INTERRUPTED", "the search ended first")

    def _ask(self) -> tuple[optuna.Trial, TrialRecord] | None:
        def now() -> tuple[optuna.Trial, TrialRecord]:
            with self.times.measure("sampling"):
                return ask(self._study, self._space, self._search, self._seed, self._grid)

        if not self.background:
            return now()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
        if self._asking is None:
            self._asking = self._thread.submit(now)
        if not self._asking.done():
            return None
        asking, self._asking = self._asking, None
        return asking.result()

    def _keep(self, trial: optuna.Trial, record: TrialRecord, result: dict[str, Any]) -> None:
        epoch = result["epoch"]
        if epoch != len(record.epochs) + 1:
            return  # Tune brings the last result twice
        row = {k: v for k, v in result.items() if k in _EPOCH_KEYS or k.startswith("val_")}
        record.epochs.append(row)
        record.seconds = float(result["time_total_s"])
        self._epochs += 1
        self.times.add_epoch(result)
        self._reports.append((trial, epoch, result[METRIC]))
        if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
            with self.times.measure("reporting"):
                self._guarded(lambda: report(self._study, self._taken_reports()))
        self.stop.check_epochs(self._epochs)

    def _end(
        self, trial: optuna.Trial, record: TrialRecord, state: str, reason: str | None = None
    ) -> None:
        record.state, record.error, record.ended = state, reason, time.time()
        self._running -= 1
        self.ended += state in ENDED
        with self.times.measure("reporting"):
            self._guarded(lambda: tell(self._study, trial, record, self._taken_reports()))
        if state != "INTERRUPTED":
            self._order.append(record)
            self.stop.check_trials(self._order, self._earlier)

    def _taken_reports(self) -> list[Report]:
        """The epochs that the study does not know yet."""
        self._reported = time.monotonic()
        reports, self._reports = self._reports, []
        return reports

    def _guarded(self, write: Callable[[], Any]) -> Any:
        """Writes to the study, unless it could not be written before: then the search ends.

        A line that was cut off is removed when the run is resumed, so nothing may follow it.
        """
        if self.unwritable:
            return None
        try:
            with self.stop.writing():
                return write()
        except OSError as error:
            self.unwritable = True
            self.stop.end(
                f"study.journal cannot be written ({error.strerror})",
                now=True,
                failed=True,
            )
            return None

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal is the source of truth."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Tune's own restore is not used."""
        raise NotImplementedError


class StopWhenTold(Stopper):
    """Lets Tune end all trials when the search is to end at once."""

    def __init__(self, stop: Stop, check: Callable[[], None]) -> None:
        self._stop = stop
        self._check = check

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Asked at every turn of Tune's loop, at most 0.1 s apart."""
        self._check()
        self._stop.check_time()
        return self._stop.now


class ErrorKeeper(Callback):
    """Brings the reason of a failure to the searcher, which Tune tells only that it failed.

    It also lets Tune forget its statistics of ended trials, half of what a trial costs in memory.
    """

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Called by Tune after the searcher's `on_trial_complete(error=True)`."""
        reason, lost = _reason(trial)
        self._searcher.fail(trial.trial_id, reason, lost=lost)
        _forget(trial)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Called by Tune after the searcher's."""
        _forget(trial)


def _forget(trial: Trial) -> None:
    """Drops averages of every metric over the last results, which nobody reads."""
    trial.run_metadata.metric_analysis.clear()
    trial.run_metadata.metric_n_steps.clear()


def _reason(trial: Trial) -> tuple[str, bool]:
    """What a trial failed with, and whether its worker or node died."""
    name = trial.run_metadata.pickled_error_filename
    if name is None or trial.local_path is None:
        return "the trial failed and left no error", True
    try:
        with (Path(trial.local_path) / name).open("rb") as file:
            error = cloudpickle.load(file)
    except Exception as unreadable:  # an exception of the trial that cannot be unpickled here
        return f"the trial failed; its error cannot be read ({unreadable})", False
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}", False
    first_line = (str(error).strip().splitlines() or [""])[0]
    why = "an epoch above --epoch-timeout, no memory left (--memory), or a lost node?"
    return f"{type(error).__name__}: {first_line} ({why})", True
