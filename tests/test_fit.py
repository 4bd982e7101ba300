import gc
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from plain_network import PLAIN_ACTIVATIONS, copy_linear
from torch import nn

from tune_steel.config import TrialConfig
from tune_steel.data import Table
from tune_steel.dropout import DropoutMasks
from tune_steel.errors import NonFiniteLossError
from tune_steel.features import Features
from tune_steel.fit import EarlyStopping, Fit, prepare_process
from tune_steel.fused import Adam, Backprop
from tune_steel.loss import TrainingLoss
from tune_steel.scores import score_names
from tune_steel.seeds import derive
from tune_steel.splits import freeze, prepare
from tune_steel.tasks import own_task

SEEDS = (11, 12, 13)


pytestmark = pytest.mark.usefixtures("one_thread")


def develop(classes=3, folds=3):
    """150 rows of which 120 are development rows: 80 train, 40 validate in each of 3 folds."""
    rng = np.random.default_rng(classes)
    y = rng.choice(classes, size=150, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    size = rng.normal(size=150) + 0.8 * y
    frame = pd.DataFrame(
        {
            "row": rng.permutation(150),
            "size": size,
            "area": np.exp(2 * rng.normal(size=150) + 0.4 * y),
            "noise": rng.normal(size=150),
            "gaps": np.where(rng.random(150) < 0.2, np.nan, size + rng.normal(size=150)),
            "shade": rng.choice(["red", "green", "blue"], size=150),
            "verdict": [f"class {c}" for c in y],
        }
    )
    task = own_task(Table("plates", frame, "file", "hash"), "verdict")
    splits = freeze(task, seed=0, split=(0.6, 0.2, 0.2), folds=folds)
    development, _, _ = prepare(task, splits)
    return development


def config_of(**settings):
    """A small config; settings of all sections side by side."""
    tree = {
        "model": {"depth": 2, "width_1": 12, "width_2": 7, "dropout": 0.3},
        "loss": {},
        "optimizer": {"lr": 1e-2, "batch_size": 32},
        "schedule": {"plateau_patience": 50, "early_stop_patience": 50},
        "preprocessing": {},
    }
    sections = {
        "model": ("depth", "width_1", "width_2", "width_3", "activation", "batch_norm", "dropout"),
        "loss": (
            *("pos_weight", "class_weight_power", "class_weights", "label_smoothing"),
            "focal_gamma",
        ),
        "optimizer": ("name", "lr", "weight_decay", "batch_size"),
        "schedule": (
            "plateau_factor",
            "plateau_patience",
            "early_stop_patience",
            "early_stop_min_delta",
        ),
        "preprocessing": ("scaling",),
    }
    for section, names in sections.items():
        tree[section] |= {name: settings.pop(name) for name in names if name in settings}
    assert not settings
    return TrialConfig.model_validate(tree)


def in_double(fit):
    """The same fit in double precision.

    Where a gradient is zero but for rounding, Adam blows rounding up to whole steps. In double
    precision it stays below Adam's epsilon, so that two ways of computing the same thing stay
    together.
    """
    fit.network.double()
    fit._backprop = Backprop(fit.network)
    fit._optimizer = Adam(fit._config.optimizer, fit._backprop)
    fit._x = fit._x.double()
    return fit


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def same_state(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def state_of(fit):
    return {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}


def replica_of(state, replica):
    return {name: tensor[replica : replica + 1] for name, tensor in state.items()}


class PlainRun:
    """One replica, trained with plain torch.nn by a loop of its own, in double precision."""

    def __init__(self, fit, config, development, fold, seed):
        self.config, self.development, self.fold = config, development, fold
        self.x = torch.tensor(fit.preprocessing.transform(development.features)[0]).double()
        self.y = torch.tensor(development.y)
        self.two = len(development.classes) == 2
        self.linears = [copy_linear(stacked, 0) for stacked in fit.network.linears]
        self.norms = [
            nn.BatchNorm1d(width) if config.model.batch_norm else nn.Identity()
            for width in config.model.widths
        ]
        self.head = copy_linear(fit.network.head, 0)
        self.network = nn.ModuleList([*self.linears, *self.norms, self.head]).double()
        self.activation = PLAIN_ACTIVATIONS[config.model.activation]()
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer.name]
        self.optimizer = optimizer(
            self.network.parameters(),
            lr=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=config.schedule.plateau_factor,
            patience=config.schedule.plateau_patience,
        )
        self.batches = torch.Generator().manual_seed(derive(seed, "batches"))
        self.masks = DropoutMasks(
            config.model.widths,
            config.model.dropout,
            [torch.Generator().manual_seed(derive(seed, "dropout"))],
        )

    def forward(self, x, masks=None):
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self.activation(norm(linear(x)))
            if masks:
                x = x * masks[layer][0]
        return self.head(x)

    def training_loss(self, logits, y):
        loss = self.config.loss
        if self.two:
            smooth = loss.label_smoothing
            criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(loss.pos_weight).double())
            return criterion(logits[:, 0], y.double() * (1 - smooth) + smooth / 2)
        if loss.class_weights:
            weights = [loss.class_weights[name] for name in self.development.classes]
        else:
            counts = np.bincount(self.development.y)
            weights = (len(self.y) / (len(counts) * counts)) ** loss.class_weight_power
        weight = torch.tensor(np.array(weights))
        return nn.CrossEntropyLoss(weight, label_smoothing=loss.label_smoothing)(logits, y)

    def validation_loss(self):
        self.network.eval()
        rows = torch.tensor(self.fold[1])
        with torch.no_grad():
            logits = self.forward(self.x[rows])
        if self.two:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        weight = torch.tensor(self.development.reference_weights)
        return float(nn.CrossEntropyLoss(weight)(logits, self.y[rows]))

    def epoch(self):
        """Mean training loss, validation loss and learning rate of one epoch."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.network.train()
        train = torch.tensor(self.fold[0])
        order = train[torch.randperm(len(train), generator=self.batches)]
        total = 0.0
        for rows in torch.split(order, self.config.optimizer.batch_size):
            masks = self.masks.draw(len(rows)) if self.config.model.dropout else None
            loss = self.training_loss(self.forward(self.x[rows], masks), self.y[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(rows)
        val_loss = self.validation_loss()
        self.plateau.step(val_loss)
        return total / len(train), val_loss, learning_rate


# 80 training rows: the last batch of 32 has 16 rows, that of 30 has 20, that of 64 has 16.
@pytest.mark.parametrize(
    ("classes", "settings"),
    [
        (2, {"name": "adam", "pos_weight": 2.5}),
        (2, {"name": "adamw", "weight_decay": 0.1, "pos_weight": 0.6, "label_smoothing": 0.1}),
        (2, {"pos_weight": 1.0, "batch_norm": False, "dropout": 0.0, "activation": "silu"}),
        (3, {"name": "adam", "weight_decay": 0.01, "class_weight_power": 1.0, "batch_size": 30}),
        (3, {"name": "adamw", "class_weight_power": 0.5, "label_smoothing": 0.2}),
        (
            3,
            {
                "class_weights": {"class 0": 3.0, "class 1": 0.5, "class 2": 1.5},
                "activation": "gelu",
                "depth": 3,
                "width_3": 5,
                "batch_size": 64,
            },
        ),
        (3, {"class_weight_power": 0.0, "batch_norm": False, "scaling": "quantile"}),
    ],
)
def test_a_fit_of_one_replica_equals_a_plain_loop_over_torch_nn(classes, settings):
    config = config_of(**settings, lr=0.1, plateau_patience=0, plateau_factor=0.3)
    development = develop(classes)
    fold = development.folds[0]
    fit = in_double(Fit(config, development, [fold], [SEEDS[0]]))
    plain = PlainRun(fit, config, development, fold, SEEDS[0])
    records = list(fit.epochs(16))
    assert len(records) == 16
    for record in records:
        train_loss, val_loss, learning_rate = plain.epoch()
        assert record.train_loss == pytest.approx([train_loss], rel=1e-6)
        assert record.val_loss == pytest.approx(val_loss, rel=1e-6)
        assert record.learning_rate == pytest.approx(learning_rate, rel=1e-12)
    assert records[-1].learning_rate < 0.1  # a plateau was among the epochs
    for layer, stacked in enumerate((*fit.network.linears, fit.network.head)):
        ours, theirs = copy_linear(stacked, 0), [*plain.linears, plain.head][layer]
        for name, parameter in theirs.named_parameters():
            assert_close(ours.get_parameter(name), parameter)
    if config.model.batch_norm:
        for ours, theirs in zip(fit.network.norms, plain.norms, strict=True):
            assert_close(ours.weight[0, 0], theirs.weight)
            assert_close(ours.bias[0, 0], theirs.bias)
            assert_close(ours.running_mean[0, 0], theirs.running_mean)
            assert_close(ours.running_var[0, 0], theirs.running_var)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_replicas_on_their_folds_equal_separate_fits_of_one_replica(classes, batch_norm):
    config = config_of(batch_norm=batch_norm)
    development = develop(classes)
    together = in_double(Fit(config, development, development.folds, SEEDS))
    records = list(together.epochs(4))
    assert len(records) == 4
    for r, (fold, seed) in enumerate(zip(development.folds, SEEDS, strict=True)):
        alone = in_double(Fit(config, development, [fold], [seed]))
        for record, own in zip(records, alone.epochs(4), strict=True):
            assert record.train_loss[r] == pytest.approx(own.train_loss[0], rel=1e-6)
            for name in score_names(classes):
                assert record.scores[name][r] == pytest.approx(
                    own.scores[name].item(), abs=1e-6
                ), name
        state = state_of(alone)
        for name, tensor in replica_of(state_of(together), r).items():
            assert_close(tensor, state[name])


@pytest.mark.parametrize("scaling", ["standard", "robust", "quantile"])
def test_replicas_equal_separate_fits_that_repeat_their_learning_rates(scaling):
    config = config_of(lr=0.05, plateau_patience=0, plateau_factor=0.2, scaling=scaling)
    development = develop()
    together = in_double(Fit(config, development, development.folds, SEEDS))
    records = list(together.epochs(8))
    assert len({record.learning_rate for record in records}) > 1
    for r, (fold, seed) in enumerate(zip(development.folds, SEEDS, strict=True)):
        alone = in_double(Fit(config, development, [fold], [seed]))
        for record in records:
            loss = alone.train_epoch(record.learning_rate)
            assert record.train_loss[r] == pytest.approx(loss[0], rel=1e-6)
            assert record.scores["loss"][r] == pytest.approx(alone.score()["loss"][0], rel=1e-6)
        state = state_of(alone)
        for name, tensor in replica_of(state_of(together), r).items():
            assert_close(tensor, state[name])


def test_a_replica_starts_alike_alone_and_among_others_bit_for_bit():
    development = develop()
    together = Fit(config_of(), development, development.folds, SEEDS)
    for r, (fold, seed) in enumerate(zip(development.folds, SEEDS, strict=True)):
        alone = Fit(config_of(), development, [fold], [seed])
        assert same_state(replica_of(together.network.state_dict(), r), alone.network.state_dict())


def test_replicas_of_the_same_fold_differ_by_their_seeds_only():
    development = develop()
    fit = Fit(config_of(), development, [development.folds[0]] * 3, (1, 1, 2))
    for trained in (False, True):
        if trained:
            in_double(fit).train_epoch(0.01)
        first, same, other = (replica_of(fit.network.state_dict(), r) for r in range(3))
        for name, tensor in first.items():
            assert_close(tensor, same[name])
        assert not torch.isclose(first["head.weight"], other["head.weight"]).any()


@pytest.mark.parametrize(
    ("classes", "one", "other"),
    [
        (2, {"pos_weight": 0.5}, {"pos_weight": 8.0}),
        (3, {"class_weight_power": 0.0}, {"class_weight_power": 2.0}),
        (
            3,
            {"class_weight_power": 1.0},
            {"class_weights": {"class 0": 9.0, "class 1": 1.0, "class 2": 0.1}},
        ),
        (3, {"label_smoothing": 0.0}, {"label_smoothing": 0.3}),
    ],
)
def test_two_configs_that_differ_in_class_weight_only_report_the_same_val_loss(
    classes, one, other
):
    development = develop(classes)
    # Steps this small change no weight, so the two have the same logits after the epoch.
    first, second = (
        Fit(config_of(**loss, lr=1e-30), development, development.folds, SEEDS)
        for loss in (one, other)
    )
    (first_record,), (second_record,) = list(first.epochs(1)), list(second.epochs(1))
    for ours, theirs in zip(first.validation_logits(), second.validation_logits(), strict=True):
        assert np.array_equal(ours, theirs)
    assert first_record.val_loss == second_record.val_loss
    for name, values in first_record.scores.items():
        assert np.array_equal(values, second_record.scores[name]), name
    assert (first_record.train_loss != second_record.train_loss).all()


def test_two_configs_that_differ_in_class_weight_score_the_same_trained_weights_alike():
    development = develop(2)
    trained = Fit(config_of(pos_weight=0.5), development, development.folds, SEEDS)
    for _ in range(3):
        trained.train_epoch(0.01)
    other = Fit(config_of(pos_weight=8.0), development, development.folds, SEEDS)
    other.network.load_state_dict(trained.network.state_dict())
    expected = trained.score()
    for name, values in other.score().items():
        assert np.array_equal(values, expected[name]), name


def test_class_weights_do_change_what_is_learnt():
    development = develop(2)
    means = []
    for pos_weight in (0.1, 10.0):
        fit = Fit(config_of(pos_weight=pos_weight), development, development.folds, SEEDS)
        for _ in range(5):
            fit.train_epoch(0.02)
        means.append(np.mean(np.concatenate(fit.validation_logits())))
    assert means[0] < means[1] - 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_training_loss_and_its_gradient_are_those_of_torch(classes, smoothing):
    weights = {2: {"pos_weight": 3.0}, 3: {"class_weight_power": 0.7}}[classes]
    development = develop(classes)
    config = config_of(**weights, label_smoothing=smoothing)
    loss = TrainingLoss(config, development, torch.device("cpu"))
    generator = torch.Generator().manual_seed(classes)
    shape = (2, 5, 9, 1 if classes == 2 else classes)  # batches, replicas, rows, outputs
    logits = (8 * torch.randn(shape, generator=generator)).double().requires_grad_()
    y = torch.randint(0, classes, shape[:3], generator=generator)
    targets = loss.targets(y, torch.float64)
    for index in np.ndindex(2, 5):
        if classes == 2:
            target = y[index].double() * (1 - smoothing) + smoothing / 2
            expected = nn.functional.binary_cross_entropy_with_logits(
                logits[index].squeeze(1), target, pos_weight=torch.tensor(3.0).double()
            )
        else:
            expected = nn.functional.cross_entropy(
                logits[index],
                y[index],
                weight=torch.tensor(development.reference_weights**0.7),
                label_smoothing=smoothing,
            )
        assert_close(loss.values(logits, targets)[index], expected)
        (gradient,) = torch.autograd.grad(expected, logits)
        own = loss.gradient(logits.detach(), *targets)
        assert_close(own[index], gradient[index])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_focal_loss_is_its_formula_and_its_gradient_is_autograds(classes, smoothing):
    weights = {2: {"pos_weight": 3.0}, 3: {"class_weight_power": 0.7}}[classes]
    config = config_of(**weights, label_smoothing=smoothing, focal_gamma=1.5)
    development = develop(classes)
    loss = TrainingLoss(config, development, torch.device("cpu"))
    generator = torch.Generator().manual_seed(classes)
    shape = (5, 9, 1 if classes == 2 else classes)
    logits = (3 * torch.randn(shape, generator=generator)).double().requires_grad_()
    y = torch.randint(0, classes, shape[:2], generator=generator)
    targets = loss.targets(y, torch.float64)
    w = [1.0, 3.0] if classes == 2 else development.reference_weights**0.7
    w = torch.tensor(w).double()
    q = ((1 - smoothing) * nn.functional.one_hot(y, classes) + smoothing / classes) * w
    p = torch.cat([-logits, logits], -1).sigmoid() if classes == 2 else logits.softmax(-1)
    rows = -(q * (1 - p) ** 1.5 * p.log()).sum(-1)
    expected = rows.sum(1) / (9.0 if classes == 2 else w[y].sum(1))
    assert_close(loss.values(logits, targets), expected)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    assert_close(loss.gradient(logits.detach(), *targets), gradient)


FAMILIES = {
    "resnet": {"blocks": 1, "width": 8},
    "tabm": {"depth": 1, "width_1": 8, "members": 3},
    "nca": {"blocks": 1, "width": 8},
}


def family_config(family, dropout=0.3, **schedule):
    embedded = {"embedding": "pbld", "embedding_width": 3, "frequency_scale": 0.3}
    return TrialConfig.model_validate(
        {
            "model": {"family": family, "dropout": dropout, **FAMILIES[family], **embedded},
            "optimizer": {"lr": 1e-2, "batch_size": 32},
            "schedule": {"early_stop_patience": 50, **schedule},
        }
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_the_same_bit_for_bit_again(family, classes):
    curves = []
    for _ in range(2):
        development = develop(classes)
        fit = Fit(family_config(family), development, development.folds, SEEDS)
        records = list(fit.epochs(6))
        curves.append([(r.val_loss, *r.train_loss) for r in records])
        assert records[-1].train_loss.mean() < records[0].train_loss.mean()
    assert curves[0] == curves[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_of_every_family_is_the_run_that_it_would_be_alone(family):
    development = develop()
    config = family_config(family)
    folds = [development.folds[0]] * 3  # equally large
    together = Fit(config, development, folds, SEEDS)
    alone = Fit(config, development, folds[1:2], SEEDS[1:2])
    for _ in range(2):
        losses = together.train_epoch(1e-3)[1], alone.train_epoch(1e-3)[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_neighbours_are_training_rows_of_the_own_fold_only():
    development = develop()
    fit = Fit(family_config("nca"), development, development.folds, SEEDS)
    for r, (train, _) in enumerate(development.folds):
        own = fit._x[r, torch.tensor(train)]
        for row in fit.network.neighbours[r]:
            assert (own == row).all(1).any()
    index = fit._batches_of(torch.arange(80).repeat(3, 1), slice(16, 80), 32)
    assert index.shape == (2, 3, 32 + 10)
    assert index[1, 0].tolist() == [*range(48, 80), *range(10)]  # once around


@pytest.mark.parametrize("batch_size", [16, 50, 64, 79, 80, 256])
def test_no_row_is_twice_among_a_batch_and_its_neighbours(batch_size):
    development = develop()
    config = family_config("nca")
    optimizer = config.optimizer.model_copy(update={"batch_size": batch_size})
    config = config.model_copy(update={"optimizer": optimizer})
    fit = Fit(config, development, development.folds, SEEDS)
    order = torch.arange(80).repeat(3, 1)
    seen = []
    for rows, size in fit._blocks():
        index = fit._batches_of(order, rows, size)
        assert index.shape[-1] == min(size + 10, 80)
        for step in index[:, 0].tolist():
            assert len(set(step)) == len(step)
            seen += step[:size]
    assert seen == list(range(len(seen)))
    assert len(seen) >= 79  # a last batch of one row is left out
    assert np.isfinite(fit.train_epoch(1e-2)).all()


def test_a_cosine_falls_over_its_own_epochs_and_ends_the_run():
    development = develop()
    config = family_config("resnet", kind="cosine", cosine_epochs=4)
    fit = Fit(config, development, development.folds, SEEDS)
    records = list(fit.epochs(50))
    expected = [1e-2 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert [r.learning_rate for r in records] == pytest.approx(expected)
    assert [r.converged for r in records] == [False, False, False, True]


def curve():
    """All that six epochs of a small and of a large network give, to the last bit."""
    prepare_process(1)
    return json.dumps([curve_of(width_1=12), curve_of(width_1=512, width_2=300)])


def curve_of(**settings):
    development = develop()
    config = config_of(lr=0.03, plateau_patience=1, **settings)
    fit = Fit(config, development, development.folds, SEEDS)
    lines = [
        [r.train_loss.tolist(), r.val_loss, r.learning_rate, r.best_epoch]
        + [values.tolist() for values in r.scores.values()]
        for r in fit.epochs(6)
    ]
    weights = hashlib.sha256()
    for name, tensor in fit.network.state_dict().items():
        weights.update(name.encode() + tensor.numpy().tobytes())
    return [lines, weights.hexdigest()]


def test_a_fixed_seed_gives_the_same_curve_in_a_process_that_did_other_work_before():
    first = curve()
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002 (the global state must not matter)
    torch.rand(1000)
    development = develop(2)
    other = Fit(config_of(width_1=20, dropout=0.5), development, development.folds, (1, 2, 3))
    other.train_epoch(0.1)
    torch.set_num_threads(2)
    assert curve() == first


def test_a_fixed_seed_gives_the_same_curve_in_another_process():
    printed = subprocess.run(
        [sys.executable, "-c", "import test_fit; print(test_fit.curve())"],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert printed.strip() == curve()


def test_fits_that_take_turns_give_the_curves_that_they_give_alone():
    development = develop()
    config = config_of()

    def losses(fit, epochs=3):
        return [(r.train_loss.tolist(), r.val_loss) for r in fit.epochs(epochs)]

    def fit(seed):
        return Fit(config, development, development.folds[:1], [seed])

    alone = [losses(fit(1)), losses(fit(2))]
    turns = zip(fit(1).epochs(3), fit(2).epochs(3), strict=True)
    together = [[(r.train_loss.tolist(), r.val_loss) for r in pair] for pair in turns]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_another_seed_gives_another_curve():
    development = develop()
    losses = {
        next(Fit(config_of(), development, development.folds[:1], [seed]).epochs(1)).val_loss
        for seed in range(3)
    }
    assert len(losses) == 3


def stops_after(losses, patience, min_delta):
    stopping = EarlyStopping(patience, min_delta)
    for epoch, loss in enumerate(losses, start=1):
        if stopping.step(loss):
            return epoch
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "last"),
    [
        ([1.0, 1.0, 1.0, 1.0], 3, 0.0, 4),
        ([1.0, 1.0, 1.0], 3, 0.0, None),
        ([1.0, 2.0], 1, 0.0, 2),
        ([1.0, 0.9, 0.8, 0.7], 1, 0.0, None),
        # An improvement of just the least one does not count, one above it does.
        ([1.0, 0.75, 0.5], 1, 0.25, 2),
        ([1.0, 0.7, 0.4], 1, 0.25, None),
        # Small improvements add up until they count against the last one that counted.
        ([1.0, 0.95, 0.9, 0.85, 0.8], 3, 0.125, None),
        ([1.0, 0.95, 0.9, 0.85, 0.8], 2, 0.125, 3),
        # Waiting starts anew after an improvement.
        ([1.0, 1.1, 0.8, 0.9, 0.9, 0.9], 3, 0.0, 6),
        # Worse epochs do not move the mark.
        ([1.0, 5.0, 4.0, 3.0], 3, 0.0, 4),
    ],
)
def test_early_stopping_waits_its_patience_for_an_improvement_above_the_least_one(
    losses, patience, min_delta, last
):
    assert stops_after(losses, patience, min_delta) == last


def test_a_loss_that_does_not_move_ends_the_run_when_patience_is_over():
    development = develop()
    config = config_of(lr=1e-30, batch_norm=False, early_stop_patience=4)
    records = list(Fit(config, development, development.folds, SEEDS).epochs(50))
    assert len({record.val_loss for record in records}) == 1
    assert [record.converged for record in records] == [False] * 4 + [True]
    assert {record.best_epoch for record in records} == {1}


def test_the_learning_rate_falls_after_the_epochs_without_improvement_that_are_borne():
    development = develop()
    config = config_of(lr=1e-7, batch_norm=False, plateau_patience=2, plateau_factor=0.5)
    records = list(Fit(config, development, development.folds, SEEDS).epochs(9))
    # Epoch 1 is the best; 2 and 3 are borne, the fall after 4 shows in 5, the next one in 8.
    factors = [record.learning_rate / 1e-7 for record in records]
    assert factors == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_a_run_that_overfits_ends_by_early_stopping_and_its_best_epoch_can_be_trained_again():
    development = develop()
    config = config_of(
        lr=0.1, plateau_patience=1, early_stop_patience=4, early_stop_min_delta=0.02, dropout=0.1
    )
    fit = Fit(config, development, development.folds, SEEDS)
    records = list(fit.epochs(80))
    losses = [record.val_loss for record in records]

    assert [record.epoch for record in records] == list(range(1, len(records) + 1))
    assert len(records) == stops_after(losses, 4, 0.02) < 80
    assert [record.converged for record in records] == [False] * (len(records) - 1) + [True]
    for record, best in zip(records, np.minimum.accumulate(losses), strict=True):
        assert record.best_val_loss == best == losses[record.best_epoch - 1]
        assert record.val_loss == record.scores["loss"].mean()
    best_epoch = records[-1].best_epoch
    assert best_epoch < len(records)
    assert records[-1].learning_rate < records[0].learning_rate

    replay = Fit(config, development, development.folds, SEEDS)
    for record in records[:best_epoch]:
        replay.train_epoch(record.learning_rate)
    assert replay.score()["loss"].mean() == records[-1].best_val_loss


def test_the_epochs_end_at_the_most():
    development = develop()
    records = list(Fit(config_of(), development, development.folds, SEEDS).epochs(3))
    assert [record.epoch for record in records] == [1, 2, 3]
    assert not any(record.converged for record in records)


def test_a_plateau_is_one_of_the_mean_over_the_replicas():
    development = develop()
    config = config_of(lr=0.05, plateau_patience=1, plateau_factor=0.5)
    records = list(Fit(config, development, development.folds, SEEDS).epochs(10))
    weight = torch.nn.Parameter(torch.zeros(1))
    mirror = torch.optim.SGD([weight], lr=0.05)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(mirror, factor=0.5, patience=1)
    for record in records:
        assert record.learning_rate == mirror.param_groups[0]["lr"]
        plateau.step(float(np.mean(record.scores["loss"])))
    assert records[-1].learning_rate < 0.05


@pytest.mark.parametrize("classes", [2, 3])
def test_a_training_loss_that_is_not_finite_in_one_replica_fails_the_fit(classes):
    development = develop(classes)
    fit = Fit(config_of(), development, development.folds, SEEDS)
    with torch.no_grad():
        fit.network.head.bias[1] = float("nan")
    with pytest.raises(NonFiniteLossError, match="the training loss of epoch 1 is not finite"):
        next(fit.epochs(5))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_validation_loss_that_is_not_finite_in_one_replica_fails_the_fit(classes):
    development = develop(classes)
    fit = Fit(config_of(), development, development.folds, SEEDS)
    epochs = fit.epochs(5)
    next(epochs)
    fit.network.norms[0].running_var[2] = float("nan")  # training does not read it
    with pytest.raises(NonFiniteLossError, match="the validation loss of epoch 2 is not finite"):
        next(epochs)


def test_steps_that_are_too_large_by_far_fail_the_fit():
    development = develop()
    # Nothing holds the activations: they grow by the learning rate in each of four layers.
    config = config_of(lr=10.0, batch_norm=False, dropout=0.0, early_stop_patience=10_000)
    fit = Fit(config, development, development.folds, SEEDS)
    with torch.no_grad():
        for parameter in fit.network.parameters():
            parameter.mul_(1e15)
    with pytest.raises(NonFiniteLossError, match="not finite"):
        list(fit.epochs(5))


def scrambled(development, positions):
    """Other features, gaps and labels at these positions."""
    rng = np.random.default_rng(99)
    numeric, codes, y = (
        development.features.numeric.copy(),
        development.features.codes.copy(),
        development.y.copy(),
    )
    numeric[positions] = 1000 * rng.normal(size=(len(positions), numeric.shape[1]))
    flagged = list(development.schema.flagged)
    numeric[np.ix_(positions[::2], flagged)] = np.nan
    codes[positions] = rng.integers(-1, 3, size=(len(positions), codes.shape[1]))
    y[positions] = (y[positions] + 1) % len(development.classes)
    return replace(development, features=Features(numeric, codes), y=y)


@pytest.mark.parametrize("scaling", ["standard", "robust", "quantile"])
def test_rows_that_a_replica_does_not_train_on_never_influence_its_training(scaling):
    development = develop()
    config = config_of(scaling=scaling, class_weight_power=1.0)
    train, val = development.folds[0]
    train, outside = train[:60], train[60:]
    states, scores = [], []
    for rows in (development, scrambled(development, np.concatenate([val, outside]))):
        fit = Fit(config, rows, [(train, val)], SEEDS[:1])
        for learning_rate in (0.01, 0.01, 0.003):
            fit.train_epoch(learning_rate)
        states.append(state_of(fit))
        scores.append(fit.score()["loss"].item())
    assert same_state(*states)
    assert scores[0] != scores[1]  # validation rows are what is scored


def test_training_rows_do_influence_training():
    development = develop()
    train, val = development.folds[0]
    states = []
    for rows in (development, scrambled(development, train[:1])):
        fit = Fit(config_of(), rows, [(train, val)], SEEDS[:1])
        fit.train_epoch(0.01)
        states.append(state_of(fit))
    assert not same_state(*states)


@pytest.mark.parametrize(
    "model", [{"depth": 1, "width_1": 12}, {"family": "nca", "blocks": 1, "width": 8}]
)
def test_a_fit_goes_with_its_last_user(model):
    development = develop()
    tree = {"model": model, "optimizer": {"lr": 1e-2, "batch_size": 32}}
    gc.disable()  # workers collect rarely, and a trial's memory should not wait for it
    try:
        fit = Fit(TrialConfig.model_validate(tree), development, development.folds, SEEDS)
        next(fit.epochs(1))
        parameters = weakref.ref(fit._backprop.parameters)
        del fit
        assert parameters() is None
    finally:
        gc.enable()


def test_scoring_changes_nothing_of_the_training():
    development = develop()
    states = []
    for scorings in (0, 2):
        fit = Fit(config_of(), development, development.folds, SEEDS)
        for _ in range(3):
            fit.train_epoch(0.01)
            for _ in range(scorings):
                fit.score()
                fit.validation_logits()
        states.append(state_of(fit))
    assert same_state(*states)


def seen_rows(fit, development, replicas):
    """One epoch's batches, as the positions that each replica was shown, batch by batch."""
    transformed = fit.preprocessing.transform(development.features)[:, :, 0]
    batches = []
    forward = fit._backprop.forward
    fit._backprop.forward = lambda x, masks: batches.append(x.clone()) or forward(x, masks)
    fit.train_epoch(0.001)
    fit._backprop.forward = forward
    position = [{value: i for i, value in enumerate(column)} for column in transformed]
    assert all(len(known) == len(development.y) for known in position)
    return [
        [[position[r][value] for value in batch[r, :, 0].numpy()] for batch in batches]
        for r in range(replicas)
    ]


def test_every_epoch_shows_each_replica_all_of_its_training_rows_once_in_a_new_order():
    development = develop()
    assert development.schema.numeric[0] == "row"
    fit = Fit(config_of(batch_size=32), development, development.folds, SEEDS)
    first, second = (seen_rows(fit, development, 3) for _ in range(2))
    for r, (train, _) in enumerate(development.folds):
        for epoch in (first, second):
            assert [len(batch) for batch in epoch[r]] == [32, 32, 16]
            assert sorted(itertools.chain(*epoch[r])) == sorted(train)
        assert first[r] != second[r]


def test_a_larger_fold_leaves_other_rows_out_in_each_epoch():
    development = develop()
    train, val = development.folds[0]
    folds = [(train, val), (train[:60], val), (train[:65], val)]
    fit = Fit(config_of(batch_size=25), development, folds, SEEDS)
    left_out = []
    for _ in range(2):
        for (rows, _), batches in zip(folds, seen_rows(fit, development, 3), strict=True):
            shown = list(itertools.chain(*batches))
            assert [len(batch) for batch in batches] == [25, 25, 10]
            assert len(set(shown)) == len(shown) == 60
            assert set(shown) <= set(rows)
            left_out.append(set(rows) - set(shown))
    assert [len(rows) for rows in left_out] == [20, 0, 5] * 2
    assert left_out[0] != left_out[3]


def test_a_remainder_of_one_row_is_left_out():
    development = develop()
    fit = Fit(config_of(batch_size=79), development, development.folds, SEEDS)
    for train, batches in zip(
        (train for train, _ in development.folds), seen_rows(fit, development, 3), strict=True
    ):
        assert [len(batch) for batch in batches] == [79]
        assert len(set(batches[0]) & set(train)) == 79


def test_a_batch_larger_than_the_fold_is_the_whole_fold():
    development = develop()
    fit = Fit(config_of(batch_size=4096), development, development.folds, SEEDS)
    assert [len(batch) for batch in seen_rows(fit, development, 3)[0]] == [80]


def test_the_training_loss_of_an_epoch_is_the_mean_over_the_rows_that_were_seen():
    development = develop(2)
    for batch_size in (80, 79, 30):
        config = config_of(
            lr=1e-30, dropout=0.0, batch_norm=False, batch_size=batch_size, pos_weight=1.0
        )
        fit = Fit(config, development, development.folds, SEEDS)
        batches = seen_rows(fit, development, 3)
        losses = Fit(config, development, development.folds, SEEDS).train_epoch(1e-30)
        for r, of_replica in enumerate(batches):
            rows = np.array(list(itertools.chain(*of_replica)))
            seen = replace(development, folds=((rows, rows),) * 3)
            judge = Fit(config, seen, [(development.folds[r][0], rows)], [SEEDS[r]])
            assert judge.score()["log_loss"].item() == pytest.approx(losses[r], rel=1e-5)


def test_training_without_validation_rows_is_the_same_training():
    development = develop()
    states = []
    for empty in (False, True):
        folds = [(train, val[:0] if empty else val) for train, val in development.folds]
        fit = Fit(config_of(), development, folds, SEEDS)
        losses = [fit.train_epoch(0.01) for _ in range(3)]
        assert np.isfinite(losses).all()
        states.append(state_of(fit))
    assert same_state(*states)


def test_validation_logits_are_those_of_each_fold_in_its_order():
    development = develop()
    (train, val), *_ = development.folds
    folds = [(train, val), (train, val[:7]), (train, val[::-1].copy())]
    fit = Fit(config_of(), development, folds, (5, 5, 5))
    logits = fit.validation_logits()
    assert [len(values) for values in logits] == [40, 7, 40]
    np.testing.assert_allclose(logits[1], logits[0][:7], atol=1e-6)
    np.testing.assert_allclose(logits[2], logits[0][::-1], atol=1e-6)


def test_scoring_in_chunks_of_rows_gives_the_scores_of_all_rows_at_once(monkeypatch):
    development = develop()
    fit = Fit(config_of(), development, development.folds, SEEDS)
    whole, scores = fit.validation_logits(), fit.score()
    monkeypatch.setattr("tune_steel.fit._ROWS_A_CHUNK", 3 * 7)  # 40 rows in chunks of 7
    for ours, expected in zip(fit.validation_logits(), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    for name, values in fit.score().items():
        np.testing.assert_allclose(values, scores[name], rtol=0, atol=1e-6)


def test_scores_of_folds_with_different_numbers_of_validation_rows_are_their_own():
    development = develop()
    (train, val), *_ = development.folds
    together = Fit(config_of(), development, [(train, val), (train, val[:17])], (5, 6)).score()
    for r, (rows, seed) in enumerate(((val, 5), (val[:17], 6))):
        alone = Fit(config_of(), development, [(train, rows)], [seed]).score()
        for name, values in alone.items():
            assert together[name][r] == pytest.approx(values.item(), abs=1e-6), name


def test_development_rows_that_cannot_be_written_can_be_fitted():
    # Ray hands workers read-only arrays.
    development = develop()
    arrays = [
        development.features.numeric,
        development.features.codes,
        development.y,
        development.rows,
        development.reference_weights,
        *itertools.chain(*development.folds),
    ]
    for array in arrays:
        array.flags.writeable = False
    fit = Fit(config_of(class_weight_power=1.0), development, development.folds, SEEDS)
    assert len(list(fit.epochs(2))) == 2
