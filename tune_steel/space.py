"""Search spaces: a TOML file that is a trial's config whose leaves may be ranges.

A leaf is a value, or one of `{ choices = [...] }`, `{ int = [low, high] }` and
`{ float = [low, high] }` with a `default`, optionally `log = true`, and optionally
`when = { key = [values] }`: then it is sampled only where every named key has one of the
values. A key in `when` without a dot means a leaf of the same section. `[[try]]` tables hold
configs to try first. `search_spaces/` holds examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, ValidationError

from tune_steel.config import TrialConfig
from tune_steel.errors import SpaceError

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Value: TypeAlias = str | bool | int | float
Params: TypeAlias = dict[str, Value]
"""Sampled parameters by dotted key, only the active ones: `{"optimizer.lr": 0.001}`."""

_KINDS = ("choices", "int", "float")
_MOST_INTEGERS = 100
_RANDOM_CONFIGS = 200
_LEAF_KEYS = (*_KINDS, "log", "default", "when")


@dataclass(frozen=True)
class Leaf:
    """A range in a space.

    Attributes:
        path: Keys from the root of the config to the leaf.
        kind: `choices`, `int` or `float`.
        values: The choices, or the lowest and the highest value.
        default: What the first trial uses.
        log: Whether the range is sampled on a logarithmic scale.
        when: Dotted key to the values under which this leaf is active.
    """

    path: tuple[str, ...]
    kind: str
    values: tuple[Value, ...]
    default: Value
    log: bool = False
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The parameter's name in Optuna and in the tables."""
        return ".".join(self.path)

    def suggest(self, trial: BaseTrial) -> Value:
        """Samples a value through Optuna."""
        if self.kind == "choices":
            choice = trial.suggest_categorical(self.key, list(self.values))
            assert choice is not None  # Optuna's choices may be None, ours never are
            return choice
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.key, int(low), int(high), log=self.log)
        return trial.suggest_float(self.key, float(low), float(high), log=self.log)

    def holds(self, value: object) -> bool:
        """Whether a value lies in the range and has its type."""
        if self.kind == "choices":
            return any(value == v and type(value) is type(v) for v in self.values)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.values
        return (self.kind == "float" or isinstance(value, int)) and low <= value <= high  # type: ignore[operator]

    def examples(self) -> tuple[Value, ...]:
        """Every value of choices and of short integer ranges, else both ends and a middle."""
        if self.kind == "choices":
            return self.values
        low, high = (float(v) for v in self.values)
        if self.kind == "int":
            steps = min(int(high - low), _MOST_INTEGERS)
            return tuple(sorted({int(low + (high - low) * i / steps) for i in range(steps + 1)}))
        return low, low + (high - low) / math.pi, high

    def describe(self) -> str:
        """The range in words, for messages and `--dry-run`."""
        if self.kind == "choices":
            return "one of " + ", ".join(json.dumps(v) for v in self.values)
        return f"{self.kind} {self.values[0]}..{self.values[1]}{' log' if self.log else ''}"


@dataclass(frozen=True)
class Space:
    """A search space: fixed values, leaves (parents of conditions first), and what to try first.

    `tries` are dotted keys and values, one mapping for each config; the rest takes the default.
    """

    name: str
    fixed: Mapping[tuple[str, ...], Value]
    leaves: tuple[Leaf, ...]
    tries: tuple[Mapping[str, Any], ...] = ()

    def sample(self, choose: Callable[[Leaf], Value]) -> Params:
        """Walks the active leaves, define-by-run, and asks `choose` for each one's value."""
        params: Params = {}
        for leaf in self.leaves:
            if self.active(leaf, params):
                params[leaf.key] = choose(leaf)
        return params

    def active(self, leaf: Leaf, params: Params) -> bool:
        """Whether a leaf's conditions hold, given the parameters before it."""
        return all(
            (params[key] if key in params else self.fixed.get(tuple(key.split(".")))) in allowed
            for key, allowed in leaf.when.items()
        )

    def suggest(self, trial: BaseTrial) -> Params:
        """Samples every active leaf through an Optuna trial."""
        return self.sample(lambda leaf: leaf.suggest(trial))

    def defaults(self) -> Params:
        """The parameters of the first trial."""
        return self.sample(lambda leaf: leaf.default)

    def config(self, params: Mapping[str, Value]) -> TrialConfig:
        """The config of sampled parameters.

        Raises:
            SpaceError: The values do not make a valid config.
        """
        tree: dict[str, Any] = {}
        leaves = [(leaf.path, params[leaf.key]) for leaf in self.leaves if leaf.key in params]
        for path, value in [*self.fixed.items(), *leaves]:
            section = tree
            for key in path[:-1]:
                section = section.setdefault(key, {})
            section[path[-1]] = value
        try:
            return TrialConfig.model_validate(tree)
        except ValidationError as error:
            raise SpaceError(f"{self.name}: {_first_line(error)}") from None

    def as_dict(self) -> dict[str, object]:
        """The resolved space as plain values, for `run.json`."""
        ranges: dict[str, object] = {}
        for leaf in self.leaves:
            entry: dict[str, object] = {leaf.kind: list(leaf.values), "default": leaf.default}
            if leaf.log:
                entry["log"] = True
            if leaf.when:
                entry["when"] = {key: list(allowed) for key, allowed in leaf.when.items()}
            ranges[leaf.key] = entry
        tries = {"try": [dict(given) for given in self.tries]} if self.tries else {}
        return {**{".".join(path): v for path, v in self.fixed.items()}, **ranges, **tries}

    @property
    def content_hash(self) -> str:
        """SHA-256 of the resolved space, hexadecimal; the file's layout does not matter."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def spaces_folder() -> Path:
    """Where the spaces of the package lie: inside it when installed, beside it in a checkout."""
    here = Path(__file__).parent
    installed = here / "search_spaces"
    return installed if installed.is_dir() else here.parent / "search_spaces"


def load_space(path: Path) -> Space:
    """Reads and checks a space file.

    Raises:
        SpaceError: One line that names the file, the key and what is allowed.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpaceError(f"{path}: there is no such space file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise SpaceError(f"{path}: not valid TOML ({error})") from None
    return parse_space(tree, name=path.name)


def parse_space(tree: Mapping[str, Any], name: str) -> Space:
    """Builds a space from parsed TOML and tries that what it samples is a valid config.

    Raises:
        SpaceError: One line that names the key and what is allowed.
    """
    fixed: dict[tuple[str, ...], Value] = {}
    leaves: list[Leaf] = []
    tries = tree.get("try", [])
    if not isinstance(tries, list) or not all(isinstance(given, dict) for given in tries):
        raise SpaceError(f"{name}: try: allowed are tables [[try]] of dotted keys and values")
    _collect({k: v for k, v in tree.items() if k != "try"}, (), name, fixed, leaves)
    for path in [*fixed, *(leaf.path for leaf in leaves)]:
        _check_known(path, name)
    space = Space(name, fixed, _parents_first(leaves, fixed, name), tuple(tries))
    _check_samples(space)
    return space


def _collect(
    tree: Mapping[str, Any],
    path: tuple[str, ...],
    name: str,
    fixed: dict[tuple[str, ...], Value],
    leaves: list[Leaf],
) -> None:
    for key, node in tree.items():
        here = (*path, key)
        if isinstance(node, dict) and (set(node) & {*_KINDS, "default", "when"}):
            leaves.append(_leaf(here, node, name))
        elif isinstance(node, dict):
            _collect(node, here, name, fixed, leaves)
        elif isinstance(node, str | bool | int | float):
            fixed[here] = node
        else:
            raise SpaceError(
                f"{name}: {'.'.join(here)}: {node!r} is no leaf; "
                "allowed are a string, a number, true, false or a range"
            )


def _leaf(path: tuple[str, ...], node: Mapping[str, Any], name: str) -> Leaf:
    where = f"{name}: {'.'.join(path)}"
    unknown = sorted(set(node) - set(_LEAF_KEYS))
    if unknown:
        raise SpaceError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(_LEAF_KEYS)}")
    kinds = [kind for kind in _KINDS if kind in node]
    if len(kinds) != 1:
        raise SpaceError(f"{where}: a range has exactly one of {', '.join(_KINDS)}")
    if "default" not in node:
        raise SpaceError(f"{where}: a range needs a default, which the first trial uses")
    kind = kinds[0]
    log = node.get("log", False)
    if not isinstance(log, bool) or (log and kind == "choices"):
        raise SpaceError(f"{where}: log is true or false, and only for int and float")
    values = _values(kind, node[kind], log=log, where=where)
    if not isinstance(node.get("when", {}), dict):
        raise SpaceError(f"{where}: when is a table like {{ depth = [2, 3] }}")
    when: dict[str, tuple[Value, ...]] = {}
    for key, allowed in node.get("when", {}).items():
        if not isinstance(allowed, list) or not allowed:
            raise SpaceError(f"{where}: when.{key} is a list of values, like [2, 3]")
        when[key if "." in key else ".".join((*path[:-1], key))] = tuple(allowed)
    leaf = Leaf(path, kind, values, node["default"], log=log, when=when)
    if not leaf.holds(leaf.default):
        raise SpaceError(
            f"{where}: the default {leaf.default!r} is outside its range; "
            f"allowed: {leaf.describe()}"
        )
    return leaf


def _values(kind: str, given: object, *, log: bool, where: str) -> tuple[Value, ...]:
    if kind == "choices":
        if not isinstance(given, list) or not given:
            raise SpaceError(f"{where}: choices is a list with at least one value")
        if not all(isinstance(v, str | bool | int | float) for v in given):
            raise SpaceError(f"{where}: choices are strings, numbers, true or false, no lists")
        if len({_kind(v) for v in given}) > 1:
            raise SpaceError(f"{where}: choices are all strings, all numbers or all true/false")
        if len(set(given)) < len(given):
            raise SpaceError(f"{where}: a choice stands twice in {given!r}")
        return tuple(given)
    allowed = int if kind == "int" else int | float
    if (
        not isinstance(given, list)
        or len(given) != 2
        or any(isinstance(v, bool) or not isinstance(v, allowed) for v in given)
    ):
        raise SpaceError(f"{where}: {kind} is [lowest, highest], two numbers of that kind")
    low, high = given
    if not low < high:
        raise SpaceError(f"{where}: the range {given!r} is empty; lowest must be below highest")
    if log and low <= 0:
        raise SpaceError(f"{where}: a log range must start above 0, not at {low!r}")
    return low, high


def _kind(value: Value) -> str:
    if isinstance(value, bool):
        return "bool"
    return "string" if isinstance(value, str) else "number"


def _parents_first(
    leaves: Sequence[Leaf], fixed: Mapping[tuple[str, ...], Value], name: str
) -> tuple[Leaf, ...]:
    """Orders leaves so that every key of a `when` is decided before the leaf that reads it."""
    by_key = {leaf.key: leaf for leaf in leaves}
    fixed_keys = {".".join(path) for path in fixed}
    for leaf in leaves:
        for key, allowed in leaf.when.items():
            if key not in by_key and key not in fixed_keys:
                raise SpaceError(
                    f"{name}: {leaf.key}: when names {key!r}, which is not in the space; "
                    f"its keys: {', '.join([*sorted(fixed_keys), *by_key])}"
                )
            parent = by_key.get(key)
            for value in allowed:
                if parent is not None and not parent.holds(value):
                    raise SpaceError(
                        f"{name}: {leaf.key}: when.{key} names {value!r}, which {key} never "
                        f"takes; allowed: {parent.describe()}"
                    )
    ordered: dict[str, Leaf] = {}
    waiting = list(leaves)
    while waiting:
        ready = [w for w in waiting if all(k in ordered or k in fixed_keys for k in w.when)]
        if not ready:
            raise SpaceError(f"{name}: {waiting[0].key}: its when conditions form a circle")
        ordered.update((leaf.key, leaf) for leaf in ready)
        waiting = [leaf for leaf in waiting if leaf.key not in ordered]
    return tuple(ordered.values())


def _check_known(path: tuple[str, ...], name: str) -> None:
    """Fails on a key that a trial's config does not have."""
    model: type[BaseModel] | None = TrialConfig
    for depth, key in enumerate(path):
        if model is None:
            return  # inside a free mapping, such as class_weights
        if key not in model.model_fields:
            raise SpaceError(
                f"{name}: {'.'.join(path[: depth + 1])}: unknown key; "
                f"allowed: {', '.join(model.model_fields)}"
            )
        kind = model.model_fields[key].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _check_samples(space: Space) -> None:
    """Validates the default config, every leaf at every value it may take, and random configs."""
    space.config(space.defaults())
    by_key = {leaf.key: leaf for leaf in space.leaves}

    def needed(leaf: Leaf) -> Params:
        """Values of the parents, and of theirs, under which a leaf is active."""
        allowed: dict[str, list[Value]] = {}
        waiting = [leaf]
        while waiting:
            for key, values in waiting.pop().when.items():
                allowed[key] = [v for v in allowed.get(key, values) if v in values]
                waiting += [by_key[key]] if key in by_key else []
        return {key: values[0] for key, values in allowed.items() if values}

    def sampled(forced: Params) -> Params:
        return space.sample(lambda leaf: forced.get(leaf.key, leaf.default))

    for leaf in space.leaves:
        for value in leaf.examples():
            params = sampled({**needed(leaf), leaf.key: value})
            if leaf.key not in params:
                raise SpaceError(f"{space.name}: {leaf.key}: its when is never true")
            space.config(params)
    rng = random.Random(0)
    for _ in range(_RANDOM_CONFIGS):
        space.config(space.sample(lambda leaf: rng.choice(leaf.examples())))


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = f" (given: {first['input']!r})" if isinstance(first["input"], Value) else ""
    return f"{key}: {message}{given}"
