"""What the nested benchmark compares: each method from the same rows to test probabilities.

A method is a function from a `Fold` to an `Outcome`. It sees the outer training rows and the
features of the outer test rows, never their classes, and may use as many threads as the fold
says. This module holds the product itself, scikit-learn's models and the reference solution's
recipe; `boosters.py` holds the boosters, `outside.py` what needs an environment of its own.
"""

from __future__ import annotations

import contextlib
import copy
import io
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks.fit import plain_network
from tune_steel.budget import Budget
from tune_steel.data import Table
from tune_steel.features import Floats, Ints
from tune_steel.fit import EarlyStopping
from tune_steel.job import run_problem
from tune_steel.options import Options, Resources, default_grace_period
from tune_steel.problem import Problem, ask, assemble
from tune_steel.ray_session import RaySession
from tune_steel.run_folder import read_record
from tune_steel.seeds import derive
from tune_steel.splits import cut
from tune_steel.tasks import STEEL_TASKS, Task


class MissingError(Exception):
    """What a method needs is not there; the message is a note of the table."""


@dataclass(frozen=True)
class Settings:
    """What is the same for all methods and folds.

    Attributes:
        trials: Configs that a search may try, the product's and the boosters'.
        max_epochs: Epochs of a trial of the product.
        inner_folds: Folds of the outer training rows that a search is judged by.
        seed: Every other seed is derived from it.
        threads: CPUs.
        python: Interpreter of the environment for `outside.py`.
        space: Search space of the product; None is the task's own.
    """

    trials: int
    max_epochs: int
    inner_folds: int
    seed: int
    threads: int
    python: Path | None = None
    space: Path | None = None


@dataclass(frozen=True)
class Fold:
    """One outer fold of one task.

    Attributes:
        table: The table, for the product's records.
        task: Rows, classes, features.
        train: Positions of the outer training rows, sorted.
        test: Positions of the outer test rows, sorted.
        seed: Seed of this task, repeat and fold.
        settings: What all folds have in common.
        earlier: Of the product's own cell on this fold: its `epochs` and `seconds`, if it ran.
    """

    table: Table
    task: Task
    train: Ints
    test: Ints
    seed: int
    settings: Settings
    earlier: dict[str, float] = field(default_factory=dict)

    @property
    def x(self) -> Floats:
        """Features of the outer training rows [n, F]."""
        return self._matrix(self.train)

    @property
    def y(self) -> Ints:
        """Their classes [n]."""
        return self.task.y[self.train]

    @property
    def x_test(self) -> Floats:
        """Features of the outer test rows [m, F]."""
        return self._matrix(self.test)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.task.classes)

    def _matrix(self, rows: Ints) -> Floats:
        x: Floats = self.task.frame.iloc[rows].to_numpy(dtype=np.float64)
        return x


@dataclass
class Outcome:
    """What a method gave.

    Attributes:
        probabilities: Test probabilities [m, C] of each model, by its name in the table.
        notes: What a reader of the table should know.
        epochs: Training epochs of all trials of the product.
    """

    probabilities: dict[str, Floats]
    notes: str = ""
    epochs: int | None = None


Method: TypeAlias = Callable[[Fold], Outcome]


def problem_of(fold: Fold, options: Options) -> Problem:
    """The product's problem: the outer test rows are its sealed test rows."""
    shares = (
        (len(fold.train) - len(fold.test)) / len(fold.task.y),
        len(fold.test) / len(fold.task.y),
        len(fold.test) / len(fold.task.y),
    )
    splits = cut(
        fold.task,
        fold.train,
        fold.test,
        seed=fold.seed,
        validation=len(fold.test),
        folds=options.folds,
    )
    return assemble(ask(options, fold.table, fold.task), splits, shares)


def _product(
    fold: Fold,
    search: Literal["tpe", "random"],
    scheduler: Literal["asha", "none"],
    budget: Budget,
    *,
    tries: bool = False,
) -> Outcome:
    """A run of the product, with or without the configs that its space says to try first."""
    settings = fold.settings
    with TemporaryDirectory() as folder:
        own = fold.task.name not in STEEL_TASKS
        options = Options(
            task=None if own else fold.task.name,
            budget=budget,
            data=None,
            target="target" if own else None,
            openml_id=None,
            source="auto",
            folds=settings.inner_folds,
            split=None,
            space=settings.space,
            max_epochs=settings.max_epochs,
            grace_period=default_grace_period(settings.max_epochs),
            reduction_factor=3,
            scheduler=scheduler,
            search=search,
            resources=Resources(1.0, 0.0, settings.threads),
            max_failures=2,
            warm_start=(),
            tries=(),
            seed=fold.seed,
            output=Path(folder),
            address=None,
            threshold="none",
            profile=False,
            dry_run=False,
        )
        path = Path(folder) / "run"
        path.mkdir()
        problem = problem_of(fold, options)
        if not tries:
            problem = replace(problem, space=replace(problem.space, tries=()))
        log = io.StringIO()
        with (
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            RaySession(options.address, options.resources) as session,
        ):
            code = run_problem(options, problem, path, session)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(f"the search ended with {code}: {log.getvalue().splitlines()[-1]}")
        rows = pq.read_table(path / "predictions.parquet").to_pandas()
        record = read_record(path)
    rows = rows[(rows["split"] == "test") & rows["seed"].isna()]
    columns = [f"p{c}" for c in range(fold.classes)]
    wanted = fold.task.rows[fold.test]
    found = {
        str(model): part.set_index("row").loc[wanted, columns].to_numpy(dtype=np.float64)
        for model, part in rows.groupby("model", sort=False)
    }
    states = record["trials"]["states"]
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return Outcome(found, f"trials: {ended}", int(record["trials"]["epochs"]))


def tune_steel(fold: Fold) -> Outcome:
    """The product's whole job: TPE and ASHA, choice, retraining; each of its models is a row."""
    return _product(fold, "tpe", "asha", Budget(fold.settings.trials), tries=True)


def without_try(fold: Fold) -> Outcome:
    """The same without the space's `[[try]]`: what they are worth (`benchmarks/starts.py`)."""
    out = _product(fold, "tpe", "asha", Budget(fold.settings.trials))
    return _named("without try", out)


def random_search(fold: Fold) -> Outcome:
    """The product without its ideas: random configs, none placed, none stopped by the others.

    It may train as many epochs as the product's search did on the same fold, and not as many
    trials: that would give it several times the compute, because ASHA stops most trials early.
    """
    if "epochs" not in fold.earlier:
        raise MissingError("it gets the epochs of tune_steel on this fold, which has not run")
    budget = Budget(100_000, epochs=int(fold.earlier["epochs"]))
    return _named("random search", _product(fold, "random", "none", budget))


def _named(prefix: str, out: Outcome) -> Outcome:
    chosen = {f"{prefix}: {k}": v for k, v in out.probabilities.items() if k in _CHOSEN}
    return replace(out, probabilities=chosen)


_CHOSEN = ("tuned", "bagged", "ensemble")


def reference(fold: Fold) -> Outcome:
    """The reference solution's networks, class weights and stopping on our rows.

    512-256-128 with batch norm and dropout .35, Adam 1e-3, batches of 32; a ninth of the training
    rows, stratified, is what the plateau rule and early stopping see, and the weights of the
    best epoch are kept. The loss is on logits: its twofold sigmoid is `reference.py`'s affair.
    Its recipe has no seven classes; they get the weights of our default config.
    """
    seed, classes = derive(fold.seed, "reference"), fold.classes
    train, val = train_test_split(
        np.arange(len(fold.y)), test_size=1 / 9, stratify=fold.y, random_state=seed
    )
    scaler = StandardScaler().fit(fold.x[train])
    x, x_val, x_test = (
        torch.tensor(scaler.transform(rows), dtype=torch.float32)
        for rows in (fold.x[train], fold.x[val], fold.x_test)
    )
    y, y_val = torch.tensor(fold.y[train]), torch.tensor(fold.y[val])
    loss = _reference_loss(fold.task.name, y, classes)
    torch.set_num_threads(1)  # a second one only waits, in batches this small
    torch.manual_seed(seed)
    network = plain_network(x.shape[1], (512, 256, 128), 1 if classes == 2 else classes)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    epochs, patience = (50, 10) if classes == 2 else (100, 20)
    stopping = EarlyStopping(patience, 0.01)
    best, kept = np.inf, copy.deepcopy(network.state_dict())
    for _ in range(epochs):
        network.train()
        for batch in torch.split(torch.randperm(len(y)), 32):
            if len(batch) > 1:  # batch norm has no variance of one row
                optimizer.zero_grad()
                loss(network(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        network.eval()
        with torch.inference_mode():
            value = float(loss(network(x_val), y_val))
        if value < best:
            best, kept = value, copy.deepcopy(network.state_dict())
        plateau.step(value)
        if stopping.step(value):
            break
    network.load_state_dict(kept)
    network.eval()
    with torch.inference_mode():
        scores = network(x_test).double()
    if classes == 2:
        positive = scores.sigmoid()
        p = torch.cat([1 - positive, positive], dim=1)
    else:
        p = scores.softmax(dim=1)
    return Outcome({"reference": p.numpy()})


def _reference_loss(task: str, y: Tensor, classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    if classes == 2:
        # Its weight is for Other_Faults; another table gets none.
        weight = torch.tensor(2.0 if task == "binary" else 1.0)
        return lambda scores, y: functional.binary_cross_entropy_with_logits(
            scores[:, 0], y.float(), pos_weight=weight
        )
    if task == "multiclass":
        weights = torch.tensor([4.0, 4.0, 2.0, 3.0, 5.0, 5.0])
    else:
        weights = (len(y) / (classes * y.bincount(minlength=classes))) ** 0.5
    return lambda scores, y: functional.cross_entropy(scores, y, weight=weights.float())


def _scikit_learn(name: str, make: Callable[[Fold, int], Any]) -> Method:
    def method(fold: Fold) -> Outcome:
        model = make(fold, derive(fold.seed, name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(fold.x, fold.y)
        return Outcome({name: spread(model.predict_proba(fold.x_test), model.classes_, fold)})

    return method


def spread(p: Any, seen: NDArray[Any], fold: Fold) -> Floats:
    """Probabilities [m, C] with a column for each class of the task, also one not trained on."""
    out = np.zeros((len(p), fold.classes))
    out[:, np.asarray(seen, dtype=np.int64)] = p
    out /= out.sum(axis=1, keepdims=True)  # some are in single precision
    return out


def _logistic(fold: Fold, seed: int) -> Any:
    grid = GridSearchCV(
        LogisticRegression(max_iter=3000, random_state=seed),
        {"C": [0.01, 0.1, 1.0, 10.0, 100.0]},
        scoring="neg_log_loss",
        cv=fold.settings.inner_folds,
    )
    return make_pipeline(StandardScaler(), grid)


class _Forest:
    """A forest of 500 trees, and one vote more that all classes share.

    Its leaves are pure, so a class that no tree votes for has probability 0, and log-loss is then
    infinite where that is the row's class.
    """

    def __init__(self, kind: Any, seed: int, threads: int) -> None:
        self._model = kind(_TREES, random_state=seed, n_jobs=threads)

    def fit(self, x: Floats, y: Ints) -> None:
        self._model.fit(x, y)
        self.classes_ = self._model.classes_

    def predict_proba(self, x: Floats) -> Floats:
        share = 1 / len(self.classes_)
        p: Floats = (_TREES * self._model.predict_proba(x) + share) / (_TREES + 1)
        return p


_TREES = 500


def _forest(kind: Any) -> Callable[[Fold, int], Any]:
    return lambda fold, seed: _Forest(kind, seed, fold.settings.threads)


METHODS: dict[str, Method] = {
    "tune_steel": tune_steel,
    "logistic regression": _scikit_learn("logistic regression", _logistic),
    "random forest": _scikit_learn("random forest", _forest(RandomForestClassifier)),
    "extra trees": _scikit_learn("extra trees", _forest(ExtraTreesClassifier)),
    "reference": reference,
    "random search": random_search,
    "without try": without_try,
}
"""By the name of the cell. Of a cell that runs the product, a row is a model of the run."""
