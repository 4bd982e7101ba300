"""The options of a search, and the checks that need no table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tune_steel.errors import OptionError
from tune_steel.splits import check_split
from tune_steel.tasks import STEEL_TASKS

_MOST_FOLDS = 20
_LEAST_SHARE = 0.01


def default_grace_period(max_epochs: int) -> int:
    """A ninth of the epochs: with less, ASHA stops slow starters that would have won."""
    return max(1, math.ceil(max_epochs / 9))


@dataclass(frozen=True)
class Resources:
    """What a trial takes and how many run at once (None: as many as there are CPUs for)."""

    cpus_per_trial: float
    gpus_per_trial: float
    concurrency: int | None

    @property
    def threads(self) -> int:
        """Threads of torch in a trial."""
        return max(1, int(self.cpus_per_trial))


@dataclass(frozen=True)
class Options:
    """What a search was asked for; `search.py` says what each option means."""

    task: str | None
    samples: int
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
    resources: Resources
    seed: int
    output: Path
    address: str | None
    dry_run: bool

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
        if own and self.source != "auto":
            raise OptionError("--source is for the Steel Plates Faults table; leave it out")
        if self.data is not None and self.openml_id is not None:
            raise OptionError("--data and --openml-id are two tables; give one of them")
        self._at_least("--samples", self.samples, 1)
        self._at_least("--max-epochs", self.max_epochs, 1)
        self._at_least("--reduction-factor", self.reduction_factor, 2)
        self._at_least("--seed", self.seed, 0)
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

    @staticmethod
    def _at_least(name: str, value: int, least: int) -> None:
        if value < least:
            raise OptionError(f"{name} {value}: must be at least {least}")
