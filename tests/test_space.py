import pickle
import tomllib
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import options_of

from tune_steel.errors import OptionError, SpaceError
from tune_steel.problem import check_classes
from tune_steel.space import load_space, parse_space, spaces_folder
from tune_steel.warm_start import beginning

optuna.logging.set_verbosity(optuna.logging.ERROR)

GOOD = """
[model]
depth = { int = [1, 2], default = 1 }
width_1 = 8
width_2 = { choices = [8, 16], default = 8, when = { depth = [2] } }
[loss]
pos_weight = 1.0
[optimizer]
name = { choices = ["adam", "adamw"], default = "adam" }
weight_decay = { float = [1e-5, 0.1], log = true, default = 0.01, when = { name = ["adamw"] } }
lr = 1e-3
batch_size = 32
"""


def parse(text: str) -> Any:
    return parse_space(tomllib.loads(text), name="my.toml")


def shipped() -> list[str]:
    return sorted(path.name for path in spaces_folder().glob("*.toml"))


@pytest.mark.parametrize("name", shipped())
def test_the_first_trial_of_a_shipped_space_is_the_reference_network(name: str) -> None:
    space = load_space(spaces_folder() / name)
    config = space.config(space.defaults())
    assert config.model.widths == (512, 256, 128)
    assert config.model.batch_norm
    assert config.model.activation == "relu"
    assert config.model.dropout == 0.35
    assert (config.optimizer.name, config.optimizer.lr) == ("adam", 1e-3)
    assert (config.optimizer.batch_size, config.optimizer.weight_decay) == (32, 0.0)
    assert (config.schedule.plateau_factor, config.schedule.plateau_patience) == (0.5, 10)
    patience = 10 if name in ("binary.toml", "wide.toml") else 20
    assert config.schedule.early_stop_patience == patience
    assert config.schedule.early_stop_min_delta == 0.01
    assert config.loss.pos_weight == (2.0 if name == "binary.toml" else None)


def test_all_three_tasks_have_a_space_and_one_holds_everything() -> None:
    assert shipped() == ["binary.toml", "faults7.toml", "multiclass.toml", "wide.toml"]


@pytest.mark.parametrize("name", shipped())
def test_everything_a_shipped_space_samples_is_a_valid_config(name: str) -> None:
    space = load_space(spaces_folder() / name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    depths, families = set(), set()
    for _ in range(200):
        params = space.suggest(study.ask())
        config = space.config(params)
        depths.add(config.model.depth)
        families.add(config.model.family)
        assert len(config.model.widths) == (config.model.depth or 0)
        assert ("optimizer.weight_decay" in params) == (config.optimizer.name == "adamw")
    assert depths == {None, 1, 2, 3, 4}
    every = {"mlp", "resnet", "tabm", "nca"}
    assert families == (every if name == "wide.toml" else {"mlp", "nca"})


def test_a_leaf_is_sampled_only_where_its_condition_holds() -> None:
    space = parse(GOOD)
    assert "model.width_2" not in space.defaults()
    params = space.sample(lambda leaf: 2 if leaf.key == "model.depth" else leaf.default)
    assert params["model.width_2"] == 8
    assert space.config(params).model.widths == (8, 8)


def test_a_condition_may_stand_before_the_key_it_reads() -> None:
    text = GOOD.replace("depth = { int = [1, 2], default = 1 }\n", "", 1).replace(
        "[loss]", "depth = { int = [1, 2], default = 2 }\n[loss]"
    )
    assert parse(text).defaults()["model.width_2"] == 8


def test_a_space_survives_pickling() -> None:
    space = parse(GOOD)
    assert pickle.loads(pickle.dumps(space)) == space


def test_the_hash_sees_values_and_not_the_layout() -> None:
    assert parse(GOOD).content_hash == parse(GOOD + "\n# a comment\n").content_hash
    assert parse(GOOD).content_hash != parse(GOOD.replace("lr = 1e-3", "lr = 2e-3")).content_hash


MISTAKES = [
    ("lr = 1e-3", "lr = 1e-3\nlearn = 3", "optimizer.learn: unknown key; allowed: name, lr"),
    ("[loss]", "[lost]\nx = 1\n[loss]", "lost: unknown key; allowed: model, loss"),
    ("lr = 1e-3", "lr = { float = [1e-2, 1e-3], default = 1e-2 }", "optimizer.lr: the range"),
    ("lr = 1e-3", "lr = { float = [1e-3, 1e-3], default = 1e-3 }", "is empty"),
    ("lr = 1e-3", "lr = { float = [1e-3, 1e-2], default = 1.0 }", "default 1.0 is outside"),
    ("lr = 1e-3", "lr = { float = [0.0, 1e-2], default = 1e-3, log = true }", "log range"),
    ("lr = 1e-3", "lr = { float = [1e-3, 1e-2] }", "needs a default"),
    ("lr = 1e-3", "lr = { float = [1e-3, 1e-2], int = [1, 2], default = 1 }", "exactly one of"),
    ("lr = 1e-3", "lr = { float = [1e-3, 1e-2], default = 1e-3, step = 1 }", "unknown key 'step'"),
    ("lr = 1e-3", "lr = { float = [1e-3, nan], default = 1e-3 }", "is empty"),
    ("lr = 1e-3", 'lr = { float = ["a", "b"], default = 1e-3 }', "two numbers"),
    ("lr = 1e-3", "lr = { int = [1.5, 3], default = 2 }", "two numbers"),
    ("lr = 1e-3", "lr = [1e-3, 1e-2]", "is no leaf"),
    ("lr = 1e-3", 'lr = "fast"', "optimizer.lr: Input should be a valid number"),
    ("lr = 1e-3", "lr = { float = [1e-3, 20.0], default = 1e-3 }", "optimizer.lr: Input should"),
    ("lr = 1e-3\n", "", "optimizer.lr: Field required"),
    ("choices = [8, 16]", "choices = []", "at least one value"),
    ("choices = [8, 16]", "choices = [8, [16]]", "no lists"),
    ("choices = [8, 16]", "choices = [8, 8]", "stands twice"),
    ("choices = [8, 16]", 'choices = [8, "x"]', "all strings, all numbers or all true/false"),
    ("choices = [8, 16]", "choices = [8, 16], log = true", "only for int and float"),
    ("when = { depth = [2] }", "when = { deep = [2] }", "names 'model.deep', which is not in"),
    ("when = { depth = [2] }", "when = { depth = [7] }", "never takes; allowed: int 1..2"),
    ("when = { depth = [2] }", "when = { depth = 2 }", "is a list of values"),
    ("when = { depth = [2] }", "when = 3", "when is a table"),
    ("when = { depth = [2] }", "when = { width_2 = [8] }", "form a circle"),
    ("when = { depth = [2] }", "when = { width_1 = [9] }", "depth 2 needs width_2"),
    ("width_1 = 8", "width_1 = 8\nwidth_4 = 8", "depth 1 has no layer for width_4"),
    ("pos_weight = 1.0", "pos_weight = 1.0\nclass_weight_power = 1.0", "exclude each other"),
    ("pos_weight = 1.0", 'weighting = "power"', "weighting 'power' needs class_weight_power"),
    ("pos_weight = 1.0", "pos_weight = inf", "loss.pos_weight"),
    ("batch_size = 32", "batch_size = { float = [16.0, 64.0], default = 32.0 }", "batch_size"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_a_mistake_in_a_space_is_one_line_that_names_it(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(SpaceError) as caught:
        parse(GOOD.replace(old, new, 1))
    text = str(caught.value)
    assert message in text
    assert text.startswith("my.toml: ")
    assert "\n" not in text


def test_a_value_inside_a_range_that_makes_no_config_is_found_too() -> None:
    text = GOOD.replace("int = [1, 2], default = 1", "int = [1, 3], default = 1").replace(
        "when = { depth = [2] }", "when = { depth = [3] }"
    )
    text = text.replace(
        "[loss]", "width_3 = { int = [2, 3], default = 2, when = { depth = [3] } }\n[loss]"
    )
    with pytest.raises(SpaceError, match="depth 2 needs width_2"):
        parse(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such space file"), (b"a = [", "not valid TOML"), (b"\xff\xfe", "cannot be read")],
)
def test_a_space_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpaceError, match=message) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("binary.toml", ("a", "b", "c"), "loss.pos_weight is for two classes, this task has 3"),
        ("faults7.toml", ("a", "b"), "a binary task has loss.pos_weight"),
        ("multiclass.toml", ("a", "b", "c"), "the task's classes are a, b, c"),
    ],
)
def test_class_weights_must_fit_the_task(
    name: str, classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        check_classes(load_space(spaces_folder() / name), classes)


@settings(max_examples=60, deadline=None)
@given(
    depth=st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda pair: pair[0] < pair[1]),
    lr=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).filter(lambda pair: pair[0] < pair[1]),
    log=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_valid_space_samples_valid_configs_within_its_ranges(
    depth: tuple[int, int], lr: tuple[float, float], log: bool, seed: int
) -> None:
    tree: dict[str, Any] = {
        "model": {
            "depth": {"int": list(depth), "default": depth[1]},
            "width_1": 4,
            **{
                f"width_{i}": {
                    "int": [2, 9],
                    "default": 3,
                    "when": {"depth": [d for d in range(depth[0], depth[1] + 1) if d >= i]},
                }
                for i in range(2, depth[1] + 1)
            },
        },
        "loss": {"pos_weight": 1},
        "optimizer": {
            "lr": {"float": list(lr), "default": lr[0], "log": log},
            "batch_size": 8,
        },
    }
    space = parse_space(tree, name="drawn")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(5):
        config = space.config(space.suggest(study.ask()))
        assert depth[0] <= config.model.depth <= depth[1]
        assert len(config.model.widths) == config.model.depth
        assert lr[0] <= config.optimizer.lr <= lr[1]


def test_a_space_names_configs_to_try_first() -> None:
    tree = tomllib.loads(GOOD + '[[try]]\n"model.depth" = 2\n[[try]]\n"optimizer.lr" = 1\n')
    space = parse_space(tree, name="my.toml")
    assert space.tries == ({"model.depth": 2}, {"optimizer.lr": 1})
    assert space.as_dict()["try"] == [{"model.depth": 2}, {"optimizer.lr": 1}]
    assert space.content_hash != parse(GOOD).content_hash
    with pytest.raises(SpaceError, match=r"my\.toml: try: allowed are tables"):
        parse("try = 3\n" + GOOD)


@pytest.mark.parametrize("name", ["binary.toml", "faults7.toml", "multiclass.toml"])
def test_the_tries_of_a_shipped_space_are_configs_of_it_and_come_after_the_default(
    name: str,
) -> None:
    space = load_space(spaces_folder() / name)
    first = beginning(options_of(), space, {}).configs
    assert first[0] == space.defaults()
    assert [space.config(params).model.family for params in first] == ["mlp", *["nca"] * 4]
    for params, named in zip(first[1:], space.tries, strict=True):
        assert all(params[key] == value for key, value in named.items())
    grid = beginning(options_of(search="grid"), space, {}).configs
    assert grid == [space.defaults()]


def test_a_try_that_is_not_in_its_space_is_one_clear_line() -> None:
    space = parse(GOOD + '[[try]]\n"model.depth" = 9\n')
    with pytest.raises(
        OptionError, match=r'my\.toml: try \{"model.depth": 9\}: model.depth cannot'
    ):
        beginning(options_of(), space, {})
