"""What a search costs beside its training, and whether that grows with trials and workers.

    python -m benchmarks.growth all
    python -m benchmarks.growth one --trials 1000 --concurrency 2 --search tpe
    python -m benchmarks.growth document

A real search (Ray Tune, the product's searcher and scheduler, a journal on disk) whose workers
train nothing: they report made-up learning curves, at once or every `--seconds`. A trial takes so
small a share of a CPU that all workers fit on this machine. `all` measures what `RUNS` names and
makes the published table anew; `one` prints a single run; `document` puts the published figures
into `docs/growth.md`.

A row of `results/published/growth.parquet` is a stretch of a tenth of the trials. In ms a trial:
its wall time; the CPU time of the driver, all threads; of that, what the searcher's three calls
took; `blocked_ms`, the wall time of these calls, with their waits for the disk. Then the driver's
memory and the size of the journal at its end. `fsync_ms` is the median time of an fsync on the
same disk, just before the search. The first stretch has the start of the workers in it.
"""

from __future__ import annotations

import tune_steel.ray_environment

import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import typer

import tune_steel.ray_tune
from benchmarks.page import put
from benchmarks.process import machine
from tune_steel.budget import Budget
from tune_steel.options import Resources, default_grace_period
from tune_steel.provenance import git_commit
from tune_steel.ray_session import RaySession
from tune_steel.samplers import SearchName
from tune_steel.scheduler import make_scheduler
from tune_steel.scores import SCORES
from tune_steel.searcher import StudySearcher
from tune_steel.space import Space, load_space, spaces_folder
from tune_steel.study import begin, open_study
from tune_steel.tables import write_table
from tune_steel.trainable import report_each

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "growth.parquet"
PAGE = Path(__file__).parents[1] / "docs" / "growth.md"
_COSTS = ("wall_ms", "driver_ms", "ask_ms", "report_ms", "tell_ms", "blocked_ms")
SCHEMA = pa.schema(
    [
        pa.field("search", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("concurrency", "epochs", "total", "trials")),
        *(pa.field(name, pa.float64()) for name in (*_COSTS, "memory_mb", "journal_mb")),
        pa.field("fsync_ms", pa.float64()),
        *(pa.field(name, pa.string()) for name in ("machine", "git_commit")),
    ]
)

RUNS = ((2, 10_000), (8, 500), (32, 500), (64, 500))
"""Trials at once, and of the whole search."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def idle(seconds: float) -> Callable[..., None]:
    """In the place of training: a learning curve that only the config decides."""
    scores = tuple(SCORES)

    def rows(trial: dict[str, Any], max_epochs: int) -> Iterator[dict[str, Any]]:
        rate = float(trial["config"]["optimizer"]["lr"])
        level = 0.4 + 0.05 * abs(math.log10(rate) + 3)
        level += 0.02 * random.Random(trial["seed"]).random()
        for epoch in range(1, max_epochs + 1):
            time.sleep(seconds)
            loss = level * (1 + 0.5**epoch)
            row: dict[str, Any] = {f"val_{name}": loss for name in scores}
            row |= {"epoch": epoch, "best_epoch": epoch, "best_val_loss": loss, "seconds": seconds}
            row |= {"train_loss": loss, "learning_rate": rate, "fold_val_loss": [loss] * 5}
            yield {**row, "converged": False, "node": "idle"}

    def report(trial: dict[str, Any], max_epochs: int, decisive: frozenset[int], **_: Any) -> None:
        report_each(rows(trial, max_epochs), decisive)

    return report


@dataclass(frozen=True)
class Mark:
    """When so many trials had ended: totals since the first one began, in ms, and sizes in MB."""

    trials: int
    costs: dict[str, float]
    memory: float
    journal: float


class Watched(StudySearcher):
    """The product's searcher, with clocks on its calls and a mark now and then."""

    def __init__(self, space: Space, study: optuna.Study, journal: Path, **given: Any) -> None:
        super().__init__(space, study, **given)
        self.marks: list[Mark] = []
        self._journal = journal
        self._costs = dict.fromkeys(_COSTS, 0.0)

    def suggest(self, trial_id: str) -> Any:
        if not self.marks:
            self._begun = time.perf_counter(), time.process_time()
            self._mark()
        with self._clock("ask_ms"):
            return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with self._clock("report_ms"):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        with self._clock("tell_ms"):
            super().on_trial_complete(trial_id, result, error)
        if self.ended >= self.marks[-1].trials + max(self.samples // 10, 1):
            self._mark()

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self._costs[name] += 1e3 * (time.thread_time() - cpu)
            self._costs["blocked_ms"] += 1e3 * (time.perf_counter() - wall)

    def _mark(self) -> None:
        wall, driver = self._begun
        self._costs["wall_ms"] = 1e3 * (time.perf_counter() - wall)
        self._costs["driver_ms"] = 1e3 * (time.process_time() - driver)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        journal = self._journal.stat().st_size / 1e6
        self.marks.append(Mark(self.ended, dict(self._costs), memory, journal))


def measure(
    trials: int, concurrency: int, search: SearchName, epochs: int, seconds: float, disk: Path
) -> list[dict[str, Any]]:
    """Runs the search; a row for each tenth of its trials."""
    space = load_space(spaces_folder() / "binary.toml")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    resources = Resources(min(1.0, 2 / concurrency), 0.0, concurrency)
    tune_steel.ray_tune.train_trial = idle(seconds)  # type: ignore[attr-defined]
    with TemporaryDirectory(dir=disk) as folder:
        fsync = fsync_ms(Path(folder) / "fsync")
        journal = Path(folder) / "study.journal"
        study = open_study(journal, "growth")
        begin(study, [space.defaults()])
        budget = Budget(trials)
        given: dict[str, Any] = {"search": search, "seed": 0, "budget": budget}
        searcher = Watched(space, study, journal, max_epochs=epochs, **given)
        with RaySession(None, resources) as session:
            tune_steel.ray_tune.run_trials(
                searcher,
                make_scheduler("asha", epochs, default_grace_period(epochs), 3),
                None,  # type: ignore[arg-type]  # rows would bring their libraries to the workers
                max_epochs=epochs,
                resources=resources,
                concurrency=session.concurrency(),
            )
    kind = {"search": search, "concurrency": concurrency, "epochs": epochs, "total": trials}
    return [
        {
            **kind,
            "trials": after.trials,
            **{
                name: (after.costs[name] - before.costs[name]) / (after.trials - before.trials)
                for name in _COSTS
            },
            "memory_mb": after.memory,
            "journal_mb": after.journal,
            "fsync_ms": fsync,
            "machine": machine(),
            "git_commit": git_commit(),
        }
        for before, after in pairwise(searcher.marks)
    ]


def fsync_ms(path: Path) -> float:
    """The median time of an fsync after a short write."""
    times = []
    with path.open("ab") as file:
        for _ in range(50):
            file.write(b"x" * 200)
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


@app.command()
def one(
    trials: Annotated[int, typer.Option(help="Trials of the search.")] = 1000,
    concurrency: Annotated[int, typer.Option(help="Trials at once.")] = 2,
    search: Annotated[SearchName, typer.Option(help="How configs are found.")] = "tpe",
    epochs: Annotated[int, typer.Option(help="The most epochs of a trial.")] = 9,
    seconds: Annotated[float, typer.Option(help="What an epoch takes.")] = 0.0,
    disk: Annotated[Path, typer.Option(help="A folder on the disk of the journal.")] = Path(),
) -> None:
    """Measures one search and prints it."""
    print(markdown(measure(trials, concurrency, search, epochs, seconds, disk)))


@app.command(name="all")
def everything(
    output: Annotated[Path, typer.Option(help="The table; it is made anew.")] = PUBLISHED,
) -> None:
    """Measures every run, prints it, and publishes all."""
    rows = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for concurrency, trials in RUNS:
        # A process of its own: what an earlier search left in memory is no need of the next one.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            search = process.submit(measure, trials, concurrency, "tpe", 9, 0.0, output.parent)
            new = search.result()
        print(markdown(new), flush=True)
        rows += new
        write_table(output, rows, SCHEMA)


@app.command()
def document(
    table: Annotated[Path, typer.Option(help="The measured table.")] = PUBLISHED,
    page: Annotated[Path, typer.Option(help="The page to write into.")] = PAGE,
) -> None:
    """Writes the published figures between the marks of the page."""
    rows = pq.read_table(table).to_pylist()
    put(page, "<!-- growth -->", "<!-- end -->", markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each stretch; the last column is what 1000 workers on one driver need.

    A driver that takes so many ms a trial keeps 1000 workers busy if each takes as many s: at
    least its CPU time and what its calls wait for the disk, at most the wall time.
    """
    heads = ("at once", "trials", "wall", "driver's CPU", "ask", "reports", "tell", "Tune")
    more = ("searcher's wall", "fsync", "memory MB", "journal MB", "s a trial at 1000 workers")
    columns = (*heads, *more)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        calls = r["ask_ms"] + r["report_ms"] + r["tell_ms"]
        times = (r["wall_ms"], r["driver_ms"], r["ask_ms"], r["report_ms"], r["tell_ms"])
        cells = [str(r["concurrency"]), str(r["trials"])]
        cells += [f"{x:.1f}" for x in (*times, r["driver_ms"] - calls, r["blocked_ms"])]
        cells += [f"{r['fsync_ms']:.1f}", f"{r['memory_mb']:.0f}", f"{r['journal_mb']:.1f}"]
        waits = max(r["blocked_ms"] - calls, 0)
        cells.append(f"{r['driver_ms'] + waits:.0f} to {r['wall_ms']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
