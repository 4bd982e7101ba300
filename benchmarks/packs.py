"""Packs: what a worker would gain that trains several trials of one architecture in lock-step.

    python -m benchmarks.packs

measures the most that a pack can gain, without a line of it being built: a `Fit` of P times the
five folds against P fits of the five folds, in CPU time of one thread, because a machine is rarely
idle; once alone, once with a second process that does the same on the other core. All sizes of a
pack take turns within a repeat. What stands in the row `searched` is measured the same way on
configs that a search trained, drawn by their epochs, so it is the gain of a search whose trials
all find enough others of their architecture.

Then whole searches are played in virtual time over the surrogate of the recorded curves
(`virtual.py`), with packs: a worker asks for one config as ever and for P - 1 more with the
architecture of the first. ASHA stops each by itself; what is left trains on as a smaller pack, at
no cost of its own. An epoch of a pack takes the sum of the recorded seconds of its members over
the gain of so many: the measured one with two processes, or, to tell what the searcher loses, as
many as there are, as if a pack took no longer than a trial.

`results/published/packs.parquet` holds all figures, `docs/packs.md` shows them; `--quick` takes
few repeats. `TUNE_STEEL_DATA` names the real table, else it is the stand-in.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from numpy.typing import NDArray
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler

from benchmarks.page import put
from benchmarks.simulate import CURVES, SPACES, read_curves
from benchmarks.surrogate import Curve, Surrogate
from benchmarks.virtual import Mark, Search, Setting
from tune_steel.config import TrialConfig
from tune_steel.data import load_steel
from tune_steel.fit import Fit, prepare_process
from tune_steel.samplers import SearchName
from tune_steel.space import Params, Space, load_space
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tables import write_table
from tune_steel.tasks import steel_task

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "packs.parquet"
PAGE = Path(__file__).parents[1] / "docs" / "packs.md"
NETWORKS = ((512, 256, 128), (128, 64), (64, 32))
BATCH_SIZES = (32, 256)
SIZES = (1, 2, 4, 8)
SETTING = Setting("tpe, asha 6/3", search="tpe")
EPOCHS = 3000
"""Of a played search: about what the published one of 200 trials took."""
TRIALS = 200
"""Of the searches in which trials of one architecture are counted."""

SEARCHED = "searched"
Floats: TypeAlias = NDArray[np.float64]
Gain: TypeAlias = Callable[[int], float]

SCHEMA = pa.schema(
    [
        # speed: a size of a pack; sharing: a size of a group; search: a size of a pack
        *(pa.field(name, pa.string()) for name in ("part", "network", "data_source", "versions")),
        *(pa.field(n, pa.int32()) for n in ("batch_size", "processes", "pack", "repeats")),
        pa.field("ms", pa.float64(), metadata={"doc": "CPU time of an epoch of one replica."}),
        *(pa.field(f"gain{end}", pa.float64()) for end in ("", "_low", "_high")),
        pa.field("trials", pa.float64(), metadata={"doc": "Share that has so many alike."}),
        pa.field("cost", pa.string(), metadata={"doc": "Of an epoch of a pack."}),
        pa.field("loss", pa.float64(), metadata={"doc": "Of the chosen trial, at the end."}),
        pa.field("trials_an_hour", pa.float64(), metadata={"doc": "Over that of single trials."}),
        pa.field(
            "at_equal_loss",
            pa.float64(),
            metadata={"doc": "How much sooner than single trials a loss is reached."},
        ),
        *(pa.field(f"at_equal_loss_{end}", pa.float64()) for end in ("low", "high")),
    ]
)


def architecture(params: Params) -> tuple[object, ...]:
    """What the trials of a pack must share: the shapes and calls of a step.

    All else can differ from replica to replica: rates, weights and seeds as vectors, scaling
    because each replica has features of its own, AdamW as Adam whose decay is 0.
    """
    return tuple(sorted(_shared(params).items()))


def _shared(params: Params) -> Params:
    def of_shape(key: str) -> bool:
        return (key.startswith("model.") and key != "model.dropout") or (
            key == "optimizer.batch_size"
        )

    return {key: value for key, value in params.items() if of_shape(key)}


def network_of(widths: Sequence[int], batch_size: int) -> TrialConfig:
    """The reference config with another network."""
    named = {f"width_{layer}": width for layer, width in enumerate(widths, start=1)}
    return TrialConfig.model_validate(
        {
            "model": {"depth": len(widths), "dropout": 0.35, **named},
            "loss": {"pos_weight": 2.0},
            "optimizer": {"lr": 1e-3, "batch_size": batch_size},
        }
    )


def pack(config: TrialConfig, development: Development, size: int) -> Fit:
    """A fit of so many trials, each with all folds and seeds of its own."""
    folds = list(development.folds) * size
    return Fit(config, development, folds, range(len(folds)))


def development_rows() -> tuple[Development, str]:
    """Five folds of the binary task, and where its table comes from."""
    given = os.environ.get("TUNE_STEEL_DATA")
    table = load_steel(None, "auto" if given else "stand-in")
    task = steel_task(table, "binary")
    frozen = freeze(task, seed=0, split=task.split, folds=5)
    return prepare(task, frozen)[0], table.source


_turn: Any = threading.Barrier(1)


def _begin(turn: Any) -> None:
    global _turn
    _turn = turn


def epochs_of(config: TrialConfig, repeats: int) -> Floats:
    """CPU seconds of an epoch, training and scores, of each size of a pack [repeats, sizes].

    All processes do the same at the same time.
    """
    prepare_process(1)
    development, _ = development_rows()
    fits = [pack(config, development, size) for size in SIZES]
    seconds = np.zeros((repeats + 1, len(fits)))
    for row in seconds:
        for i, fit in enumerate(fits):
            _turn.wait()
            began = time.thread_time()
            fit.train_epoch(config.optimizer.lr)
            losses = fit.score()["loss"]
            row[i] = time.thread_time() - began
            assert np.isfinite(losses).all()
    return seconds[1:]  # the first epoch warms up


def measure(configs: Sequence[TrialConfig], repeats: int, processes: int) -> Floats:
    """The same for each config, all processes' repeats together [configs, repeats, sizes]."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, context, initializer=_begin, initargs=(context.Barrier(processes),)
    ) as pool:
        # As many calls as processes: none is free for a second before the others have ended.
        return np.array(
            [
                np.concatenate(list(pool.map(epochs_of, [c] * processes, [repeats] * processes)))
                for c in configs
            ]
        )


def gains(seconds: Floats) -> Floats:
    """P times a trial's time over that of a pack of P: 25 %, 50 %, 75 % of the repeats [3, sizes].

    Args:
        seconds: Of a repeat and size, [repeats, sizes].
    """
    quantiles = np.quantile(np.array(SIZES) * seconds[:, :1] / seconds, [0.25, 0.5, 0.75], axis=0)
    return np.asarray(quantiles)


def speed_rows(seconds: Floats, processes: int, network: str, size: int | None) -> list[Any]:
    """A row for each size of a pack, of the seconds of a repeat and size."""
    low, middle, high = gains(seconds)
    ms = np.median(seconds, axis=0) * 1e3 / (np.array(SIZES) * 5)
    return [
        {
            "part": "speed",
            "network": network,
            "batch_size": size,
            "processes": processes,
            "repeats": len(seconds),
            "pack": trials,
            "ms": ms[i],
            "gain": middle[i],
            "gain_low": low[i],
            "gain_high": high[i],
        }
        for i, trials in enumerate(SIZES)
    ]


class PackSearch(Search):
    """A simulated search whose workers train packs.

    Attributes:
        seconds: When each mark was made.
    """

    def __init__(self, size: int, gain: Gain, *args: Any, **given: Any) -> None:
        """Takes the size of a pack, the gain of so many trials, and what `Search` takes."""
        super().__init__(*args, **given)
        self._size, self._gain = size, gain
        self._fixed: Params = {}
        self._packs: list[tuple[float, int, int, list[Any]]] = []
        self._now = 0.0
        self.seconds: list[float] = []

    def _start(self, now: float) -> None:
        self._fixed = {}
        members: list[Any] = []
        while len(members) < self._size and (trial := self._ask()) is not None:
            members.append(trial)
            self._fixed = _shared(trial.curve.params)
        if members:
            self._train(now, 1, members)

    def _train(self, now: float, epoch: int, members: list[Any]) -> None:
        took = sum(trial.curve.seconds for trial in members) / self._gain(len(members))
        heapq.heappush(self._events, (now + took, members[0].number, epoch, members))  # type: ignore[misc]

    def _epoch(self) -> None:
        event: tuple[float, int, int, Any] = heapq.heappop(self._events)
        self._now, _, epoch, members = event
        left = [trial for trial in members if not self._report(trial, epoch)]
        if left:
            self._train(self._now, epoch + 1, left)
        else:
            self._start(self._now)

    def _mark(self, *, exhausted: bool) -> Mark:
        self.seconds.append(self._now)
        return super()._mark(exhausted=exhausted)

    def _sampler(self, name: SearchName, seed: int, slot: int) -> BaseSampler:
        sampler = super()._sampler(name, seed, slot)
        if not self._fixed:
            return sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PartialFixedSampler(self._fixed, sampler)


def play(
    size: int,
    gain: Gain,
    repeat: int,
    space: Space,
    curve_of: Callable[[Params], Curve],
    most: int,
    budgets: Sequence[int],
) -> tuple[Floats, Floats, int]:
    """Seconds and losses of a search at each of the budgets, and its trials."""
    search = PackSearch(
        size,
        gain,
        SETTING,
        space,
        lambda slot, params: curve_of(params),
        configs=[space.defaults()],
        seed=repeat,
        max_epochs=most,
        samples=10**6,
        epochs=budgets[-1],
    )
    marks = search.run(budgets)
    at = search.seconds[: len(marks)]  # one more is made at the end, needed or not
    return np.array(at), np.array([m.loss for m in marks[: len(at)]]), marks[-1].trials


def sooner(
    single: Sequence[tuple[Floats, Floats]], packed: Sequence[tuple[Floats, Floats]]
) -> float:
    """How much sooner packs reach a loss that single trials reach too.

    The loss is the worse one of those at their ends, in the mean over the repeats.

    Args:
        single: Seconds and losses of each repeat.
        packed: The same.
    """
    curves = []
    for searches in (single, packed):
        end = min(seconds[-1] for seconds, _ in searches)
        times = np.linspace(max(seconds[0] for seconds, _ in searches), end, 1000)
        at = [np.searchsorted(seconds, times, side="right") - 1 for seconds, _ in searches]
        mean = np.mean([losses[i] for (_, losses), i in zip(searches, at, strict=True)], axis=0)
        curves.append((times, np.minimum.accumulate(mean)))
    loss = max(mean[-1] for _, mean in curves)
    one, other = (times[int(np.argmax(mean <= loss))] for times, mean in curves)
    return float(one / other)


def search_rows(
    gain: Mapping[str, Gain],
    repeats: int,
    space: Space,
    curve_of: Callable[[Params], Curve],
    most: int,
    epochs: int = EPOCHS,
) -> list[dict[str, Any]]:
    """Plays searches of each size and cost: a row for each."""
    budgets = range(epochs // 10, epochs + 1, 20)
    rng = np.random.default_rng(0)
    drawn = rng.integers(repeats, size=(1000, repeats))
    rows = []
    single: list[tuple[Floats, Floats, int]] = []
    for cost, size in [(c, s) for c in gain for s in SIZES if s > 1 or c == next(iter(gain))]:
        found = [play(size, gain[cost], r, space, curve_of, most, budgets) for r in range(repeats)]
        single = single or found
        pairs, theirs = ([(s, x) for s, x, _ in side] for side in (found, single))
        rates, others = (
            np.mean([trials / s[-1] for s, _, trials in side]) for side in (found, single)
        )
        ratios = [sooner([theirs[i] for i in d], [pairs[i] for i in d]) for d in drawn]
        low, high = np.quantile(ratios, [0.025, 0.975])
        rows.append(
            {
                "part": "search",
                "cost": cost,
                "pack": size,
                "repeats": repeats,
                "loss": np.mean([losses[-1] for _, losses in pairs]),
                "trials_an_hour": rates / others,
                "at_equal_loss": sooner(theirs, pairs),
                "at_equal_loss_low": low,
                "at_equal_loss_high": high,
            }
        )
    return rows


def searched(
    repeats: int, space: Space, curve_of: Callable[[Params], Curve], most: int
) -> list[list[tuple[Params, int]]]:
    """Configs and epochs of the trials of searches without packs."""
    found = []
    for repeat in range(repeats):
        search = Search(
            SETTING,
            space,
            lambda slot, params: curve_of(params),
            configs=[space.defaults()],
            seed=repeat,
            max_epochs=most,
            samples=TRIALS,
        )
        search.run([])
        found.append([(r.params, len(r.epochs)) for r in search.searcher.records])
    return found


def sharing_rows(searches: Sequence[Sequence[Params]]) -> list[dict[str, Any]]:
    """The share of the trials that have at least so many of their architecture in their search."""
    groups = []
    for search in searches:
        count = Counter(architecture(params) for params in search)
        groups += [count[architecture(params)] for params in search]
    return [
        {
            "part": "sharing",
            "pack": size,
            "repeats": len(searches),
            "trials": float(np.mean(np.array(groups) >= size)),
        }
        for size in SIZES
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of the page."""
    sizes = sorted({row["pack"] for row in rows} - {1})
    speed = [row for row in rows if row["part"] == "speed"]
    searches = max(row["repeats"] for row in rows if row["part"] == "search")
    lines = [
        f"Median and middle half of {speed[0]['repeats']} epochs, with two processes of twice as "
        f"many; {searches} played searches of a kind. One thread a process.",
        "",
    ]
    lines += ["| network, batch size | processes | ms a replica-epoch alone |"]
    lines[-1] += "".join(f" gain of {size} |" for size in sizes)
    lines.append("|" + "---|" * (3 + len(sizes)))
    for key in dict.fromkeys((r["network"], r["batch_size"], r["processes"]) for r in speed):
        own = [r for r in speed if (r["network"], r["batch_size"], r["processes"]) == key]
        name = key[0] if key[1] is None else f"{key[0]}, {key[1]}"
        cells = [f"{r['gain']:.2f} ({r['gain_low']:.2f}-{r['gain_high']:.2f})" for r in own[1:]]
        lines.append("| " + " | ".join([name, str(key[2]), f"{own[0]['ms']:.1f}", *cells]) + " |")
    lines += ["", "| trials with at least so many of their architecture in the search | share |"]
    lines.append("|---|---|")
    shares = [r for r in rows if r["part"] == "sharing" and r["pack"] > 1]
    lines += [f"| {r['pack']} | {r['trials']:.0%} |" for r in shares]
    lines += ["", "| an epoch of a pack | pack | trials an hour | sooner at equal loss | loss |"]
    lines.append("|---|---|---|---|---|")
    for r in (r for r in rows if r["part"] == "search"):
        span = f"{r['at_equal_loss_low']:.2f} to {r['at_equal_loss_high']:.2f}"
        lines.append(
            f"| {r['cost']} | {r['pack']} | {r['trials_an_hour']:.2f} x | "
            f"{r['at_equal_loss']:.2f} x ({span}) | {r['loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def document(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Puts the tables between the marks of the page."""
    put(page, "<!-- tables -->", "<!-- end -->", markdown(rows))


def main(
    quick: Annotated[bool, typer.Option(help="Few repeats.")] = False,
    output: Annotated[Path, typer.Option(help="The table.")] = PUBLISHED,
) -> None:
    """Measures, plays, prints and publishes."""
    repeats, drawn, searches = (3, 4, 3) if quick else (9, 16, 20)
    space = load_space(SPACES / "binary.toml")
    curves, most = read_curves(CURVES / "binary.parquet")
    surrogate = Surrogate(space, curves, most)
    found = searched(searches, space, surrogate.curve, most)
    rows = sharing_rows([[params for params, _ in search] for search in found])

    trials = [trial for search in found for trial in search]
    weights = np.array([epochs for _, epochs in trials], dtype=float)
    chosen = np.random.default_rng(0).choice(len(trials), drawn, p=weights / weights.sum())
    configs = [space.config(trials[i][0]) for i in chosen]
    networks = [(widths, size) for widths in NETWORKS for size in BATCH_SIZES]
    configs += [network_of(widths, size) for widths, size in networks]
    speed: list[dict[str, Any]] = []
    for processes in (1, 2):
        print(f"measuring, {processes} at once", file=sys.stderr, flush=True)
        seconds = measure(configs, repeats, processes)
        for (widths, size), own in zip(networks, seconds[drawn:], strict=True):
            speed += speed_rows(own, processes, "-".join(map(str, widths)), size)
        # A search spends the sum of the times: the slow configs count the most.
        speed += speed_rows(seconds[:drawn].mean(axis=0), processes, SEARCHED, None)
    measured = [row["gain"] for row in speed[-len(SIZES) :]]
    rows = speed + rows
    gain: dict[str, Gain] = {
        "measured": lambda members: float(np.interp(members, SIZES, measured)),
        "as a trial's": float,
    }
    rows += search_rows(gain, searches, space, surrogate.curve, most)
    source = development_rows()[1]
    versions = f"torch {torch.__version__}"
    rows = [{**row, "data_source": source, "versions": versions} for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(output, rows, SCHEMA)
    published = pq.read_table(output).to_pylist()
    print(f"{source}, one thread a process\n\n{markdown(published)}")
    if output.resolve() == PUBLISHED:
        document(published, PAGE)


if __name__ == "__main__":
    typer.run(main)
