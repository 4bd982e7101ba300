"""How long an epoch takes: the reference's loop, a plain one, this project's, the matmuls alone.

    python -m benchmarks.fit

trains the reference network, a small one and nearest neighbours on the five folds of the binary
task, on one core, all loops in turn in one process. An epoch is the training of all five networks
and their validation scores; five networks are five runs of the reference and of the plain loop,
and one stacked network here; `mkl` is the same with the matmuls left to the library that torch
itself chooses. The floor is only the matmuls of the training, on the same shapes, by the faster
library.
A row of `results/published/fit.parquet` is a loop and a network. Times are the CPU time of the one
thread, because a machine is rarely idle; `TUNE_STEEL_DATA` names the real table, else it is the
stand-in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Protocol
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision

from benchmarks import neighbours
from benchmarks.process import machine
from tune_steel import matmul
from tune_steel.config import TrialConfig
from tune_steel.data import load_steel
from tune_steel.fit import Fit, prepare_process
from tune_steel.metrics import Scorer
from tune_steel.splits import Development, freeze, prepare
from tune_steel.tables import write_table
from tune_steel.tasks import steel_task

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "fit.parquet"
NETWORKS = ((512, 256, 128), (64, 32))
DROPOUT, POS_WEIGHT, LR, BATCH = 0.35, 2.0, 1e-3, 32
_TEXTS = ("network", "loop", "data_source", "machine", "versions")
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in _TEXTS),
        *(pa.field(name, pa.int32()) for name in ("folds", "rows", "steps", "repeats")),
        # Medians over the repeats, and the ends of the middle half of them.
        *(
            pa.field(f"{what}_ms{which}", pa.float64())
            for what in ("epoch", "training")
            for which in ("", "_low", "_high", "_best")
        ),
        pa.field("wall_ms", pa.float64(), metadata={"doc": "Median wall time of an epoch."}),
        # Medians of the ratios within a repeat.
        pa.field("reference_over_epoch", pa.float64()),
        pa.field("plain_over_epoch", pa.float64()),
        pa.field("training_over_floor", pa.float64()),
    ]
)


def plain_network(inputs: int, widths: Sequence[int], outputs: int) -> nn.Module:
    """The reference network with `torch.nn`: [B, inputs] -> [B, outputs]."""
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *widths]):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class Loop(Protocol):
    """One epoch of all folds: `train`, then `score`."""

    def train(self) -> None: ...

    def score(self) -> list[float]:
        """Validation loss of each fold."""
        ...


class Stacked:
    """This project's fit."""

    def __init__(self, widths: Sequence[int], development: Development) -> None:
        named = {f"width_{layer}": width for layer, width in enumerate(widths, start=1)}
        tree = {
            "model": {"depth": len(widths), "dropout": DROPOUT, **named},
            "loss": {"pos_weight": POS_WEIGHT},
            "optimizer": {"lr": LR, "batch_size": BATCH},
        }
        config = TrialConfig.model_validate(tree)
        folds = development.folds
        self.fit = Fit(config, development, folds, range(len(folds)))

    def train(self) -> None:
        self.fit.train_epoch(LR)

    def score(self) -> list[float]:
        return [float(loss) for loss in self.fit.score()["loss"]]


class StackedMKL(Stacked):
    """The same without oneDNN."""

    def train(self) -> None:
        with patch.object(matmul, "onednn_is_better", lambda: False):
            super().train()

    def score(self) -> list[float]:
        with patch.object(matmul, "onednn_is_better", lambda: False):
            return super().score()


class Separate:
    """Networks written with torch.nn, one a fold, trained one after the other."""

    def __init__(self, widths: Sequence[int], development: Development) -> None:
        preprocessing = Stacked(widths, development).fit.preprocessing
        self.x = torch.from_numpy(preprocessing.transform(development.features))
        self.y = torch.tensor(development.y)
        self.folds = [(torch.tensor(train), torch.tensor(val)) for train, val in development.folds]
        inputs = self.x.shape[2]
        self.networks = [plain_network(inputs, widths, 1) for _ in self.folds]
        self.optimizers = [torch.optim.Adam(n.parameters(), lr=LR) for n in self.networks]
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POS_WEIGHT))

    def _step(self, fold: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.networks[fold](x).squeeze(1)
        loss = self.criterion(logits, y.float())
        self.optimizers[fold].zero_grad()
        loss.backward()
        self.optimizers[fold].step()
        return logits, loss


class Plain(Separate):
    """The shortest loop over torch.nn, scored once an epoch."""

    def __init__(self, widths: Sequence[int], development: Development) -> None:
        super().__init__(widths, development)
        self.scorer = Scorer(development.reference_weights, torch.device("cpu"))

    def train(self) -> None:
        for fold, (rows, _) in enumerate(self.folds):
            self.networks[fold].train()
            for batch in torch.split(rows[torch.randperm(len(rows))], BATCH):
                if len(batch) > 1:
                    self._step(fold, self.x[fold, batch], self.y[batch])

    @torch.no_grad()
    def score(self) -> list[float]:
        losses = []
        for fold, (_, rows) in enumerate(self.folds):
            logits = self.networks[fold].eval()(self.x[fold, rows])
            losses.append(self.scorer(logits[None], self.y[rows][None])["loss"].item())
        return losses


class Reference(Separate):
    """A DataLoader, and the three scores that it reports, by torchmetrics, on every batch."""

    def __init__(self, widths: Sequence[int], development: Development) -> None:
        super().__init__(widths, development)
        self.accuracy = BinaryAccuracy()
        self.positive, self.negative = BinaryPrecision(), BinaryPrecision()
        self.loaders = [
            tuple(
                DataLoader(
                    TensorDataset(self.x[fold, rows], self.y[rows]),
                    batch_size=BATCH,
                    shuffle=shuffle,
                    drop_last=shuffle and len(rows) % BATCH == 1,
                )
                for rows, shuffle in zip(parts, (True, False), strict=True)
            )
            for fold, parts in enumerate(self.folds)
        ]

    def _count(self, logits: Tensor, y: Tensor) -> None:
        p = logits.sigmoid()
        self.accuracy(p, y)
        self.positive(p, y)
        self.negative(1 - p, 1 - y)

    def _finish(self) -> None:
        for metric in (self.accuracy, self.positive, self.negative):
            metric.compute().item()
            metric.reset()

    def train(self) -> None:
        for fold, (loader, _) in enumerate(self.loaders):
            self.networks[fold].train()
            total = 0.0
            for x, y in loader:
                logits, loss = self._step(fold, x, y)
                total += loss.item()
                self._count(logits.detach(), y)
            self._finish()

    @torch.no_grad()
    def score(self) -> list[float]:
        losses = []
        for fold, (_, loader) in enumerate(self.loaders):
            self.networks[fold].eval()
            total = 0.0
            for x, y in loader:
                logits = self.networks[fold](x).squeeze(1)
                total += self.criterion(logits, y.float()).item() * len(y)
                self._count(logits, y)
            self._finish()
            losses.append(total / len(self.folds[fold][1]))
        return losses


class Floor:
    """Only the matmuls of the stacked training, as the fit calls them."""

    def __init__(self, widths: Sequence[int], development: Development) -> None:
        self.widths = widths
        self.replicas = len(development.folds)
        rows = min(len(train) for train, _ in development.folds)
        inputs = Stacked(widths, development).fit.preprocessing.width
        full, rest = divmod(rows, BATCH)
        self.batches = [list(self._matmuls(BATCH, inputs))] * full
        if rest > 1:
            self.batches.append(list(self._matmuls(rest, inputs)))

    def _matmuls(self, rows: int, inputs: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Both factors and the place of the product: forward, weights, and input but once."""

        def draw(*shape: int) -> Tensor:
            return torch.randn(self.replicas, *shape)

        for layer, (a, b) in enumerate(pairwise([inputs, *self.widths])):
            x, weight, gradient = draw(rows, a), draw(a, b), draw(rows, b)
            yield x, weight, draw(rows, b)
            yield x.transpose(1, 2), gradient, draw(a, b)
            if layer:
                yield gradient, weight.transpose(1, 2), draw(rows, a)
        x, weight, gradient = draw(rows, self.widths[-1]), draw(1, self.widths[-1]), draw(1, rows)
        yield weight, x.transpose(1, 2), draw(1, rows)
        yield gradient, x, draw(1, self.widths[-1])
        yield gradient.transpose(1, 2), weight, draw(rows, self.widths[-1])

    def train(self) -> None:
        for batch in self.batches:
            for a, b, out in batch:
                matmul.product(a, b, out=out)

    def score(self) -> list[float]:
        return []


LOOPS: dict[str, Callable[[Sequence[int], Development], Loop]] = {
    "reference": Reference,
    "plain": Plain,
    "stacked": Stacked,
    "mkl": StackedMKL,
    "floor": Floor,
}


def loops_of(
    widths: Sequence[int] | None, development: Development
) -> tuple[str, int, dict[str, Loop]]:
    """Name, steps an epoch and loops of a perceptron, or of nearest neighbours."""
    torch.manual_seed(0)
    if widths is None:
        rows = min(len(train) for train, _ in development.folds)
        return (
            "neighbours",
            -(-rows // neighbours.BATCH),
            {
                "plain": neighbours.Plain(development),
                "stacked": neighbours.Stacked(development),
            },
        )
    made = {name: make(widths, development) for name, make in LOOPS.items()}
    floor = made["floor"]
    assert isinstance(floor, Floor)
    return "-".join(map(str, widths)), len(floor.batches), made


def measure(
    widths: Sequence[int] | None, development: Development, data_source: str, repeats: int
) -> list[dict[str, Any]]:
    """Rows of the table for one network; None means nearest neighbours."""
    network, steps, loops = loops_of(widths, development)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in loops}
    for repeat in range(repeats + 1):
        for name, loop in loops.items():
            wall, began = time.perf_counter(), time.thread_time()
            loop.train()
            trained = time.thread_time()
            losses = loop.score()
            ended = time.thread_time()
            assert np.isfinite(losses).all()
            if repeat:  # the first epoch warms up
                seconds = ended - began, trained - began, time.perf_counter() - wall
                times[name].append(seconds)
    epoch, training, walls = (
        {n: np.array(t)[:, i] * 1e3 for n, t in times.items()} for i in (0, 1, 2)
    )
    rows = min(len(train) for train, _ in development.folds)
    out = []
    for name in loops:
        row: dict[str, Any] = {
            "network": network,
            "loop": name,
            "data_source": data_source,
            "machine": machine(),
            "versions": f"torch {torch.__version__}",
            "folds": len(development.folds),
            "rows": rows,
            "steps": steps,
            "repeats": repeats,
            "wall_ms": float(np.median(walls[name])),
        }
        if "reference" in loops and name != "floor":
            faster = np.median(epoch["reference"] / epoch[name])
            row["reference_over_epoch"] = float(faster)
        if "floor" in loops:
            row["training_over_floor"] = float(np.median(training[name] / training["floor"]))
        row["plain_over_epoch"] = float(np.median(epoch["plain"] / epoch[name]))
        for what, values in (("epoch", epoch[name]), ("training", training[name])):
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            row |= {f"{what}_ms": middle, f"{what}_ms_low": low, f"{what}_ms_high": high}
            row[f"{what}_ms_best"] = values.min()
        out.append(row)
    return out


def main(
    repeats: Annotated[int, typer.Option(help="Epochs of each loop and network.")] = 11,
    output: Annotated[Path, typer.Option(help="The table.")] = PUBLISHED,
) -> None:
    """Measures, prints and publishes."""
    prepare_process(1)
    given = os.environ.get("TUNE_STEEL_DATA")
    table = load_steel(None, "auto" if given else "stand-in")
    task = steel_task(table, "binary")
    development, _, _ = prepare(task, freeze(task, seed=0, split=task.split, folds=5))
    rows = [
        row for n in (*NETWORKS, None) for row in measure(n, development, table.source, repeats)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(output, rows, SCHEMA)
    print(f"{table.source}, one thread, CPU time, median of {repeats} (middle half)")
    print(
        f"{'network':13}{'loop':9}{'epoch ms':^23}{'training ms':^23}"
        f"{'reference/it':>13}{'plain/it':>10}{'x floor':>9}"
    )
    for r in pq.read_table(output).to_pylist():
        spans = "".join(
            f"{r[f'{what}_ms']:7.1f} ({r[f'{what}_ms_low']:6.1f} {r[f'{what}_ms_high']:6.1f})"
            for what in ("epoch", "training")
        )
        ratios = (
            "-".rjust(width) if r[ratio] is None else f"{r[ratio]:{width}.2f}"
            for ratio, width in (
                ("reference_over_epoch", 13),
                ("plain_over_epoch", 10),
                ("training_over_floor", 9),
            )
        )
        print(f"{r['network']:12} {r['loop']:9}{spans}{''.join(ratios)}")


if __name__ == "__main__":
    typer.run(main)
