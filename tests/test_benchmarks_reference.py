from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from benchmarks import reference
from benchmarks.reference import (
    DEVIATING,
    MOST_DEVIATIONS,
    PAGE,
    PARTS,
    PROTOCOLS,
    PUBLISHED,
    Recipe,
    Rows,
    corrections,
    criterion,
    play,
    probabilities,
    read_rows,
    split_of,
    train,
    usable,
    variants,
)
from tune_steel.data import FEATURE_NAMES, load_steel
from tune_steel.scores import SCORES
from tune_steel.tables import write_table

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = list(PROTOCOLS)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reference, "load_steel", partial(load_steel, None, "stand-in"))
    read_rows.cache_clear()
    yield
    read_rows.cache_clear()


@pytest.mark.real_data
def test_the_filter_leaves_the_rows_of_which_the_reference_tested_a_stratified_share() -> None:
    rows = read_rows("multiclass")
    assert rows.kept.sum() == 1613
    kept = np.bincount(rows.y[rows.kept])
    assert kept.tolist() == [736, 186, 172, 72, 55, 392]
    tested = np.array([110, 28, 26, 11, 8, 59])
    assert (np.rint(kept * tested.sum() / 1613) == tested).all()
    assert read_rows("binary").y[rows.kept].sum() == 588


@pytest.mark.real_data
def test_no_other_column_has_values_so_far_from_the_mean() -> None:
    x = read_rows("binary").x
    z = np.abs(x - x.mean(axis=0)) / x.std(axis=0)
    found = [name for name, far in zip(FEATURE_NAMES.values(), z.T, strict=True) if far.max() >= 4]
    assert MOST_DEVIATIONS == 4
    assert tuple(found) == DEVIATING


@pytest.mark.usefixtures("stand_in")
def test_other_faults_are_the_positives_of_two_classes_and_pastry_of_six() -> None:
    two, six = (read_rows(task) for task in TASKS)
    assert two.y[two.others].tolist() == [1] * 673
    assert two.y[~two.others].sum() == 0
    assert six.y[six.others].tolist() == [0] * 673
    assert np.bincount(six.y).tolist() == [158 + 673, 190, 391, 72, 55, 402]


def test_the_twofold_sigmoid_squeezes_what_the_loss_takes_for_logits() -> None:
    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    z = np.array([-3.0, 0.5, 8.0])
    y = np.array([0, 1, 1])
    for twofold in (True, False):
        p = sigmoid(sigmoid(z)) if twofold else sigmoid(z)
        expected = np.where(y == 1, -2 * np.log(p), -np.log(1 - p)).mean()
        found = criterion(torch.tensor(z)[:, None], torch.tensor(y), twofold)
        assert found.item() == pytest.approx(expected)

    z = np.random.default_rng(0).normal(size=(4, 6)) * 3
    y = np.array([0, 2, 3, 5])
    weights = np.array([4, 4, 2, 3, 5, 5])[y]
    for twofold in (True, False):
        p = np.exp(sigmoid(z) if twofold else z)
        p /= p.sum(axis=1, keepdims=True)
        expected = -(weights * np.log(p[range(4), y])).sum() / weights.sum()
        found = criterion(torch.tensor(z), torch.tensor(y), twofold)
        assert found.item() == pytest.approx(expected)
        assert probabilities(torch.tensor(z), twofold) == pytest.approx(p)

    sure = torch.full((1, 6), -50.0)
    sure[0, 2] = 50
    assert probabilities(sure, True)[0, 2] == pytest.approx(np.e / (np.e + 5))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("task", TASKS)
def test_a_split_holds_as_many_kept_rows_as_the_references_and_every_row_once(task: str) -> None:
    rows, protocol = read_rows(task), PROTOCOLS[task]
    for kind in ("random", "stratified"):
        split = split_of(kind, 3, rows, protocol, Recipe())
        whole = np.concatenate([split.train, split.val, split.test])
        assert np.sort(whole).tolist() == list(range(1941))
        for part in (split.val, split.test):
            assert rows.kept[part].sum() == protocol.held
        if kind == "stratified":
            test = split.test[rows.kept[split.test]]
            counts = np.bincount(rows.strata[test], minlength=rows.strata.max() + 1)
            even = np.bincount(rows.strata[rows.kept]) * protocol.held / rows.kept.sum()
            assert (np.abs(counts - even) < 1).all()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("task", TASKS)
def test_folds_test_every_row_once_a_repeat(task: str) -> None:
    rows, protocol = read_rows(task), PROTOCOLS[task]
    recipe = variants(task)[-1].recipe
    members = np.flatnonzero(usable(rows, recipe.outliers, recipe.others))
    folds, _ = protocol.folds
    for repeat in range(2):
        made = [
            split_of("folds", repeat * folds + fold, rows, protocol, recipe)
            for fold in range(folds)
        ]
        tested = np.concatenate([split.test for split in made])
        assert np.sort(tested).tolist() == members.tolist()
        for split in made:
            whole = np.concatenate([split.train, split.val, split.test])
            assert np.sort(whole).tolist() == members.tolist()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("task", TASKS)
def test_each_correction_changes_one_thing(task: str) -> None:
    def told(variant: reference.Variant) -> dict[str, object]:
        mine = {"outliers": variant.outliers, "others": variant.others, "cut": variant.splits}
        return mine | {f"recipe {k}": v for k, v in vars(variant.recipe).items()}

    every = [told(variant) for variant in variants(task)]
    for before, after in pairwise(every):
        assert sum(before[key] != after[key] for key in before) == 1
    assert every[0]["recipe twofold"]
    assert every[0]["recipe leaky"]
    assert not every[-1]["recipe leaky"]


@pytest.mark.usefixtures("stand_in")
def test_only_the_leaky_scaling_knows_the_test_rows() -> None:
    rows = read_rows("binary")
    protocol = replace(PROTOCOLS["binary"], epochs=1)
    split = split_of("random", 0, rows, protocol, Recipe())
    x = rows.x.copy()
    x[split.test] *= 2
    other = replace(rows, x=x)

    def weights(rows: Rows, leaky: bool) -> torch.Tensor:
        found = train(rows, split, Recipe(leaky=leaky), protocol, seed=0)
        return torch.cat([p.flatten() for p in found.network.parameters()])

    assert torch.equal(weights(rows, False), weights(other, False))
    assert not torch.equal(weights(rows, True), weights(other, True))


@pytest.mark.usefixtures("stand_in")
def test_a_split_gives_a_row_for_each_variant_and_scores_one_network_on_more_rows() -> None:
    protocol = replace(PROTOCOLS["multiclass"], epochs=1)
    found = {row["variant"]: row for row in play("multiclass", "stratified", 0, protocol)}
    assert list(found) == [v.name for v in variants("multiclass") if v.splits != "folds"]
    assert all(np.isfinite(row[name]) for row in found.values() for name in list(SCORES)[:-2])
    assert found["its protocol"]["test_rows"] == 242
    kept, named = found["the four columns back"], found["scored on named faults only"]
    assert kept["seconds"] == named["seconds"]
    assert named["test_rows"] < kept["test_rows"]
    assert found["trained on named faults only"]["train_rows"] < named["train_rows"]
    more = found["scored on outliers too"]
    assert more["test_rows"] > named["test_rows"]
    assert {row["data_source"] for row in found.values()} == {"stand-in"}


def test_differences_are_between_the_same_splits_and_their_intervals_know_the_overlap(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=5)
    second = first + np.array([0.1, 0.12, 0.08, 0.11, 0.09])
    rows = [
        {"task": "binary", "variant": variant.name, "split": index, "own_loss": 0.0}
        | dict.fromkeys(SCORES, value)
        | {"train_rows": 200, "test_rows": 50}
        for variant, values in zip(variants("binary"), (first, second), strict=False)
        for index, value in enumerate(values)
    ]
    for variant in variants("binary")[2:]:
        rows += [{**row, "variant": variant.name} for row in rows[5:10]]
    path = tmp_path / "reference.parquet"
    write_table(path, rows, reference._RESULTS)
    _, _, its_own, logits, *_ = corrections("binary", path).splitlines()
    half = student.ppf(0.975, 4) * (second - first).std(ddof=1) * np.sqrt(1 / 5 + 50 / 200)
    assert its_own.startswith(f"| its protocol | 200 | 50 | {first.mean():.3f} |")
    assert f"| {second.mean():.3f} (**+0.100 ± {half:.3f}**) |" in logits


def test_the_page_shows_the_published_figures() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for part, table in PARTS.items():
        assert f"<!-- {part} -->\n{table(PUBLISHED)}<!-- end -->" in page
