"""The options of a search, and the checks that need no table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from tune_steel.budget import Budget
from tune_steel.errors import OptionError, RunError
from tune_steel.splits import check_split
from tune_steel.tasks import STEEL_TASKS

_MOST_FOLDS = 20
_LEAST_SHARE = 0.01
_LEAST_MEMORY, _MOST_MEMORY = 50_000_000, 10**18
_MOST_SECONDS = 10 * 365 * 86_400
_MOST = 10**9
_UNITS = {"h": 3600, "m": 60, "s": 1}
_CHANGED_AT_WILL = frozenset(["max_failures", "address", "data", "space", "source", "profile"])
"""What a resumed run may be given anew; of data and space, only the place may be another."""


_OPTIONS = {"tries": "try"}


def parse_duration(name: str, text: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `1h30m`.

    Raises:
        OptionError: Something else, nothing above 0, or more than ten years.
    """
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        numbers = parts.groups() if parts else ()
        seconds = sum(
            float(n) * unit for n, unit in zip(numbers, _UNITS.values(), strict=False) if n
        )
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _MOST_SECONDS:
        raise OptionError(f"{name} {text}: allowed are times like 90s, 10m or 1h30m")
    return seconds


def parse_memory(name: str, text: str) -> int:
    """Bytes of `500MB`, `2GiB`.

    Raises:
        OptionError: Something else, less than torch can live with, or more than there is.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if not _LEAST_MEMORY <= size <= _MOST_MEMORY:
        raise OptionError(f"{name} {text}: allowed are sizes from 50MB, like 500MB or 2GB")
    return size


def default_grace_period(max_epochs: int) -> int:
    """A ninth of the epochs: with less, ASHA stops slow starters that would have won."""
    return max(1, math.ceil(max_epochs / 9))


@dataclass(frozen=True)
class Resources:
    """What a trial takes.

    Attributes:
        cpus_per_trial: CPUs, and threads.
        gpus_per_trial: GPUs.
        concurrency: Trials at once; None is as many as there are CPUs for.
        memory: Bytes that a trial may allocate; None is no limit.
        epoch_timeout: Seconds that an epoch may take before the worker is given up.
    """

    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int | None
    memory: int | None = None
    epoch_timeout: float = 900.0

    @property
    def threads(self) -> int:
        """Threads of torch in a trial."""
        return max(1, int(self.cpus_per_trial))


@dataclass(frozen=True)
class Options:
    """What a search was asked for; `search.py` says what each option means."""

    task: str | None
    budget: Budget
    data: Path | None
    target: str | None
    openml_id: int | None
    source: Literal["auto", "openml", "stand-in"]
    folds: int
    split: tuple[float, float, float] | None
    space: Path | None
    max_epochs: int
    grace_period: int
    reduction_factor: int
    scheduler: Literal["asha", "median", "none"]
    search: Literal["tpe", "random", "gp", "grid"]
    resources: Resources
    max_failures: int
    warm_start: tuple[Path, ...]
    tries: tuple[str, ...]
    threshold: Literal["none", "balanced", "f1"]
    seed: int
    output: Path
    address: str | None
    dry_run: bool
    profile: bool

    def check(self) -> None:
        """Raises OptionError at the first impossible value."""
        own = self.target is not None or self.openml_id is not None
        if self.task is None and not own:
            raise OptionError(
                f"--task is missing; give one of {', '.join(STEEL_TASKS)}, or a table of your own "
                "with --data FILE --target COLUMN"
            )
        if self.task is not None and self.task not in STEEL_TASKS:
            raise OptionError(f"--task {self.task}: unknown; allowed: {', '.join(STEEL_TASKS)}")
        if self.task is not None and own:
            raise OptionError(
                "--task names a task of the Steel Plates Faults table, --target and --openml-id a "
                "table of your own; give one of the two"
            )
        if self.target is not None and self.data is None and self.openml_id is None:
            raise OptionError("--target needs its table: add --data FILE or --openml-id N")
        if self.search == "grid" and (self.tries or self.warm_start):
            raise OptionError(
                "--search grid tries every config of the space; leave --try and --warm-start out"
            )
        if own and self.source != "auto":
            raise OptionError("--source is for the Steel Plates Faults table; leave it out")
        if self.data is not None and self.openml_id is not None:
            raise OptionError("--data and --openml-id are two tables; give one of them")
        budget = self.budget
        self._at_least("--samples", budget.samples, 1)
        for name, value in (
            ("--epochs-budget", budget.epochs),
            ("--until-stalled", budget.stalled),
            ("--give-up-after", budget.give_up_after),
        ):
            if value is not None:
                self._at_least(name, value, 1)
        self._at_least("--max-failures", self.max_failures, 0)
        self._at_least("--max-epochs", self.max_epochs, 1)
        self._at_least("--reduction-factor", self.reduction_factor, 2)
        self._at_least("--seed", self.seed, 0, most=2**63 - 1)
        resources = self.resources
        if resources.concurrency is not None:
            self._at_least("--concurrency", resources.concurrency, 1)
        if not 1 <= self.folds <= _MOST_FOLDS:
            raise OptionError(
                f"--folds {self.folds}: allowed are 1 (a plain split) to {_MOST_FOLDS}"
            )
        if not 1 <= self.grace_period <= self.max_epochs:
            raise OptionError(
                f"--grace-period {self.grace_period}: allowed are 1 to --max-epochs "
                f"({self.max_epochs})"
            )
        for name, amount in (
            ("--cpus-per-trial", resources.cpus_per_trial),
            ("--gpus-per-trial", resources.gpus_per_trial),
        ):
            part = _LEAST_SHARE <= amount <= 1
            if not (
                part
                or (amount >= 1 and amount.is_integer())
                or (amount == 0 and name == "--gpus-per-trial")
            ):
                raise OptionError(
                    f"{name} {amount:g}: a whole number or a share from {_LEAST_SHARE} to 1"
                )
        if self.split is not None:
            check_split(self.split)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `run.json`; files by their full path, so they are found again."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """The options that `as_dict` wrote.

        Raises:
            RunError: Another version of this project wrote them.
        """
        try:
            paths = {key: values[key] and Path(values[key]) for key in ("data", "space")}
            return cls(
                **{
                    **values,
                    **paths,
                    "output": Path(values["output"]),
                    "budget": Budget(**values["budget"]),
                    "resources": Resources(**values["resources"]),
                    "split": values["split"] and tuple(values["split"]),
                    "warm_start": tuple(Path(path) for path in values["warm_start"]),
                    "tries": tuple(values["tries"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise RunError(
                f"the run's options are those of another version of tune_steel ({error}); resume "
                "it with that version, or begin a new run with --warm-start and its trials.parquet"
            ) from None

    def resumed(
        self,
        others: Mapping[str, Any],
        budget: Mapping[str, Any],
        resources: Mapping[str, Any],
    ) -> Options:
        """These options of a run, with those that its resumption was given.

        Samples and what a trial takes are the run's where they are not given; the other budgets
        are of one process, so that a run that used one up goes on.

        Args:
            others: Options that are given anew, by attribute.
            budget: Attributes of the budget that are given anew.
            resources: Attributes of the resources that are given anew.

        Raises:
            OptionError: One that would make it another run.
        """
        for key, value in others.items():
            if key not in _CHANGED_AT_WILL and _plain(value) != _plain(getattr(self, key)):
                raise OptionError(
                    f"--{_OPTIONS.get(key, key).replace('_', '-')} {_said(value)}: the run that "
                    f"is resumed has {_said(getattr(self, key))}; leave the option out, or begin "
                    "a new run"
                )
        kept = {"samples": self.budget.samples, "give_up_after": self.budget.give_up_after}
        return replace(
            self,
            **others,
            budget=Budget(**{**kept, **budget}),
            resources=replace(self.resources, **resources),
        )

    @staticmethod
    def _at_least(name: str, value: int, least: int, most: int = _MOST) -> None:
        if value < least:
            raise OptionError(f"{name} {value}: must be at least {least}")
        if value > most:
            raise OptionError(f"{name} {value}: must be at most {most}")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
