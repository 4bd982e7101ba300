"""A run's folder: `run.json`, which is what it takes to repeat the run, and the tables."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tune_steel import tables
from tune_steel.errors import OptionError, RunError, SearchFailedError
from tune_steel.options import Options
from tune_steel.provenance import git_commit, machine, package_versions
from tune_steel.splits import split_hash

if TYPE_CHECKING:
    from tune_steel.evaluate import Evaluation
    from tune_steel.problem import Problem
    from tune_steel.study import TrialRecord


_EACH_TIME = ("command", "started", "versions", "git_commit", "machine")
"""What `resumed` holds of each process that went on with a run."""

_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}
"""Of a full or broken disk, and of one that may not be written."""


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


@contextmanager
def said_if_unwritable(path: Path) -> Iterator[None]:
    """Turns what a full or forbidden disk raises into one line.

    Raises:
        SearchFailedError: A file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        begun = (path / "run.json").exists()
        what = f"then go on with --resume {path}" if begun else "then start again"
        raise SearchFailedError(
            f"{error.filename or path} cannot be written ({os.strerror(error.errno)}); make room "
            f"or mend the permissions, {what}"
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """What `run.json` in a run's folder holds.

    Raises:
        RunError: There is none, or it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        differences(record, record)  # reads what will be compared
        _ = record["run"], record["state"], record["splits"]["test_rows"]
        _ = record["options"]["warm_start"]
    except OSError as error:
        raise RunError(
            f"{path}: this is no folder of a run ({error.strerror}: run.json); allowed are the "
            "folders that a search made, like results/binary-20260101-120000"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        trials = path / "trials.parquet"
        what = f" with --warm-start {trials}" if trials.exists() else ""
        raise RunError(
            f"{path}/run.json: it is damaged ({error}); put a backup of it in its place, or begin "
            f"a new run{what}"
        ) from None
    return record


def other_looks(path: Path, record: Mapping[str, Any]) -> list[str]:
    """Names of the runs in folders beside this one that have opened the same test rows.

    Args:
        path: The folder of this run.
        record: What its `run.json` holds.
    """
    names = []
    for file in sorted(path.parent.glob("*/run.json")):
        try:
            other = read_record(file.parent)
        except RunError:
            continue
        same = all(
            other[part][key] == record[part][key]
            for part, key in (("data", "content_hash"), ("splits", "test_hash"))
        )
        if same and other["run"] != record["run"] and other.get("looks_at_test"):
            names.append(other["run"])
    return names


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What makes two runs different searches, in words, by topic.

    Args:
        before: The record of one run.
        now: That of the other.
    """
    out: dict[str, str] = {}
    for topic in ("task", "classes", "features"):
        # A table of one's own has the name of its file, which may be another one by now.
        own = before["options"]["task"] is None and now["options"]["task"] is None
        if before[topic] != now[topic] and not (topic == "task" and own):
            out[topic] = f"its {topic} is {before[topic]}, here it is {now[topic]}"
    hashes = [record["data"]["content_hash"] for record in (before, now)]
    if hashes[0] != hashes[1]:
        out["data"] = f"its table has the hash {hashes[0][:12]}, this one has {hashes[1][:12]}"
    for key in ("val_hash", "test_hash", "shares", "rows"):
        if before["splits"][key] != now["splits"][key]:
            out["split"] = (
                f"its split is another one ({key}: {_brief(before['splits'][key])}, here "
                f"{_brief(now['splits'][key])})"
            )
    leaves = [record["space"]["leaves"] for record in (before, now)]
    changed = [
        f"{key} is {leaves[0].get(key, 'missing')}, here {leaves[1].get(key, 'missing')}"
        for key in sorted({*leaves[0], *leaves[1]} - {"try"})  # only a new search reads those
        if leaves[0].get(key) != leaves[1].get(key)
    ]
    if changed:
        out["space"] = f"its space is another one: {'; '.join(changed)}"
    for key in ("folds", "max_epochs", "seed"):
        if before["options"][key] != now["options"][key]:
            topic = "seed" if key == "seed" else "split" if key == "folds" else "space"
            text = f"its --{key.replace('_', '-')} is {before['options'][key]}"
            out.setdefault(topic, f"{text}, here it is {now['options'][key]}")
    return out


def _brief(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


class RunFolder:
    """Writes what a run gives, each file whole or not at all.

    Attributes:
        path: The folder.
        record: What `run.json` holds; `write_record` writes it.
    """

    def __init__(
        self,
        path: Path,
        options: Options,
        problem: Problem,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        """Fills the record with everything that is known before the search.

        Args:
            path: The folder.
            options: What was asked for.
            problem: What it is about.
            before: The record of the run that is resumed in this folder.

        Raises:
            RunError: It was another search.
        """
        self.path = path
        self.journal = path / "study.journal"
        self._problem = problem
        self._columns = {
            # The study has this name; the folder may have been renamed since.
            "run": path.name if before is None else before["run"],
            "task": problem.task.name if before is None else before["task"],
            "data_source": problem.table.source,
        }
        splits, task = problem.splits, problem.task
        self.record: dict[str, Any] = {
            **self._columns,
            "state": "searching",
            "command": ["python", "-m", "tune_steel.search", *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": options.as_dict(),
            "data": {
                "name": problem.table.name,
                "source": problem.table.source,
                "rows": len(problem.table.frame),
                "content_hash": problem.table.content_hash,
            },
            "classes": list(task.classes),
            "notes": [],
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
            "versions": package_versions(),
            "git_commit": git_commit(),
            "machine": machine(),
        }
        if before is not None:
            changed = differences(before, self.record)
            if changed:
                raise RunError(
                    f"{path} cannot be resumed: " + "; ".join(changed.values()) + "; begin a new "
                    "run instead"
                )
            kept = {k: v for k, v in before.items() if k not in ("options", "state", "error")}
            again = {key: self.record[key] for key in _EACH_TIME}
            self.record |= kept | {"resumed": [*before.get("resumed", []), again]}

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

    def clean(self) -> None:
        """Removes what a killed process had begun to write."""
        for left in self.path.glob(".*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def write_report(self, text: str) -> None:
        """Writes `report.txt`, what the run ends with on the terminal."""
        with tables.replacing(self.path / "report.txt") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def is_whole(self) -> bool:
        """Whether everything is there that a finished run leaves, and can be read."""
        try:
            for name in ("trials", "epochs", "scores", "predictions"):
                pq.read_metadata(self.path / f"{name}.parquet")
        except (OSError, pa.ArrowException):
            return False
        return (self.path / "report.txt").exists() and (self.path / "model").is_dir()

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
        self.record["ensemble"] = asdict(evaluation.ensemble)
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
        "slot": record.slot,
        "retry_of": record.retry_of,
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
