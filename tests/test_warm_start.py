"""What a search begins with: configs by hand, and the best ones and the trials of earlier runs."""

import json
import math
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL_SPACE
from optuna.trial import TrialState
from searches import finish, only_run, options_of, read, start, study_of

from tune_steel.budget import Budget
from tune_steel.errors import RunError, TuneSteelError
from tune_steel.job import _open
from tune_steel.options import Options, Resources
from tune_steel.problem import Problem, load, resolve
from tune_steel.run_folder import RunFolder, differences, make_folder, read_record
from tune_steel.samplers import SearchName, make_sampler
from tune_steel.search import main
from tune_steel.searcher import StudySearcher
from tune_steel.space import Params, Space, parse_space
from tune_steel.study import METRIC, TrialRecord, begin, open_study, read_records, run_lock
from tune_steel.warm_start import BEST_FIRST, beginning

MOST = 3
EARLIER = 16
"""Trials of an earlier run: more than the start-up points of a sampler."""


@pytest.fixture(scope="module")
def space_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "small.toml"
    path.write_text(SMALL_SPACE)
    return path


def options(space: Path | None, folder: Path, **changed: Any) -> Options:
    given = {"source": "stand-in", "folds": 2, "max_epochs": MOST, "grace_period": 1}
    one_at_a_time = {"budget": Budget(EARLIER), "resources": Resources(1.0, 0.0, 1)}
    return options_of(space=space, output=folder, **{**given, **one_at_a_time, **changed})


def loss_of(params: Params) -> float:
    """Lowest at lr = .03."""
    return 0.1 + (math.log10(float(params["optimizer.lr"])) + 1.5) ** 2


def play(searcher: StudySearcher, end: str = "COMPLETE") -> TrialRecord:
    """One trial as Tune plays it, without the training."""
    name = f"t{len(searcher.records)}"
    searcher.suggest(name)
    record = searcher.records[-1]
    # A stopped trial had no full chance, however good it looks.
    loss = loss_of(record.params) if end != "PRUNED" else 0.01
    for epoch in range(1, MOST + 1):
        result = {
            "epoch": epoch,
            "val_loss": loss + MOST - epoch,
            METRIC: loss + MOST - epoch,
            "best_epoch": epoch,
            "converged": False,
            "node": "here",
            "time_total_s": float(epoch),
        }
        if end in ("FAIL", "LOST"):
            searcher.on_trial_complete(name, error=True)
            searcher.fail(name, "it failed", lost=end == "LOST")
            break
        if epoch == MOST or (end == "PRUNED" and epoch == 1):
            result |= {"val_loss": loss, METRIC: loss}
            searcher.on_trial_complete(name, result)
            break
        searcher.on_trial_result(name, result)
    return record


def searcher_of(
    study: optuna.Study, problem: Problem, given: Options, search: SearchName = "tpe"
) -> StudySearcher:
    return StudySearcher(
        problem.space,
        study,
        search=search,
        seed=given.seed,
        max_epochs=given.max_epochs,
        budget=given.budget,
        max_failures=given.max_failures,
    )


def earlier_run(space: Path | None, folder: Path, **changed: Any) -> Path:
    """The folder of a run whose trials ended in every way, each file by the product's hand."""
    given = options(space, folder, **changed)
    problem = resolve(given, load(given))
    run = RunFolder(make_folder(given.output, problem.task.name), given, problem)
    study = open_study(run.journal, run.record["run"])
    begin(study, [problem.space.defaults()])
    searcher = searcher_of(study, problem, given, "random")
    ends = ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "LOST", "COMPLETE", "FAIL", "COMPLETE"]
    while searcher.ended < searcher.samples:
        play(searcher, ends[len(searcher.records) % len(ends)])
    run.write_record(state="searched")
    run.write_trials(searcher.records)
    return run.path


@pytest.fixture(scope="module")
def earlier(space_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return earlier_run(space_path, tmp_path_factory.mktemp("earlier"))


@pytest.fixture(scope="module")
def problem(space_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    given = options(space_path, tmp_path_factory.mktemp("now"))
    return resolve(given, load(given))


class Now:
    """A run that is about to begin: its study, its searcher, and what it was told."""

    def __init__(self, folder: Path, space: Path | None, **changed: Any) -> None:
        self.options = options(space, folder, **changed)
        self.problem = resolve(self.options, load(self.options))
        self.folder = RunFolder(
            make_folder(folder, self.problem.task.name), self.options, self.problem
        )
        self.study = open_study(self.folder.journal, self.folder.record["run"])
        self.beginning = beginning(self.options, self.problem.space, self.folder.record)
        begin(self.study, self.beginning.configs, self.beginning.trials)

    @property
    def notes(self) -> str:
        return "\n".join(self.beginning.notes)

    def searcher(self, search: SearchName = "tpe") -> StudySearcher:
        return searcher_of(self.study, self.problem, self.options, search)

    def first(self, trials: int) -> list[Params]:
        searcher = self.searcher()
        return [play(searcher).params for _ in range(trials)]


Begin = Callable[..., Now]


@pytest.fixture
def begun(tmp_path: Path, space_path: Path) -> Begin:
    return lambda *paths, **changed: Now(
        tmp_path / "now", changed.pop("space", space_path), warm_start=paths, **changed
    )


def complete_trials(run: Path) -> pd.DataFrame:
    """The trials that ran to their end, best first."""
    trials = read(run, "trials")
    return trials[trials["state"] == "COMPLETE"].sort_values("val_loss")


def params_of(run: Path, trials: pd.DataFrame, space: Space) -> list[Params]:
    keys = [leaf.key for leaf in space.leaves]
    rows = [row.dropna().to_dict() for _, row in trials.iterrows()]
    found = [{key: row[key] for key in keys if key in row} for row in rows]
    return [space.sample(lambda leaf, f=f: f[leaf.key]) for f in found]


@pytest.mark.parametrize("source", ["folder", "table"])
def test_the_best_configs_of_an_earlier_run_come_right_after_the_default(
    begun: Begin, earlier: Path, source: str
) -> None:
    now = begun(earlier if source == "folder" else earlier / "trials.parquet")
    complete = complete_trials(earlier)
    assert len(complete) > BEST_FIRST
    best = params_of(earlier, complete, now.problem.space)[:BEST_FIRST]
    default = now.problem.space.defaults()
    assert now.first(BEST_FIRST + 1) == [default, *(p for p in best if p != default)]
    # Stopped trials looked better than all of them.
    assert read(earlier, "trials").sort_values("val_loss")["state"].iloc[0] == "PRUNED"


def test_configs_by_hand_come_before_those_of_earlier_runs_and_none_comes_twice(
    begun: Begin, earlier: Path
) -> None:
    hand = ('{"optimizer.lr": 0.5e-1, "model.depth": 2}', '{"model.dropout": 0}')
    default_in_words = '{"optimizer.lr": 0.01}'
    best = complete_trials(earlier).iloc[0]
    same_as_best = json.dumps(
        {key: best[key] for key in best.dropna().index if "." in key},
        default=lambda number: number.item(),
    )
    now = begun(
        earlier,
        earlier / "trials.parquet",
        tries=(*hand, default_in_words, hand[0], same_as_best),
    )
    default = now.problem.space.defaults()
    expected = [
        default,
        {**default, "optimizer.lr": 0.05, "model.depth": 2, "model.width_2": 8},
        {**default, "model.dropout": 0.0},
        *params_of(earlier, complete_trials(earlier), now.problem.space)[:BEST_FIRST],
    ]
    searcher = now.searcher()
    records = [play(searcher) for _ in expected]
    assert [sorted(r.params.items()) for r in records] == [sorted(p.items()) for p in expected]
    assert [r.slot for r in records] == list(range(len(expected)))
    # What is drawn next is none of them.
    assert play(searcher).params not in expected


def test_each_of_several_earlier_runs_gives_its_best_configs(
    begun: Begin, earlier: Path, tmp_path: Path, space_path: Path
) -> None:
    other = earlier_run(space_path, tmp_path / "other", seed=1, budget=Budget(8))
    now = begun(other, earlier)
    first = now.first(2 * BEST_FIRST + 1)
    for run in (other, earlier):
        for params in params_of(run, complete_trials(run), now.problem.space)[:BEST_FIRST]:
            assert params in first
    assert len(now.beginning.trials) == sum(read(earlier, "trials")["state"].isin(SCORED))


SCORED = ["COMPLETE", "PRUNED"]


def test_trials_of_the_same_space_task_and_split_inform_the_sampler_and_count_as_nothing_else(
    begun: Begin, earlier: Path
) -> None:
    now = begun(earlier)
    trials = read(earlier, "trials")
    scored = trials[trials["state"].isin(SCORED)]
    assert set(trials["state"]) == {*SCORED, "FAIL", "LOST"}
    assert now.notes == f"--warm-start {earlier}: {len(scored)} trials inform the sampler"
    there = [t for t in now.study.trials if t.state.is_finished()]
    theirs = study_of(earlier).trials
    assert [t.user_attrs for t in there] == [
        {"earlier_run": earlier.name, "earlier_number": number} for number in scored["trial"]
    ]
    for ours in there:
        original = theirs[ours.user_attrs["earlier_number"]]
        for key in ("state", "values", "params", "distributions", "intermediate_values"):
            assert getattr(ours, key) == getattr(original, key)
    # None is a trial of this run.
    assert read_records(now.study, now.problem.space, 0) == []
    searcher = now.searcher()
    assert (searcher.ended, searcher.queued, searcher.records) == (0, 0, [])
    while searcher.ended < searcher.samples:
        play(searcher)
    assert [r.slot for r in searcher.records] == list(range(EARLIER))
    assert searcher.suggest("one more") == "FINISHED"
    again = read_records(now.study, now.problem.space, 0)
    assert [r.number for r in again] == [r.number for r in searcher.records]
    now.folder.write_trials(searcher.records)
    assert len(read(now.folder.path, "trials")) == EARLIER


@pytest.mark.parametrize("search", ["tpe", "gp"])
def test_a_sampler_that_is_informed_is_past_its_start_up_points(
    begun: Begin, earlier: Path, search: SearchName
) -> None:
    def sampled(now: Now) -> Params:
        searcher = now.searcher(search)
        found = [play(searcher).params for _ in range(BEST_FIRST + 2)]
        assert len(now.beginning.configs) == BEST_FIRST + 1
        return found[-1]

    blind = sampled(begun(earlier / "trials.parquet"))
    empty = optuna.create_study(sampler=make_sampler(search, 0, BEST_FIRST + 1))
    space = parse_space(tomllib.loads(SMALL_SPACE), name="small.toml")
    assert blind == space.suggest(empty.ask())
    assert sampled(begun(earlier)) != blind


def test_a_resumed_run_has_the_earlier_trials_once_and_goes_on_with_its_queue(
    begun: Begin, earlier: Path
) -> None:
    now = begun(earlier)
    before = now.first(3)
    study = _open(now.options, now.problem, now.folder, now.folder.record)
    imported = [t for t in study.trials if "earlier_run" in t.user_attrs]
    assert len(imported) == len(now.beginning.trials)
    searcher = searcher_of(study, now.problem, now.options)
    assert searcher.ended == 3
    after = [play(searcher).params for _ in range(BEST_FIRST - 2)]
    assert [*before, *after] == now.beginning.configs


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_run_that_was_killed_while_it_took_over_earlier_trials_takes_them_over_again(
    begun: Begin, earlier: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    now = begun(earlier)
    lines = now.folder.journal.read_bytes().splitlines(keepends=True)
    begins = next(i for i, line in enumerate(lines) if b'"first"' in line)
    now.folder.journal.write_bytes(b"".join(lines[: int(share * begins)]))
    study = _open(now.options, now.problem, now.folder, now.folder.record)
    assert "trials inform the sampler" in capsys.readouterr().err

    def seen(study: optuna.Study) -> list[tuple[Any, ...]]:
        return [(t.state, t.params, t.user_attrs, t.system_attrs) for t in study.trials]

    assert seen(study) == seen(now.study)


def test_an_earlier_run_is_only_read_even_while_it_runs_or_after_it_was_killed(
    begun: Begin, earlier: Path, tmp_path: Path
) -> None:
    running = tmp_path / "results" / earlier.name
    shutil.copytree(earlier, running)
    journal = running / "study.journal"
    study = study_of(running)
    study.ask().set_user_attr("slot", 99)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "cut o')
    (running / "trials.parquet").unlink()
    (running / "study.journal.lock").symlink_to(journal)
    before = contents(running)
    with run_lock(journal):
        now = begun(running)
    assert contents(running) == before
    other = begun(earlier)
    assert now.beginning.configs == other.beginning.configs
    assert [t.params for t in now.beginning.trials] == [t.params for t in other.beginning.trials]


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        p.name: str(p.readlink()) if p.is_symlink() else p.read_bytes()
        for p in folder.iterdir()
        if not p.is_dir()
    }


def test_a_run_that_itself_began_with_earlier_trials_hands_on_its_own_only(
    begun: Begin, earlier: Path
) -> None:
    middle = begun(earlier, budget=Budget(4))
    searcher = middle.searcher()
    for end in ("COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"):
        play(searcher, end)
    middle.folder.write_record()
    now = begun(middle.folder.path)
    assert {t.user_attrs["earlier_run"] for t in now.beginning.trials} == {middle.folder.path.name}
    assert len(now.beginning.trials) == 4
    assert f"it began with {earlier}; where those, or what they began with, were" in now.notes
    assert f"it began with {earlier}" not in middle.notes


def test_that_an_earlier_run_has_looked_at_the_test_rows_is_said(
    begun: Begin, earlier: Path, tmp_path: Path
) -> None:
    said = "it has looked at this run's test rows"
    assert said not in begun(earlier).notes
    looked = tmp_path / "looked"
    shutil.copytree(earlier, looked)
    record = json.loads((looked / "run.json").read_text())
    (looked / "run.json").write_text(json.dumps({**record, "looks_at_test": 1}))
    assert said in begun(looked).notes
    assert said not in begun(looked, seed=1).notes  # it has other test rows


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"seed": 1}, "because its split is another one (test_hash: "),
        ({"split": (0.8, 0.1, 0.1)}, "because its split is another one (rows: "),
        ({"folds": 3}, "because its --folds is 3, here it is 2"),
        ({"max_epochs": MOST + 1}, "because its --max-epochs is 4, here it is 3"),
    ],
)
def test_trials_of_another_split_or_length_give_their_configs_and_do_not_inform_the_sampler(
    begun: Begin, tmp_path: Path, space_path: Path, changed: dict[str, Any], reason: str
) -> None:
    run = earlier_run(space_path, tmp_path / "other", budget=Budget(6), **changed)
    now = begun(run)
    scored = read(run, "trials")["state"].isin(SCORED).sum()
    assert f"--warm-start {run}: its {scored} trials do not inform the sampler, {reason}" in (
        now.notes
    )
    assert now.beginning.trials == []
    best = params_of(run, complete_trials(run), now.problem.space)[:BEST_FIRST]
    assert all(params in now.beginning.configs for params in best)


@pytest.mark.parametrize("key", ["classes", "data", "state", "splits", "warm_start"])
def test_a_record_that_lacks_what_is_compared_is_damaged(
    earlier: Path, tmp_path: Path, key: str
) -> None:
    record = json.loads((earlier / "run.json").read_text())
    assert read_record(earlier) == record
    del (record["options"] if key == "warm_start" else record)[key]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=f"it is damaged \\('{key}'\\)"):
        read_record(tmp_path)


def test_a_table_of_ones_own_may_have_another_name(earlier: Path) -> None:
    record = read_record(earlier)
    own = {**record, "options": {**record["options"], "task": None}}
    assert differences({**own, "task": "plates"}, own) == {}
    assert list(differences({**record, "task": "plates"}, record)) == ["task"]


def test_what_a_space_tries_first_makes_it_no_other_space(
    begun: Begin, earlier: Path, tmp_path: Path
) -> None:
    space = tmp_path / "tries.toml"
    space.write_text(SMALL_SPACE + '[[try]]\n"optimizer.lr" = 0.05\n')
    now = begun(earlier, space=space)
    assert "trials inform the sampler" in now.notes
    assert "do not inform" not in now.notes
    assert now.first(2)[1]["optimizer.lr"] == 0.05


@pytest.mark.parametrize(
    ("changed", "flatters"),
    [
        ({"seed": 1}, True),
        ({"split": (0.85, 0.12, 0.03)}, True),
        ({"split": (0.8, 0.1, 0.1)}, False),  # of the same seed, the larger part holds the smaller
        ({"folds": 3}, False),  # the test rows are cut off before the folds
        ({"max_epochs": MOST + 1}, False),
    ],
)
def test_that_an_earlier_run_searched_on_test_rows_is_said_where_it_did(
    begun: Begin, tmp_path: Path, space_path: Path, changed: dict[str, Any], flatters: bool
) -> None:
    run = earlier_run(space_path, tmp_path / "other", budget=Budget(2), **changed)
    now = begun(run)
    record = json.loads((run / "run.json").read_text())
    ours, theirs = (set(r["splits"]["test_rows"]) for r in (now.folder.record, record))
    assert bool(ours - theirs) == flatters
    assert ("it searched on some of this run's test rows" in now.notes) == flatters


def test_a_table_is_said_to_tell_nothing_of_its_test_rows(begun: Begin, earlier: Path) -> None:
    now = begun(earlier / "trials.parquet")
    assert now.beginning.trials == []
    assert "a table does not tell which rows its run tested on, so its trials do not" in now.notes


def test_configs_of_another_space_take_what_this_one_allows_and_say_what_it_does_not(
    begun: Begin, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(
        SMALL_SPACE.replace("[1e-3, 1e-1]", "[1e-3, 9.0]")
        .replace("depth = { int = [1, 2], default = 1 }", "depth = 3\nwidth_3 = 4")
        .replace("when = { depth = [2] }", "when = { depth = [3] }")
        .replace("[loss]", "[loss]\nlabel_smoothing = { float = [0.0, 0.2], default = 0.1 }")
        .replace("dropout = { float = [0.0, 0.5], default = 0.1 }", "dropout = 0.3")
    )
    run = earlier_run(other, tmp_path / "other", budget=Budget(6))
    now = begun(run)
    assert now.beginning.trials == []
    assert "because its space is another one: " in now.notes
    (said,) = (n for n in now.beginning.notes if "took this space's default" in n)
    keys = said.split("another one; ")[1].split(" took")[0].split(", ")
    assert set(keys) >= {"loss.label_smoothing", "model.depth", "model.dropout"}
    assert set(keys) <= {
        *("loss.label_smoothing", "model.depth", "model.dropout"),
        *("model.width_2", "optimizer.lr"),
    }
    space = now.problem.space
    for params in now.beginning.configs:
        space.config(params)
        assert set(params) == set(space.sample(lambda leaf, p=params: p[leaf.key]))
        assert all(leaf.holds(params[leaf.key]) for leaf in space.leaves if leaf.key in params)
    best = complete_trials(run).iloc[0]
    assert any(
        params["loss.pos_weight"] == best["loss.pos_weight"]
        and params["optimizer.lr"] in (best["optimizer.lr"], 1e-2)
        for params in now.beginning.configs
    )


def test_a_run_of_another_task_gives_what_fits_and_says_all_of_it(
    begun: Begin, tmp_path: Path
) -> None:
    run = earlier_run(None, tmp_path / "other", task="faults7", budget=Budget(4))
    now = begun(run)
    assert "because its task is faults7, here it is binary" in now.notes
    assert "its space is another one; " in now.notes
    assert "it searched on some of this run's test rows" in now.notes
    assert now.beginning.trials == []
    for params in now.beginning.configs:
        now.problem.space.config(params)


def test_a_run_on_another_table_does_not_inform_the_sampler(
    begun: Begin, own_csv: Path, space_path: Path, tmp_path: Path
) -> None:
    own = {"task": None, "data": own_csv, "target": "verdict", "source": "auto"}
    run = earlier_run(space_path, tmp_path / "other", budget=Budget(4), **own)
    frame = pd.read_csv(own_csv)
    frame.loc[0, "size"] += 1
    frame.to_csv(own_csv, index=False)
    now = begun(run, **own)
    assert "do not inform the sampler, because its table has the hash" in now.notes
    assert "as far as that one holds this run's test rows, its configs were chosen" in now.notes
    assert now.beginning.trials == []


def test_a_run_without_a_complete_trial_changes_nothing_and_says_so(
    begun: Begin, space_path: Path, tmp_path: Path
) -> None:
    given = options(space_path, tmp_path / "empty")
    found = resolve(given, load(given))
    run = RunFolder(make_folder(given.output, "binary"), given, found)
    begin(open_study(run.journal, run.record["run"]), [found.space.defaults()])
    run.write_record()
    run.write_trials([])
    for path in (run.path, run.path / "trials.parquet"):
        now = begun(path)
        assert f"--warm-start {path}: no trial of it is COMPLETE, so it changes" in now.notes
        assert now.beginning.configs == [found.space.defaults()]
        assert now.beginning.trials == []


def refused(space: Path, folder: Path, **changed: Any) -> str:
    given = options(space, folder, **changed)
    space_of = parse_space(tomllib.loads(space.read_text()), name=space.name)
    with pytest.raises(TuneSteelError) as error:
        beginning(given, space_of, {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_earlier_run_is_one_line(
    space_path: Path, earlier: Path, tmp_path: Path
) -> None:
    def message(path: Path) -> str:
        return refused(space_path, tmp_path, warm_start=(path,))

    neither = "this is neither a run's folder nor its trials.parquet"
    assert neither in message(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    assert neither in message(tmp_path / "text.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    assert neither in message(tmp_path / "other.parquet")
    assert neither in message(earlier / "run.json")
    assert "File name too long" in message(tmp_path / ("x" * 300))
    (tmp_path / "empty").mkdir()
    assert "this is no folder of a run" in message(tmp_path / "empty")
    run = tmp_path / "run"
    shutil.copytree(earlier, run)
    (run / "study.journal").write_bytes(b"")
    assert "it has no study of the run" in message(run)
    (run / "study.journal").unlink()
    assert "it has no study of the run" in message(run)
    (run / "study.journal").write_bytes(b"damage\n")
    assert f"{run / 'study.journal'}: line 1 is damaged" in message(run)


MIXED = SMALL_SPACE.replace(
    "dropout = { float = [0.0, 0.5], default = 0.1 }",
    "dropout = { choices = [0, 0.25, 0.5], default = 0.25 }",
)


@pytest.mark.parametrize("source", ["folder", "table"])
def test_choices_of_whole_and_other_numbers_come_back_as_what_was_tried(
    begun: Begin, tmp_path: Path, source: str
) -> None:
    """A Parquet column has one type for all of them."""
    space = tmp_path / "mixed.toml"
    space.write_text(MIXED)
    run = earlier_run(space, tmp_path / "other")
    now = begun(run if source == "folder" else run / "trials.parquet", space=space)
    default = now.problem.space.defaults()
    best = params_of(run, complete_trials(run), now.problem.space)[:BEST_FIRST]
    assert 0 in [params["model.dropout"] for params in best]
    assert now.beginning.configs == [default, *(params for params in best if params != default)]
    assert "another one" not in now.notes


TRIES = [
    ("{", "this is no JSON (Expecting property name"),
    ("optimizer.lr=0.1", "this is no JSON (Expecting value"),
    ('{"optimizer.lr": 0.01', "this is no JSON (Expecting ',' delimiter"),
    ("3", 'allowed is an object of parameters, like {"optimizer.lr": 0.003}'),
    ("{}", 'allowed is an object of parameters, like {"optimizer.lr": 0.003}'),
    ('["optimizer.lr"]', "allowed is an object of parameters"),
    ('{"lr": 0.01}', "lr is not searched in small.toml; allowed: model.depth, model.width_1"),
    ('{"optimizer.name": "adam"}', "optimizer.name is not searched in small.toml; allowed:"),
    ('{"optimizer.lr": 7}', "optimizer.lr cannot be 7; allowed: float 0.001..0.1 log"),
    ('{"optimizer.lr": NaN}', "optimizer.lr cannot be nan; allowed: float 0.001..0.1 log"),
    ('{"optimizer.lr": null}', "optimizer.lr cannot be None; allowed: float"),
    ('{"optimizer.lr": "0.01"}', "optimizer.lr cannot be '0.01'; allowed: float"),
    ('{"model.depth": 1.5}', "model.depth cannot be 1.5; allowed: int 1..2"),
    ('{"model.depth": true}', "model.depth cannot be True; allowed: int 1..2"),
    ('{"model.width_1": 9}', "model.width_1 cannot be 9; allowed: one of 8, 16"),
    ('{"model.width_1": [8]}', "model.width_1 cannot be [8]; allowed: one of 8, 16"),
    ('{"model.width_2": 16}', "model.width_2 is searched only where model.depth is one of [2]"),
    (
        '{"model.depth": 1, "model.width_2": 16}',
        "model.width_2 is searched only where model.depth is one of [2]",
    ),
]


@pytest.mark.parametrize(("text", "message"), TRIES)
def test_a_config_by_hand_that_is_not_in_the_space_is_one_line(
    space_path: Path, tmp_path: Path, text: str, message: str
) -> None:
    assert f"--try {text}: {message}" in refused(space_path, tmp_path, tries=(text,))


@pytest.fixture
def inside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command line in this process, where Ray and torch are loaded already."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tune-steel", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return run


def given_on_the_command_line(space: Path) -> tuple[object, ...]:
    return (
        *("--task", "binary", "--source", "stand-in", "--space", space),
        *("--folds", 2, "--max-epochs", MOST, "--grace-period", 1),
    )


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*given: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("tune_steel.job.RaySession", start)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("text", ["{", '{"lr": 1}', '{"optimizer.lr": 7}', '{"model.width_2": 8}'])
def test_a_bad_config_by_hand_ends_the_command_line_with_2_before_anything_is_started(
    inside: Callable[..., tuple[int, str, str]], space_path: Path, text: str
) -> None:
    messages = dict(TRIES) | {
        '{"lr": 1}': "lr is not searched in small.toml",
        '{"model.width_2": 8}': "model.width_2 is searched only where model.depth is one of [2]",
    }
    given = given_on_the_command_line(space_path)
    good = ("--try", '{"optimizer.lr": 0.02}')
    code, out, err = inside(*given, *good, "--try", text)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"tune_steel: error: --try {text}: {messages[text]}")
    assert [path for path in Path().rglob("*") if path.is_file()] == []
    assert list(Path().glob("results/*")) == []


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "--warm-start nowhere: this is neither a run's"),
        ("empty", "empty: this is no folder of a run (No such file or directory: run.json)"),
    ],
)
def test_what_is_no_earlier_run_ends_the_command_line_with_2_before_anything_is_started(
    inside: Callable[..., tuple[int, str, str]], space_path: Path, given: str, message: str
) -> None:
    Path("empty").mkdir()
    others = given_on_the_command_line(space_path)
    code, out, err = inside(*others, "--warm-start", given)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"tune_steel: error: {message}")
    assert list(Path().rglob("*")) == [Path("empty")]


@pytest.mark.parametrize("source", ["folder", "table", "hand"])
def test_a_dry_run_shows_what_the_search_would_begin_with(
    inside: Callable[..., tuple[int, str, str]], space_path: Path, earlier: Path, source: str
) -> None:
    best = complete_trials(earlier).iloc[0]["optimizer.lr"]
    more = {
        "folder": ("--warm-start", earlier),
        "table": ("--warm-start", earlier / "trials.parquet"),
        "hand": ("--try", json.dumps({"optimizer.lr": best})),
    }
    code, out, _ = inside(*given_on_the_command_line(space_path), "--dry-run", *more[source])
    assert code == 0
    configs = [json.loads(out.split(f"  {slot}: ")[1].splitlines()[0]) for slot in (0, 1)]
    assert [params["optimizer.lr"] for params in configs] == [0.01, best]


def test_a_grid_refuses_configs_of_other_origins(
    inside: Callable[..., tuple[int, str, str]], space_path: Path, earlier: Path
) -> None:
    for more in (("--try", "{}"), ("--warm-start", earlier)):
        given = (*given_on_the_command_line(space_path), "--search", "grid", *more)
        code, _, err = inside(*given)
        assert code == 2
        assert "leave --try and --warm-start out" in err


@pytest.mark.ray
def test_a_search_tries_what_it_was_given_and_its_tables_hold_its_own_trials_only(
    earlier: Path, space_path: Path, tmp_path: Path
) -> None:
    hand = '{"model.depth": 2, "model.width_2": 16, "optimizer.lr": 0.0123}'
    given = (*given_on_the_command_line(space_path), "--samples", 9)
    process = start(tmp_path, *given, "--warm-start", earlier, "--try", hand)
    code, _, err = finish(process)
    assert code == 0, err
    assert "trials inform the sampler" in err
    run = only_run(tmp_path)
    report = " ".join((run / "report.txt").read_text().split())
    for note in read_record(run)["notes"]:
        assert " ".join(note.split()) in report
    assert "trials inform the sampler" in report
    trials = read(run, "trials").set_index("slot").sort_index()
    assert trials.index.tolist() == list(range(9))
    assert set(trials["state"]) <= set(SCORED)
    config = json.loads(trials.loc[1, "config"])
    assert config["model"]["depth"] == 2
    assert config["model"]["width_2"] == 16
    assert config["optimizer"]["lr"] == 0.0123
    assert trials.loc[1, "epochs"] >= 1
    best = complete_trials(earlier)["optimizer.lr"].head(BEST_FIRST).tolist()
    assert trials["optimizer.lr"].tolist()[: 2 + BEST_FIRST] == [0.01, 0.0123, *best]
    record = json.loads((run / "run.json").read_text())
    assert sum(record["trials"]["states"].values()) == 9
    assert record["best_trial"] in trials["trial"].tolist()
    assert set(read(run, "epochs")["trial"]) == set(trials["trial"])
    study = study_of(run)
    imported = [t for t in study.trials if "earlier_run" in t.user_attrs]
    assert len(imported) == read(earlier, "trials")["state"].isin(SCORED).sum()
    assert not {t.number for t in imported} & set(trials["trial"])
    assert TrialState.RUNNING not in [t.state for t in study.trials]
    code, _, err = finish(start(tmp_path, "--resume", run))
    assert code == 0
    assert "9 of 9 trials have ended, 0 are tried again" in err
    assert "nothing to do" in err
    assert len(study_of(run).trials) == len(study.trials)
