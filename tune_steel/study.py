"""The Optuna study of a run: the source of truth, from which a killed run goes on.

All that a trial gave is in the journal before the trial is told to have ended, so it is either
finished with all its epochs or still RUNNING, and then its config is tried again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from tune_steel.config import TrialConfig
from tune_steel.errors import RunError, SpaceError
from tune_steel.journal import Storage, together
from tune_steel.samplers import SearchName, make_sampler
from tune_steel.seeds import derive
from tune_steel.space import Params, Space

METRIC = "best_val_loss"
"""What schedulers, samplers and the final choice read: the lowest validation loss so far."""

SCORED = ("COMPLETE", "PRUNED")
"""States of trials that have a loss."""

ENDED = (*SCORED, "FAIL")
"""States of a trial that used up one of the samples; the config of any other is tried again."""

Report: TypeAlias = tuple[optuna.Trial, int, float]
"""A trial, an epoch that it ended, and its lowest loss then."""


@dataclass
class TrialRecord:
    """What is known of a trial, in plain values.

    Attributes:
        number: Its number in the study.
        slot: How many configs were sampled before its own; a trial that tries a config again has
            the slot, and so the seed, of the first try. Slot 0 is the space's default.
        seed: Its seed.
        params: Its sampled parameters, the active ones.
        config: Its whole config.
        retry_of: The trial whose config it tries again.
        state: `RUNNING`, then `COMPLETE` (ran to its end), `PRUNED` (stopped by the scheduler),
            `FAIL` (raised), `LOST` (its worker died) or `INTERRUPTED` (the search ended first).
        epochs: The reported row of each epoch, in order.
        error: What it raised.
        seconds: Wall time in its worker.
        ended: When it ended, in Unix seconds.
    """

    number: int
    slot: int
    seed: int
    params: Params
    config: TrialConfig
    retry_of: int | None = None
    state: str = "RUNNING"
    epochs: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    ended: float | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best epoch; None before the first epoch."""
        return self.epochs[self.epochs[-1]["best_epoch"] - 1] if self.epochs else None


@contextmanager
def run_lock(journal: Path) -> Iterator[None]:
    """Holds a run's journal, which is made where there is none, for this process alone.

    The lock is the kernel's, on the open file: a process that dies does not hold it.

    Raises:
        RunError: Another process holds it.
    """
    file = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{journal.parent}: another process is running this search; wait until it has "
                "ended, or stop it"
            ) from None
        yield
    finally:
        os.close(file)


def heal_journal(journal: Path, original: Path | None = None) -> str | None:
    """Makes a journal readable that its writer did not finish; returns what was done.

    A last line without its end is what a full disk or a power cut leaves: it was never told to
    anybody, so it goes. The lock of Optuna's own that a killed process left would be waited for.

    Args:
        journal: The file.
        original: What it is a copy of, if it is one.

    Raises:
        RunError: A line is no operation in JSON; what came after it may depend on it.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    whole = 0
    with journal.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            if not _is_operation(line):
                raise RunError(
                    f"{original or journal}: line {number} is damaged, so the trials after it "
                    "cannot be trusted; put a backup of the file in its place, or begin a new run "
                    "with --warm-start and this run's trials.parquet"
                )
            whole += len(line)
    lost = journal.stat().st_size - whole
    if not lost:
        return None
    os.truncate(journal, whole)
    return f"the last line of {journal.name} was cut off in the middle and has been removed"


def _is_operation(line: bytes) -> bool:
    try:
        return "op_code" in dict(json.loads(line))
    except (TypeError, ValueError):
        return False


def open_study(journal: Path, name: str) -> optuna.Study:
    """Opens or makes the study in a run's journal."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(
        storage=Storage(journal),
        study_name=name,
        direction="minimize",
        load_if_exists=True,
    )


def copy_of_study(journal: Path, name: str) -> optuna.Study:
    """A study of another run, read without writing to its journal.

    Raises:
        RunError: There is none.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch) / "study.journal"
        try:
            shutil.copyfile(journal, copied)
            heal_journal(copied, journal)
            storage = Storage(copied)
            found = optuna.load_study(study_name=name, storage=storage)
        except (OSError, KeyError) as error:
            raise RunError(f"{journal}: it has no study of the run ({error})") from None
        out = optuna.create_study(study_name=name, direction="minimize")
        out.add_trials(found.get_trials(deepcopy=False))
    return out


def begin(
    study: optuna.Study, first: Sequence[Params], earlier: Sequence[FrozenTrial] = ()
) -> None:
    """Puts into a new study what it begins with.

    Args:
        study: An empty one.
        first: Configs of its first slots. They are queued one by one, when their turn comes: a
            config that is tried again then comes before those that were not tried yet, as it would
            have without the fault.
        earlier: Trials of other runs that inform the sampler.
    """
    with together(study, durable=True):
        study.add_trials(earlier)
        study.set_user_attr("first", list(first))


def has_begun(study: optuna.Study) -> bool:
    """Whether it was given what it begins with."""
    return "first" in study.user_attrs


def enqueue(study: optuna.Study, params: Params, slot: int, retry_of: int | None = None) -> None:
    """Queues a config for one of the next trials."""
    attributes = {"slot": slot} | ({} if retry_of is None else {"retry_of": retry_of})
    study.enqueue_trial(params, user_attrs=attributes)


def enqueue_again(study: optuna.Study, number: int, slot: int, params: Params) -> None:
    """Queues the config of a trial that ended through no fault of its own, once."""
    if all(t.user_attrs.get("retry_of") != number for t in study.get_trials(deepcopy=False)):
        enqueue(study, params, slot, retry_of=number)


def reclaim(study: optuna.Study, space: Space) -> int:
    """Queues again what an ended process left unfinished; returns how many trials are queued.

    A trial that died before all its parameters were sampled is sampled again, unless its config
    was given.
    """
    with together(study, durable=True):
        return _reclaim(study, space)


def _reclaim(study: optuna.Study, space: Space) -> int:
    for trial in study.get_trials(deepcopy=False):
        slot = trial.user_attrs.get("slot")
        running = trial.state == TrialState.RUNNING
        if not running and trial.user_attrs.get("state") != "INTERRUPTED":
            continue
        if slot is not None:  # without one, it died before it had anything
            given = trial.system_attrs.get("fixed_params") or {}
            params = trial.params if _whole(trial, space) else given
            enqueue_again(study, trial.number, slot, params)
        if running:
            study._storage.set_trial_user_attr(trial._trial_id, "state", "INTERRUPTED")
            study._storage.set_trial_user_attr(trial._trial_id, "error", "the process was killed")
            study.tell(trial.number, state=TrialState.FAIL)
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return sum("retry_of" in trial.user_attrs for trial in waiting)


def _whole(trial: FrozenTrial, space: Space) -> bool:
    try:
        return space.sample(lambda leaf: trial.params[leaf.key]) == trial.params
    except KeyError:
        return False


def next_slot(study: optuna.Study) -> int:
    """The slot of the next config that is sampled."""
    for trial in reversed(study.get_trials(deepcopy=False)):
        attributes = trial.user_attrs
        # Slots rise with the trials, but for those that try a config again.
        if "slot" in attributes and "retry_of" not in attributes:
            return int(attributes["slot"]) + 1
    return 0


def ask(
    study: optuna.Study,
    space: Space,
    search: SearchName,
    seed: int,
    fixed: Mapping[int, Params] | None = None,
) -> tuple[optuna.Trial, TrialRecord]:
    """Takes the next config of the queue, or samples one; a power cut may undo it.

    Args:
        study: The study.
        space: What to sample.
        search: How to sample.
        seed: Seed of the run; the trial's own is derived from it and the slot.
        fixed: The configs of a grid by slot.

    Raises:
        SpaceError: What was sampled is no valid config.
    """
    # The Gaussian process thinks for seconds, in a thread of its own: nobody should wait for it.
    with nullcontext() if search == "gp" else together(study, durable=False):
        return _ask(study, space, search, seed, fixed)


def _ask(
    study: optuna.Study,
    space: Space,
    search: SearchName,
    seed: int,
    fixed: Mapping[int, Params] | None,
) -> tuple[optuna.Trial, TrialRecord]:
    queue = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    slot: int = queue[0].user_attrs["slot"] if queue else next_slot(study)
    if not queue:
        upcoming = fixed or dict(enumerate(study.user_attrs.get("first", ())))
        if slot in upcoming:
            enqueue(study, upcoming[slot], slot)
            queue = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    given = bool(queue and queue[0].system_attrs.get("fixed_params"))
    # A sampler of a whole config would think in vain about one that is given.
    study.sampler = make_sampler("random" if given else search, seed, slot)
    trial = study.ask()
    # While it was thought about a new one, a config may have been queued again: it keeps its slot.
    slot = trial.user_attrs.get("slot", slot)
    trial.set_user_attr("slot", slot)
    params = space.suggest(trial)
    try:
        config = space.config(params)
    except SpaceError:
        study.tell(trial, state=TrialState.FAIL)  # before the mistake ends the search
        raise
    trial_seed = derive(seed, "trial", slot)
    retry_of = trial.user_attrs.get("retry_of")
    return trial, TrialRecord(trial.number, slot, trial_seed, params, config, retry_of)


def report(study: optuna.Study, reports: Iterable[Report]) -> None:
    """Stores lowest losses so far; a power cut may undo it, but `tell` says the curve again."""
    with together(study, durable=False):
        for trial, epoch, loss in reports:
            trial.report(loss, epoch)


def tell(
    study: optuna.Study, trial: optuna.Trial, record: TrialRecord, reports: Iterable[Report] = ()
) -> None:
    """Stores all that a trial gave and how it ended, and before it some reports."""
    best = record.best
    config = record.config.as_dict()
    attributes = {
        "seed": record.seed,
        "config": config,
        "config_hash": config_hash(config),
        "seconds": record.seconds,
        "best_epoch": best["epoch"] if best else None,
        "node": best["node"] if best else None,
        "state": record.state,
        "error": record.error,
        "ended": record.ended,
        "curve": _columns(record.epochs),
    }
    with together(study, durable=True):
        for reporting, epoch, loss in reports:
            reporting.report(loss, epoch)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if record.state == "COMPLETE":
            assert best is not None
            study.tell(trial, best[METRIC])
        else:
            pruned = record.state == "PRUNED"
            study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, its first 16 hexadecimal digits."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(study: optuna.Study, space: Space, seed: int) -> list[TrialRecord]:
    """The records of all trials of this run that have ended, by number."""
    out = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        if not trial.state.is_finished() or "slot" not in attributes:
            continue  # not begun, or of an earlier run
        if not _whole(trial, space):
            continue  # killed before it was sampled
        curve = attributes.get("curve", {})
        out.append(
            TrialRecord(
                number=trial.number,
                slot=attributes["slot"],
                seed=derive(seed, "trial", attributes["slot"]),
                params=dict(trial.params),
                config=space.config(trial.params),
                retry_of=attributes.get("retry_of"),
                state=attributes["state"],
                epochs=_rows(curve),
                error=attributes.get("error"),
                seconds=attributes.get("seconds", 0.0),
                ended=attributes.get("ended"),
            )
        )
    return out


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    each = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in each]


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else {})}
