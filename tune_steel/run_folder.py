"""A run's folder: `run.json`, which is what it takes to repeat the run, and the tables."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_steel import tables
from tune_steel.errors import OptionError
from tune_steel.options import Options
from tune_steel.splits import split_hash

if TYPE_CHECKING:
    from tune_steel.evaluate import Evaluation
    from tune_steel.problem import Problem
    from tune_steel.searcher import TrialRecord


_PACKAGES = (
    *("tune-steel", "torch", "torchmetrics", "numpy", "pandas", "pyarrow", "ray", "optuna"),
    *("openml", "scikit-learn", "scipy", "pydantic", "safetensors"),
)


def make_folder(output: Path, name: str) -> Path:
    """Makes `output/<name>-<UTC time>`.

    Raises:
        OptionError: It cannot be made or written.
    """
    stem = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = output / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder.resolve()
    except OSError as error:
        raise OptionError(
            f"--output {output}: no folder can be made there ({error.strerror}); "
            "name one that you may write to"
        ) from None
    raise OptionError(f"--output {output}: {stem} is there a thousand times; name another folder")


class RunFolder:
    """Writes what a run gives, each file whole or not at all.

    Attributes:
        path: The folder.
        record: What `run.json` holds; `write_record` writes it.
    """

    def __init__(self, path: Path, options: Options, problem: Problem) -> None:
        """Fills the record with everything that is known before the search."""
        self.path = path
        self._problem = problem
        self._columns = {
            "run": path.name,
            "task": problem.task.name,
            "data_source": problem.table.source,
        }
        splits, task = problem.splits, problem.task
        self.record: dict[str, Any] = {
            **self._columns,
            "state": "searching",
            "command": ["python", "-m", "tune_steel.search", *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in asdict(options).items()
            },
            "data": {
                "name": problem.table.name,
                "source": problem.table.source,
                "rows": len(problem.table.frame),
                "content_hash": problem.table.content_hash,
            },
            "classes": list(task.classes),
            "reference_weights": problem.development.reference_weights.tolist(),
            "features": {
                "numeric": list(problem.development.schema.numeric),
                "flagged": list(problem.development.schema.flagged),
                "categorical": [name for name, _ in problem.development.schema.categorical],
            },
            "splits": {
                "shares": list(problem.shares),
                "rows": {
                    "train": len(splits.train),
                    "val": len(splits.val),
                    "test": len(splits.test),
                },
                "val_hash": split_hash(task.rows[splits.val]),
                "test_hash": split_hash(task.rows[splits.test]),
                "val_rows": task.rows[splits.val].tolist(),
                "test_rows": task.rows[splits.test].tolist(),
            },
            "space": {
                "name": problem.space.name,
                "content_hash": problem.space.content_hash,
                "leaves": problem.space.as_dict(),
            },
            "versions": _package_versions(),
            "git_commit": _git_commit(),
            "machine": _machine(),
        }

    def write_record(self, **more: object) -> None:
        """Adds to the record and writes `run.json`."""
        self.record.update(more)
        tables.write_json(self.path / "run.json", self.record)

    def write_trials(self, records: list[TrialRecord]) -> None:
        """Writes `trials.parquet` and `epochs.parquet`."""
        classes = len(self._problem.task.classes)
        leaves = self._problem.space.leaves
        params = {
            leaf.key: tables.parameter_type(leaf.values, fractions=leaf.kind == "float")
            for leaf in leaves
        }
        schema = tables.epochs_schema(classes)
        epochs = [
            {
                **self._columns,
                "trial": record.number,
                **{key: value for key, value in row.items() if key in schema.names},
            }
            for record in records
            for row in record.epochs
        ]
        tables.write_table(self.path / "epochs.parquet", epochs, schema)
        trials = [{**self._columns, **_trial_row(record)} for record in records]
        tables.write_table(
            self.path / "trials.parquet", trials, tables.trials_schema(classes, params)
        )
        self.record["trials"] = {
            "states": dict(Counter(record.state for record in records)),
            "epochs": len(epochs),
        }

    def write_report(self, text: str) -> None:
        """Writes `report.txt`, what the run ends with on the terminal."""
        (self.path / "report.txt").write_text(text, encoding="utf-8")

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Writes `predictions.parquet`, `scores.parquet` and `model/`."""
        from tune_steel.evaluate import prediction_blocks, score_rows
        from tune_steel.predict import save_model

        classes = self._problem.task.classes
        scores = (self._columns | row for row in score_rows(evaluation))
        tables.write_table(self.path / "scores.parquet", scores, tables.scores_schema())
        save_model(evaluation.model, self.path / "model")
        tables.write_blocks(
            self.path / "predictions.parquet",
            prediction_blocks(evaluation, classes),
            tables.predictions_schema(len(classes)),
            **self._columns,
        )
        low, high = evaluation.confusion_interval
        self.record["test"] = {
            "rows": len(evaluation.y),
            "scores": {
                model.name: {name: asdict(i) for name, i in model.intervals.items()}
                for model in evaluation.models
            },
            "confusion": evaluation.confusion.tolist(),
            "confusion_low": low.tolist(),
            "confusion_high": high.tolist(),
            "reproduction_gap": evaluation.reproduction_gap,
        }


def _trial_row(record: TrialRecord) -> Mapping[str, object]:
    best = record.best
    scores = (
        {k: v for k, v in best.items() if "val_" in k and k != "best_val_loss"} if best else {}
    )
    return {
        "trial": record.number,
        "state": record.state,
        "seed": record.seed,
        "epochs": len(record.epochs),
        "best_epoch": best["epoch"] if best else None,
        **scores,
        "seconds": record.seconds,
        "node": best["node"] if best else None,
        "error": record.error,
        "config": record.config.model_dump_json(exclude_none=True),
        **record.params,
    }


def _package_versions() -> dict[str, str | None]:
    """Installed versions of what decides a result; None for what is not installed."""
    out: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    return out


def _git_commit() -> str | None:
    """Commit of the checkout that runs, with `+changes` if it has any; None for a wheel."""
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return None
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def _machine() -> dict[str, object]:
    """The driver's machine, in words and numbers."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
