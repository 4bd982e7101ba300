"""What a search costs beside its training, and whether that grows with the number of trials.

    python -m benchmarks.growth --trials 1000 --concurrency 2 --search tpe

runs a real search (Ray Tune, the product's searcher and scheduler, a journal on disk) whose
workers train nothing: they report made-up learning curves, at once or every `--seconds`. A row of
`results/published/growth.parquet` is a stretch of a tenth of the trials, with its wall time, the
driver's own CPU time and the part of it that is the sampler's, each in ms a trial, and at its end
the driver's memory and the size of the journal.
"""

from __future__ import annotations

import tune_steel.ray_environment

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from ray import tune

import tune_steel.ray_tune
from tune_steel.budget import Budget
from tune_steel.data import load_steel
from tune_steel.job import begin
from tune_steel.options import Resources, default_grace_period
from tune_steel.ray_session import RaySession
from tune_steel.samplers import SearchName
from tune_steel.scheduler import make_scheduler
from tune_steel.scores import SCORES
from tune_steel.searcher import StudySearcher
from tune_steel.space import Space, load_space, spaces_folder
from tune_steel.splits import freeze, prepare
from tune_steel.study import TrialRecord, open_study
from tune_steel.tables import write_table
from tune_steel.tasks import steel_task
from tune_steel.warm_start import Beginning

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "growth.parquet"
SCHEMA = pa.schema(
    [
        pa.field("search", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("concurrency", "epochs", "trials")),
        *(
            pa.field(name, pa.float64())
            for name in ("wall_ms", "driver_ms", "sampling_ms", "memory_mb", "journal_mb")
        ),
    ]
)


def idle(seconds: float) -> Callable[..., None]:
    """In the place of training: a learning curve that only the config decides."""

    def report(trial: dict[str, Any], max_epochs: int, **_: Any) -> None:
        rate = float(trial["config"]["optimizer"]["lr"])
        noise = np.random.default_rng(trial["seed"]).random()
        level = 0.4 + 0.05 * abs(np.log10(rate) + 3) + 0.02 * noise
        for epoch in range(1, max_epochs + 1):
            time.sleep(seconds)
            loss = level * (1 + 0.5**epoch)
            row = {f"val_{name}": loss for name in SCORES}
            row |= {"epoch": epoch, "best_epoch": epoch, "best_val_loss": loss, "seconds": seconds}
            row |= {"train_loss": loss, "learning_rate": rate, "fold_val_loss": [loss] * 5}
            tune.report({**row, "converged": False, "node": "idle"})

    return report


@dataclass(frozen=True)
class Mark:
    """Totals since the first trial began, when so many had ended."""

    trials: int
    wall: float
    driver: float
    sampling: float
    memory: int
    journal: int


class Watched(StudySearcher):
    """The product's searcher, with a clock on its sampler and a mark now and then."""

    def __init__(self, space: Space, study: optuna.Study, journal: Path, **given: Any) -> None:
        super().__init__(space, study, **given)
        self.marks: list[Mark] = []
        self._journal = journal
        self._sampling = 0.0

    def suggest(self, trial_id: str) -> Any:
        if not self.marks:
            self._begun = time.monotonic(), time.process_time()
            self._mark()
        started = time.process_time()
        try:
            return super().suggest(trial_id)
        finally:
            self._sampling += time.process_time() - started

    def _end(
        self, trial: optuna.Trial, record: TrialRecord, state: str, reason: str | None = None
    ) -> None:
        super()._end(trial, record, state, reason)
        if self.ended % max(self.samples // 10, 1) == 0:
            self._mark()

    def _mark(self) -> None:
        wall, driver = self._begun
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        self.marks.append(
            Mark(
                self.ended,
                time.monotonic() - wall,
                time.process_time() - driver,
                self._sampling,
                memory,
                self._journal.stat().st_size,
            )
        )


def measure(
    trials: int, concurrency: int, search: SearchName, epochs: int, seconds: float
) -> list[dict[str, Any]]:
    """Runs the search; a row for each tenth of its trials."""
    space = load_space(spaces_folder() / "binary.toml")
    task = steel_task(load_steel(None, "stand-in"), "binary")
    development, _, _ = prepare(task, freeze(task, seed=0, split=task.split, folds=5))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    resources = Resources(min(1.0, 2 / concurrency), 0.0, concurrency)
    tune_steel.ray_tune.train_trial = idle(seconds)
    with TemporaryDirectory() as folder:
        journal = Path(folder) / "study.journal"
        study = open_study(journal, "growth")
        begin(study, Beginning([space.defaults()]))
        budget = Budget(trials)
        given: dict[str, Any] = {"search": search, "seed": 0, "budget": budget}
        searcher = Watched(space, study, journal, max_epochs=epochs, **given)
        with RaySession(None, resources) as session:
            tune_steel.ray_tune.run_trials(
                searcher,
                make_scheduler("asha", epochs, default_grace_period(epochs), 3),
                development,
                max_epochs=epochs,
                resources=resources,
                concurrency=session.concurrency(),
            )
    rows = []
    for before, after in zip(searcher.marks, searcher.marks[1:], strict=False):
        count = (after.trials - before.trials) / 1000
        rows.append(
            {
                "search": search,
                "concurrency": concurrency,
                "epochs": epochs,
                "trials": after.trials,
                "wall_ms": (after.wall - before.wall) / count,
                "driver_ms": (after.driver - before.driver) / count,
                "sampling_ms": (after.sampling - before.sampling) / count,
                "memory_mb": after.memory / 1e6,
                "journal_mb": after.journal / 1e6,
            }
        )
    return rows


def main(
    trials: Annotated[int, typer.Option(help="Trials of the search.")] = 1000,
    concurrency: Annotated[int, typer.Option(help="Trials at once.")] = 2,
    search: Annotated[SearchName, typer.Option(help="How configs are found.")] = "tpe",
    epochs: Annotated[int, typer.Option(help="The most epochs of a trial.")] = 9,
    seconds: Annotated[float, typer.Option(help="What an epoch takes.")] = 0.0,
    output: Annotated[Path, typer.Option(help="The table; other rows of it stay.")] = PUBLISHED,
) -> None:
    """Measures, prints and publishes."""
    rows = measure(trials, concurrency, search, epochs, seconds)
    old = pq.read_table(output).to_pylist() if output.exists() else []
    kind = search, concurrency, epochs
    old = [r for r in old if (r["search"], r["concurrency"], r["epochs"]) != kind]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(output, old + rows, SCHEMA)
    print("trials  wall ms  driver ms  sampling ms  the rest ms  memory MB  journal MB")
    for r in rows:
        rest = r["driver_ms"] - r["sampling_ms"]
        print(
            f"{r['trials']:6}{r['wall_ms']:9.0f}{r['driver_ms']:11.1f}{r['sampling_ms']:13.1f}"
            f"{rest:13.1f}{r['memory_mb']:11.0f}{r['journal_mb']:12.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
