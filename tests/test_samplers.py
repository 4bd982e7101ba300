"""What is tried next: repeatable for a seed and a slot, informed by stopped trials; and grids."""

import copy
import itertools
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import SMALL_SPACE, Command
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_steel.budget import Budget
from tune_steel.errors import OptionError
from tune_steel.samplers import SearchName, StoppedTrialsGP, grid, make_sampler
from tune_steel.searcher import StudySearcher
from tune_steel.space import Params, Space, load_space, parse_space, spaces_folder
from tune_steel.study import METRIC, ask, begin, open_study, tell

optuna.logging.set_verbosity(optuna.logging.ERROR)

STARTUP = 10
"""Trials that Optuna's TPE and GP sample at random."""


def parse(text: str) -> Space:
    return parse_space(tomllib.loads(text), name="my.toml")


SPACE = parse(SMALL_SPACE)
TWO_FLOATS = parse(
    """
[model]
depth = 1
width_1 = 8
dropout = { float = [0.0, 0.9], default = 0.1 }
[loss]
[optimizer]
lr = { float = [1e-5, 1e-1], log = true, default = 1e-2 }
batch_size = 64
"""
)


def loss_of(params: Params) -> float:
    """Lowest at lr = .001 and without dropout."""
    return (math.log10(float(params["optimizer.lr"])) + 3) ** 2 + float(params["model.dropout"])


def one_trial(
    study: optuna.Study,
    space: Space,
    search: SearchName,
    *,
    seed: int = 0,
    loss: Callable[[Params], float] = loss_of,
    state: str = "COMPLETE",
) -> Params:
    """Asks for a trial, trains it for two epochs and tells how it ended."""
    trial, record = ask(study, space, search, seed)
    for epoch, value in enumerate((2 * loss(record.params), loss(record.params)), start=1):
        record.epochs.append({"epoch": epoch, METRIC: value, "best_epoch": epoch, "node": "here"})
        trial.report(value, epoch)
    record.state = state
    tell(study, trial, record)
    return record.params


def history(
    space: Space, states: list[str], loss: Callable[[Params], float] = loss_of
) -> optuna.Study:
    """The same random configs every time, with these ends."""
    study = optuna.create_study()
    for state in states:
        one_trial(study, space, "random", loss=loss, state=state)
    return study


def proposal(study: optuna.Study, space: Space, sampler: optuna.samplers.BaseSampler) -> Params:
    study.sampler = sampler
    return space.suggest(study.ask())


@pytest.mark.parametrize("name", ["tpe", "random", "gp"])
def test_a_proposal_follows_from_the_seed_the_slot_and_the_history(name: SearchName) -> None:
    def proposed(
        seed: int, slot: int, loss: Callable[[Params], float] = loss_of, ended: int = STARTUP + 2
    ) -> Params:
        study = history(SPACE, ["COMPLETE", "PRUNED"] * (ended // 2), loss)
        return proposal(study, SPACE, make_sampler(name, seed, slot))

    first = proposed(1, 12)
    assert proposed(1, 12) == first
    assert proposed(1, 13) != first
    assert proposed(2, 12) != first
    otherwise = proposed(1, 12, lambda params: -loss_of(params))
    assert (otherwise == first) == (name == "random")
    # Start-up points depend on nothing but the seed and the slot.
    assert proposed(1, 12, ended=4) == proposed(1, 12, lambda params: -loss_of(params), ended=4)


@pytest.mark.parametrize("name", ["random", "gp"])
def test_a_study_that_is_opened_again_repeats_no_point_and_goes_on_as_the_whole_one(
    tmp_path: Path, name: SearchName
) -> None:
    def points(journal: str, *, again_after: tuple[int, ...]) -> list[Params]:
        out = []
        study = open_study(tmp_path / journal, "run")
        for number in range(STARTUP + 2):
            if number in again_after:
                study = open_study(tmp_path / journal, "run")
            out.append(one_trial(study, SPACE, name, state=("COMPLETE", "PRUNED")[number % 2]))
        return out

    whole = points("whole", again_after=())
    assert points("killed", again_after=(1, 4, STARTUP + 1)) == whole
    assert len({tuple(params.items()) for params in whole}) == STARTUP + 2


def ended_as(study: optuna.Study, state: TrialState) -> optuna.Study:
    """A copy of a study whose trials with a loss all ended so."""
    out = optuna.create_study()
    for trial in study.get_trials():
        given = {"params": trial.params, "distributions": trial.distributions}
        seen = {"value": trial.value, "intermediate_values": trial.intermediate_values}
        out.add_trial(create_trial(state=state, **given, **seen))
    return out


MOSTLY_STOPPED = ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"] * 4


def test_the_gp_counts_a_stopped_trial_as_a_complete_one_with_its_lowest_loss() -> None:
    def proposed(study: optuna.Study, sampler: GPSampler) -> Params:
        return proposal(study, TWO_FLOATS, sampler)

    stopped = history(TWO_FLOATS, MOSTLY_STOPPED)
    # It asks for the stopped ones only where it asks for complete ones.
    complete = ended_as(stopped, TrialState.COMPLETE)
    given: dict[str, Any] = {"seed": 5, "deterministic_objective": False}
    expected = proposed(complete, GPSampler(**given))
    assert proposed(stopped, StoppedTrialsGP(**given)) == expected
    assert proposed(history(TWO_FLOATS, MOSTLY_STOPPED), GPSampler(**given)) != expected


def test_the_gp_proposes_better_configs_because_it_sees_stopped_trials() -> None:
    def losses(make: Callable[[int], optuna.samplers.BaseSampler]) -> list[float]:
        found = []
        for slot in range(16, 20):
            study = history(TWO_FLOATS, MOSTLY_STOPPED)
            found.append(loss_of(proposal(study, TWO_FLOATS, make(slot))))
        return found

    seeing = losses(lambda slot: make_sampler("gp", 0, slot))
    blind = losses(lambda slot: GPSampler(seed=slot))
    best_so_far = min(t.value for t in history(TWO_FLOATS, MOSTLY_STOPPED).trials if t.value)
    assert max(seeing) < best_so_far
    assert sum(blind) / len(blind) > 3 * max(seeing)


def test_the_gp_changes_nothing_of_the_trials_that_it_reads(tmp_path: Path) -> None:
    study = open_study(tmp_path / "j", "run")
    for state in [*MOSTLY_STOPPED, "FAIL"]:
        one_trial(study, TWO_FLOATS, "random", state=state)
    kept = study.get_trials(deepcopy=False)
    before = copy.deepcopy(kept)
    proposal(study, TWO_FLOATS, make_sampler("gp", 0, 17))
    assert kept == before
    assert ended(study) == before
    assert ended(open_study(tmp_path / "j", "run")) == before
    assert [t.state.name for t in before] == [*MOSTLY_STOPPED, "FAIL"]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials() if t.state.is_finished()]


@pytest.mark.parametrize(
    ("name", "space"),
    [
        *[("tpe", path.name) for path in sorted(spaces_folder().glob("*.toml"))],
        *[("random", "multiclass.toml"), ("gp", "multiclass.toml")],
    ],
)
def test_conditional_parameters_are_sampled_where_they_belong_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: SearchName, space: str
) -> None:
    """Warnings are errors here; Optuna's own are lines on stderr."""
    loaded = load_space(spaces_folder() / space)
    study = open_study(tmp_path / "j", "run")
    ends = itertools.cycle(["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "PRUNED"])
    depths = set()
    for state in itertools.islice(ends, STARTUP + (4 if name == "gp" else 20)):
        params = one_trial(study, loaded, name, state=state)
        depth = params.get("model.depth", 0)  # families without it have no such layers
        depths.add(depth)
        assert [f"model.width_{i}" in params for i in (1, 2, 3, 4)] == [
            i <= int(depth) for i in (1, 2, 3, 4)
        ]
        assert ("optimizer.weight_decay" in params) == (params["optimizer.name"] == "adamw")
    assert len(depths) > 1
    assert capfd.readouterr() == ("", "")


FINITE = """
[model]
depth = { int = [1, 3], default = 2 }
width_1 = { choices = [8, 16], default = 16 }
width_2 = { choices = [8, 16], default = 8, when = { depth = [2, 3] } }
width_3 = { choices = [8, 16, 32], default = 16, when = { depth = [3] } }
batch_norm = { choices = [true, false], default = true }
[loss]
[optimizer]
name = { choices = ["adam", "adamw"], default = "adam" }
weight_decay = { choices = [0.01, 0.1], default = 0.01, when = { name = ["adamw"] } }
lr = 1e-3
batch_size = 32
[schedule]
plateau_patience = { int = [2, 4], default = 3, when = { "optimizer.lr" = [1e-3] } }
"""
FEW = """
[model]
depth = { int = [1, 2], default = 1 }
width_1 = { choices = [8, 16, 32], default = 16 }
width_2 = { choices = [8, 16], default = 8, when = { depth = [2] } }
batch_norm = { choices = [true, false], default = true }
[loss]
[optimizer]
lr = 1e-3
batch_size = 32
"""


@pytest.fixture
def finite() -> Space:
    return parse(FINITE)


def points_of(configs: list[Params]) -> list[tuple[tuple[str, Any], ...]]:
    return sorted(tuple(sorted(params.items())) for params in configs)


def every_config(space: Space) -> list[Params]:
    """All values of all leaves, in every combination, then without the inactive ones."""
    values = [leaf.examples() for leaf in space.leaves]
    keys = [leaf.key for leaf in space.leaves]
    distinct = set()
    for combination in itertools.product(*values):
        choice = dict(zip(keys, combination, strict=True))
        distinct.add(tuple(space.sample(lambda leaf, c=choice: c[leaf.key]).items()))
    return [dict(params) for params in distinct]


def test_a_grid_is_every_config_once_with_the_default_first(finite: Space) -> None:
    found = grid(finite, 0)
    assert points_of(found) == points_of(every_config(finite))
    assert len(found) == (2 + 2 * 2 + 2 * 2 * 3) * 2 * (1 + 2) * 3
    assert found[0] == finite.defaults()


def test_the_order_of_a_grid_is_random_and_follows_from_the_seed(finite: Space) -> None:
    assert grid(finite, 0) == grid(finite, 0)
    assert grid(finite, 0) != grid(finite, 1)
    # The first half of a grid that is cut short is no corner of the space.
    half = grid(finite, 0)[: len(grid(finite, 0)) // 2]
    for leaf in finite.leaves:
        assert {params[leaf.key] for params in half if leaf.key in params} == set(leaf.examples())


def test_a_grid_search_tries_every_config_once_across_a_kill_and_then_ends(tmp_path: Path) -> None:
    few = parse(FEW)

    def searcher() -> StudySearcher:
        study = open_study(tmp_path / "j", "run")
        if not study.user_attrs:
            begin(study, [few.defaults()])
        given: dict[str, Any] = {"seed": 4, "max_epochs": 1, "budget": Budget(10_000)}
        return StudySearcher(few, study, search="grid", **given)

    def play(search: StudySearcher, name: str) -> None:
        search.suggest(name)
        losses = {"val_loss": 0.5, METRIC: 0.5, "best_epoch": 1, "node": "here"}
        search.on_trial_complete(
            name, {"epoch": 1, "converged": False, "time_total_s": 1.0, **losses}
        )

    first = searcher()
    everything = every_config(few)
    assert first.samples == len(everything)
    for number in range(9):
        play(first, f"a{number}")
    first.suggest("running when the process is killed")
    second = searcher()
    assert second.queued == 1
    while second.ended < second.samples:
        play(second, f"b{second.ended}")
    assert second.suggest("one more") == "FINISHED"
    tried = [r.params for r in searcher().records if r.state == "COMPLETE"]
    assert tried[0] == few.defaults()
    assert points_of(tried) == points_of(everything)


def test_a_grid_of_floats_is_refused_with_the_leaves_that_are_endless() -> None:
    with pytest.raises(OptionError) as refused:
        grid(SPACE, 0)
    assert str(refused.value) == (
        "--search grid: my.toml has ranges of floats (model.dropout, loss.pos_weight, "
        "optimizer.lr); give them as choices or int, or use --search tpe, random or gp"
    )


def test_a_grid_of_floats_is_one_line_on_the_command_line_and_leaves_no_run(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    given = ("--task", "binary", "--source", "stand-in", "--space", space_file)
    done = command(*given, "--search", "grid")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "error: --search grid: small.toml has ranges of floats (model.dropout" in line
    assert done.stdout == ""
    assert list((tmp_path / "elsewhere").glob("results/*")) == []


LARGE = """
[model]
depth = 1
width_1 = 8
[loss]
[optimizer]
lr = 1e-3
batch_size = { int = [2, 500], default = 32 }
[schedule]
plateau_patience = { int = [0, 500], default = 10 }
"""


def test_a_grid_of_too_many_configs_is_refused() -> None:
    with pytest.raises(OptionError, match="more than 100000 configs; give fewer choices, or use"):
        grid(parse(LARGE), 0)


def test_a_grid_of_a_huge_range_is_refused_before_it_fills_the_memory() -> None:
    script = (
        "import resource, sys, tomllib\n"
        "from tune_steel.errors import OptionError\n"
        "from tune_steel.samplers import grid\n"
        "from tune_steel.space import parse_space\n"
        "space = parse_space(tomllib.loads(sys.stdin.read()), name='huge.toml')\n"
        "kib = next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1]\n"
        "most = int(kib) * 1024 + 512 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (most, most))\n"
        "try: grid(space, 0)\n"
        "except OptionError as error: print(error)"
    )
    huge = LARGE.replace("int = [2, 500]", "int = [2, 1_000_000_000]")
    done = subprocess.run(
        [sys.executable, "-c", script], input=huge, capture_output=True, text=True, check=False
    )
    assert "huge.toml has more than 100000 configs" in done.stdout, done.stderr[-300:]
