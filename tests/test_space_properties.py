"""What holds for every search space: Hypothesis draws them, several levels of conditions deep."""

import json
import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_steel.errors import SpaceError
from tune_steel.space import Params, Space, Value, load_space, parse_space

optuna.logging.set_verbosity(optuna.logging.ERROR)

Node = Any  # a value, or the table of a range
Nodes = dict[str, Node]  # by dotted key
ABSENT = object()

# Keys that a config can do without, so anything may be their condition, and what they may be.
OPTIONAL: dict[str, Sequence[Value] | tuple[str, float, float]] = {
    "model.activation": ["relu", "gelu", "silu"],
    "model.batch_norm": [True, False],
    "model.dropout": ("float", 0.0, 0.9),
    "loss.pos_weight": ("float", 0.01, 50.0),
    "loss.label_smoothing": ("float", 0.0, 0.9),
    "optimizer.name": ["adam", "adamw"],
    "optimizer.weight_decay": ("float", 1e-8, 1.0),
    "schedule.plateau_factor": ("float", 0.01, 0.99),
    "schedule.plateau_patience": ("int", 0, 50),
    "schedule.early_stop_patience": ("int", 1, 300),
    "preprocessing.scaling": ["standard", "robust", "quantile"],
}


def is_range(node: Node) -> bool:
    return isinstance(node, dict)


def values_of(node: Node) -> list[Value]:
    """Values that a node may take, of floats its ends and its default."""
    if not is_range(node):
        return [node]
    if "choices" in node:
        return list(node["choices"])
    if "int" in node:
        return list(range(node["int"][0], node["int"][1] + 1))
    return sorted({*node["float"], node["default"]})


@st.composite
def nodes(draw: st.DrawFn, pool: Sequence[Value] | tuple[str, float, float]) -> Node:
    """A fixed value or a range without a condition."""
    if isinstance(pool, list):
        if draw(st.booleans()):
            return draw(st.sampled_from(pool))
        choices = draw(st.lists(st.sampled_from(pool), min_size=1, unique=True))
        return {"choices": choices, "default": draw(st.sampled_from(choices))}
    assert isinstance(pool, tuple)
    kind, lowest, highest = pool
    number = (
        st.integers(int(lowest), int(highest)) if kind == "int" else st.floats(lowest, highest)
    )
    form = draw(st.sampled_from(["range", "choices", "fixed"]))
    if form == "fixed":
        return draw(number)
    if form == "choices":
        some: list[Any] = draw(st.lists(number, min_size=1, max_size=4, unique=True))
        return {"choices": some, "default": draw(st.sampled_from(some))}
    low, high = sorted(draw(st.lists(number, min_size=2, max_size=2, unique=True)))
    inside = st.integers(low, high) if kind == "int" else st.floats(low, high)
    out = {kind: [low, high], "default": draw(inside)}
    return {**out, "log": draw(st.booleans())} if low > 0 else out


@st.composite
def conditions(draw: st.DrawFn, key: str, before: Nodes, witness: Params) -> Node:
    """A `when` over up to two earlier keys that holds at the witness, so it can come true."""
    latest_first = list(before)[::-1]
    out = {}
    for parent in draw(st.permutations(latest_first))[: draw(st.integers(0, 2))]:
        others = draw(st.lists(st.sampled_from(values_of(before[parent])), max_size=3))
        allowed = draw(st.permutations(list(dict.fromkeys([witness[parent], *others]))))
        section, _, name = parent.rpartition(".")
        short = section == key.rpartition(".")[0] and draw(st.booleans())
        out[name if short else parent] = list(allowed)
    return out


@st.composite
def spaces(draw: st.DrawFn) -> Nodes:
    """A valid space by dotted key, its keys in any order."""
    depths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True))
    space: Nodes = {
        "model.depth": {"choices": depths, "default": draw(st.sampled_from(depths))},
        "model.width_1": draw(nodes(("int", 1, 4096))),
        "optimizer.lr": {"float": [1e-4, 0.1], "log": True, "default": 0.001},
        "optimizer.batch_size": {"choices": [16, 32], "default": 32},
    }
    if draw(st.booleans()) and sorted(depths) == list(range(min(depths), max(depths) + 1)):
        space["model.depth"] = (
            {"int": [min(depths), max(depths)], "default": max(depths)}
            if len(depths) > 1
            else depths[0]
        )
    witness = {key: draw(st.sampled_from(values_of(node))) for key, node in space.items()}
    earlier = dict(space)
    for layer in range(2, max(depths) + 1):
        node = draw(nodes(("int", 1, 64)))
        deep = [depth for depth in depths if depth >= layer]
        if len(deep) < len(depths):
            node = node if is_range(node) else {"choices": [node], "default": node}
            node["when"] = {"depth": deep}
        space[f"model.width_{layer}"] = node
    for key in draw(st.permutations(sorted(OPTIONAL)))[: draw(st.integers(3, len(OPTIONAL)))]:
        node = draw(nodes(OPTIONAL[key]))
        if is_range(node):
            when = draw(conditions(key, earlier, witness))
            node |= {"when": when} if when else {}
        space[key] = earlier[key] = node
        witness[key] = draw(st.sampled_from(values_of(node)))
    return {key: space[key] for key in draw(st.permutations(sorted(space)))}


def tree(space: Nodes) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, node in space.items():
        section, _, name = key.partition(".")
        out.setdefault(section, {})[name] = node
    return out


def parse(space: Nodes) -> Space:
    return parse_space(tree(space), name="drawn.toml")


def toml(space: Nodes) -> str:
    def text(node: Node) -> str:
        if not is_range(node):
            return json.dumps(node)
        return "{ " + ", ".join(f"{json.dumps(k)} = {text(v)}" for k, v in node.items()) + " }"

    return "\n".join(
        line
        for section, table in tree(space).items()
        for line in (f"[{section}]", *(f"{name} = {text(node)}" for name, node in table.items()))
    )


def parents(key: str, node: Node) -> Mapping[str, list[Value]]:
    """The conditions of a range, by dotted key."""
    section = key.rpartition(".")[0]
    when: dict[str, list[Value]] = node.get("when", {})
    return {k if "." in k else f"{section}.{k}": allowed for k, allowed in when.items()}


def check(space: Nodes, parsed: Space, params: Params) -> None:
    """The config is valid, and the params are there exactly where their conditions hold."""
    parsed.config(params)
    for key, node in space.items():
        if is_range(node):
            holds = all(
                params.get(p, ABSENT if is_range(space[p]) else space[p]) in allowed
                for p, allowed in parents(key, node).items()
            )
            assert (key in params) == holds, key
    assert set(params) <= {key for key, node in space.items() if is_range(node)}
    for key, value in params.items():
        node = space[key]
        if "choices" in node:
            assert value in node["choices"]
        else:
            low, high = node.get("int") or node["float"]
            assert low <= value <= high


def at_random(seed: int) -> Any:
    rng = random.Random(seed)
    return lambda leaf: rng.choice(leaf.examples())


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 999))
def test_whatever_a_space_samples_is_a_valid_config_of_its_active_parameters(
    space: Nodes, seed: int
) -> None:
    parsed = parse(space)
    for i in range(10):
        check(space, parsed, parsed.sample(at_random(seed + i)))
    for sampler in (
        optuna.samplers.RandomSampler(seed=seed),
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=2),
    ):
        study = optuna.create_study(sampler=sampler)
        for i in range(5):
            trial = study.ask()
            params = parsed.suggest(trial)
            check(space, parsed, params)
            assert params == trial.params
            study.tell(trial, float(i % 3))


@settings(max_examples=40, deadline=None)
@given(spaces())
def test_the_first_trial_of_a_space_has_its_defaults(space: Nodes) -> None:
    parsed = parse(space)
    params = parsed.defaults()
    check(space, parsed, params)
    assert params == {key: space[key]["default"] for key in params}


@settings(max_examples=40, deadline=None)
@given(spaces())
def test_parents_stand_before_their_children(space: Nodes) -> None:
    keys = [leaf.key for leaf in parse(space).leaves]
    assert sorted(keys) == sorted(key for key, node in space.items() if is_range(node))
    for key in keys:
        for parent in parents(key, space[key]):
            assert parent not in keys or keys.index(parent) < keys.index(key)


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 999))
def test_a_pickled_space_samples_the_same(space: Nodes, seed: int) -> None:
    parsed = parse(space)
    again = pickle.loads(pickle.dumps(parsed))
    assert again == parsed
    assert again.content_hash == parsed.content_hash

    def sampled(one: Space) -> Params:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        return one.suggest(study.ask())

    assert sampled(again) == sampled(parsed)
    assert again.sample(at_random(seed)) == parsed.sample(at_random(seed))


@settings(max_examples=40, deadline=None)
@given(space=spaces())
def test_a_space_written_as_toml_or_kept_in_run_json_is_the_same(
    space: Nodes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parsed = parse(space)
    file = tmp_path_factory.mktemp("space") / "drawn.toml"
    file.write_text(toml(space))
    assert load_space(file) == parsed
    kept = json.loads(json.dumps(parsed.as_dict()))
    again = parse(kept)
    assert again.fixed == parsed.fixed
    # Sections come together in a file, so leaves may stand in another order.
    assert {leaf.key: leaf for leaf in again.leaves} == {leaf.key: leaf for leaf in parsed.leaves}
    assert again.content_hash == parsed.content_hash


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("unknown", "when names 'model.nothing', which is not in the space"),
        ("never", "never takes; allowed: "),
        ("itself", "its when conditions form a circle"),
        ("circle", "its when conditions form a circle"),
    ],
)
@settings(max_examples=25, deadline=None)
@given(space=spaces(), data=st.data())
def test_a_condition_that_cannot_be_is_one_line_that_names_it(
    mistake: str, said: str, space: Nodes, data: st.DataObject
) -> None:
    ranges = sorted(key for key, node in space.items() if is_range(node))
    key, other = data.draw(st.lists(st.sampled_from(ranges), min_size=2, max_size=2, unique=True))

    def add(to: str, parent: str, allowed: Value) -> None:
        when = dict(parents(to, space[to]))
        space[to]["when"] = {**when, parent: [*when.get(parent, []), allowed]}

    if mistake == "unknown":
        add(key, "model.nothing", 1)
    elif mistake == "never":
        values: list[Any] = values_of(space[other])
        numbers = not isinstance(values[0], str | bool)
        add(key, other, max(values) + 1 if numbers and data.draw(st.booleans()) else "nothing")
    elif mistake == "itself":
        add(key, key, space[key]["default"])
    else:
        add(key, other, space[other]["default"])
        add(other, key, space[key]["default"])
    with pytest.raises(SpaceError) as caught:
        parse(space)
    text = str(caught.value)
    assert text.startswith("drawn.toml: " if "circle" in said else f"drawn.toml: {key}: ")
    assert said in text
    assert "\n" not in text


def test_a_parent_may_be_reached_in_two_ways_that_allow_different_values() -> None:
    space: Nodes = {
        "model.depth": 1,
        "model.width_1": 8,
        "model.activation": {"choices": ["relu", "gelu", "silu"], "default": "relu"},
        "model.dropout": {
            "float": [0.0, 0.5],
            "default": 0.1,
            "when": {"activation": ["gelu"], "optimizer.name": ["adamw"]},
        },
        "optimizer.name": {
            "choices": ["adam", "adamw"],
            "default": "adamw",
            "when": {"model.activation": ["silu", "gelu"]},
        },
        "optimizer.lr": 0.1,
        "optimizer.batch_size": 8,
    }
    params = parse(space).sample(
        lambda leaf: {"model.activation": "gelu"}.get(leaf.key, leaf.default)
    )
    assert set(params) == {"model.activation", "model.dropout", "optimizer.name"}
    space["optimizer.name"]["when"] = {"model.activation": ["silu"]}
    with pytest.raises(SpaceError, match=r"model\.dropout: its when is never true"):
        parse(space)
