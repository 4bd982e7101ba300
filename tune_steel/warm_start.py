"""What a search begins with besides the default: configs by hand, and those of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, create_trial

from tune_steel.errors import OptionError
from tune_steel.options import Options
from tune_steel.run_folder import differences, read_record
from tune_steel.space import Leaf, Params, Space, Value
from tune_steel.study import SCORED, copy_of_study

BEST_FIRST = 5
"""Configs of each earlier run that are tried first."""

_Scored: TypeAlias = tuple[float, dict[str, Any]]
"""A validation loss and the parameters that gave it."""


@dataclass
class Beginning:
    """What a new study is given.

    Attributes:
        configs: Configs that are tried first, the space's default before all others.
        trials: Earlier trials that inform the sampler; they are not trials of this run.
        notes: What the user should know about them.
    """

    configs: list[Params]
    trials: list[FrozenTrial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_beginning(options: Options, space: Space) -> None:
    """Finds mistakes in what a search is to begin with, before anything is started.

    Raises:
        OptionError: A config that is not in the space, or no earlier run.
    """
    _first_configs(options, space)
    for path in options.warm_start:
        if _is_folder(path):
            read_record(path)
        else:
            _of_a_table(path)


def beginning(options: Options, space: Space, record: Mapping[str, Any]) -> Beginning:
    """What the options ask a search to begin with.

    Args:
        options: With `tries` and `warm_start`.
        space: The space of the search.
        record: What `run.json` will say of this run; earlier runs are compared with it.

    Raises:
        OptionError: A config that is not in the space, or no earlier run.
    """
    out = Beginning(_first_configs(options, space))
    for path in options.warm_start:
        if _is_folder(path):
            _of_a_run(path, space, record, out)
        else:
            _best_first(_of_a_table(path), path, space, out)
            out.notes.append(
                f"--warm-start {path}: a table does not tell which rows its run tested on, so its "
                "trials do not inform the sampler; where those rows were others, its configs were "
                "chosen on some of this run's test rows, which flatters the test scores"
            )
    out.configs = [p for i, p in enumerate(out.configs) if p not in out.configs[:i]]
    return out


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a forbidden parent, say; what is merely missing raises nothing
        raise OptionError(f"--warm-start {path}: it cannot be read ({error.strerror})") from None


def _first_configs(options: Options, space: Space) -> list[Params]:
    """The defaults, then what the space's `[[try]]` and `--try` name.

    Raises:
        OptionError: A config that is not in the space.
    """
    # A grid tries every config in its own order.
    written = () if options.search == "grid" else space.tries
    return [
        space.defaults(),
        *(_checked(f"{space.name}: try {json.dumps(given)}", given, space) for given in written),
        *(_by_hand(text, space) for text in options.tries),
    ]


def _by_hand(text: str, space: Space) -> Params:
    where = f"--try {text}"
    example = '{"optimizer.lr": 0.003}'
    try:
        given = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{where}: this is no JSON ({error}); allowed is {example}") from None
    if not isinstance(given, dict) or not given:
        raise OptionError(f"{where}: allowed is an object of parameters, like {example}")
    return _checked(where, given, space)


def _checked(where: str, given: Mapping[str, Any], space: Space) -> Params:
    leaves = {leaf.key: leaf for leaf in space.leaves}
    for key, value in given.items():
        if key not in leaves:
            raise OptionError(
                f"{where}: {key} is not searched in {space.name}; allowed: {', '.join(leaves)}"
            )
        if not leaves[key].holds(value):
            raise OptionError(
                f"{where}: {key} cannot be {value!r}; allowed: {leaves[key].describe()}"
            )
    params = _completed(given, space)
    for key in given.keys() - params.keys():
        conditions = [f"{k} is one of {list(v)}" for k, v in leaves[key].when.items()]
        raise OptionError(f"{where}: {key} is searched only where {' and '.join(conditions)}")
    return params


def _completed(given: Mapping[str, Any], space: Space) -> Params:
    """The config that has the given values where the space allows them, else its defaults."""

    def choose(leaf: Leaf) -> Value:
        value = given.get(leaf.key)
        if leaf.kind == "choices":
            # A column of a table has one type: the choices 0 and 0.5 come back as 0.0 and 0.5.
            boolean = isinstance(value, bool)
            same = (v for v in leaf.values if v == value and isinstance(v, bool) == boolean)
            return next(same, leaf.default)
        if value is None or not leaf.holds(value):
            return leaf.default
        return float(value) if leaf.kind == "float" else value

    return space.sample(choose)


def _of_a_run(path: Path, space: Space, record: Mapping[str, Any], out: Beginning) -> None:
    """Reads the journal of an earlier run; that of one that runs or was killed will do."""
    earlier = read_record(path)
    study = copy_of_study(path / "study.journal", earlier["run"])
    trials = [t for t in study.get_trials(deepcopy=False) if "slot" in t.user_attrs]
    ended = [t for t in trials if t.state.name in SCORED]
    complete = [(t.values[0], t.params) for t in ended if t.state.name == "COMPLETE"]
    _best_first(complete, path, space, out)
    changed = differences(earlier, record)
    reasons = [changed[key] for key in ("task", "data", "split", "space") if key in changed]
    if reasons:
        out.notes.append(
            f"--warm-start {path}: its {len(ended)} trials do not inform the sampler, because "
            f"{reasons[0]}"
        )
    else:
        out.trials += [_imported(t, earlier["run"]) for t in ended]
        out.notes.append(f"--warm-start {path}: {len(ended)} trials inform the sampler")
    searched_on = set(record["splits"]["test_rows"]) - set(earlier["splits"]["test_rows"])
    if "data" in changed:
        out.notes.append(
            f"--warm-start {path}: its table is another one; as far as that one holds this "
            "run's test rows, its configs were chosen on them, which flatters the test scores"
        )
    elif searched_on:
        out.notes.append(
            f"--warm-start {path}: it searched on some of this run's test rows, which flatters "
            "the test scores; use the same --seed and --split for clean ones"
        )
    before = earlier["options"]["warm_start"]
    if before:
        out.notes.append(
            f"--warm-start {path}: it began with {', '.join(before)}; where those, or what they "
            "began with, were tested on other rows, they flatter this run's test scores"
        )
    if not searched_on and "data" not in changed and earlier.get("looks_at_test"):
        out.notes.append(
            f"--warm-start {path}: it has looked at this run's test rows; whoever searches on "
            "because of what it showed has chosen by a test score"
        )


def _imported(trial: FrozenTrial, run: str) -> FrozenTrial:
    return create_trial(
        state=trial.state,
        value=trial.value,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
        user_attrs={"earlier_run": run, "earlier_number": trial.number},
    )


def _of_a_table(path: Path) -> Iterable[_Scored]:
    try:
        table = pq.read_table(path)
        complete = [row for row in table.to_pylist() if row["state"] == "COMPLETE"]
        return [(row["val_loss"], row) for row in complete]
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise OptionError(
            f"--warm-start {path}: this is neither a run's folder nor its trials.parquet "
            f"({str(error).splitlines()[0]})"
        ) from None


def _best_first(complete: Iterable[_Scored], path: Path, space: Space, out: Beginning) -> None:
    best = sorted(complete, key=lambda scored: scored[0])[:BEST_FIRST]
    if not best:
        out.notes.append(f"--warm-start {path}: no trial of it is COMPLETE, so it changes nothing")
    keys = {leaf.key for leaf in space.leaves}
    missed: set[str] = set()
    for _, given in best:
        params = _completed(given, space)
        missed |= {key for key, value in params.items() if given.get(key) != value}
        missed |= {
            key
            for key, value in given.items()
            if value is not None and "." in key and (key not in keys or key not in params)
        }
        out.configs.append(params)
    if missed:
        out.notes.append(
            f"--warm-start {path}: its space is another one; {', '.join(sorted(missed))} "
            "took this space's default or was left out"
        )
