"""What a run searches on, resolved from its options: table, task, splits and space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tune_steel import data, tasks
from tune_steel.errors import OptionError, SpaceError
from tune_steel.options import Options
from tune_steel.space import Space, load_space, spaces_folder
from tune_steel.splits import Development, SealedTest, Splits, freeze, prepare
from tune_steel.terminal import say

STAND_IN = "STAND-IN data: these scores say nothing about real steel plates"


@dataclass(frozen=True)
class Problem:
    """A resolved problem.

    Attributes:
        table: The table and where it came from.
        task: Rows, classes and features.
        splits: The frozen splits.
        shares: Shares of train, validation and test.
        development: What the search may see.
        sealed: What it may not.
        space: What it samples from.
        notes: Lines about columns that were dropped or cut.
    """

    table: data.Table
    task: tasks.Task
    splits: Splits
    shares: tuple[float, float, float]
    development: Development
    sealed: SealedTest
    space: Space
    notes: list[str]


@dataclass(frozen=True)
class Question:
    """A problem before it is cut.

    Attributes:
        table: The table and where it came from.
        task: Rows, classes and features.
        space: What is sampled from.
    """

    table: data.Table
    task: tasks.Task
    space: Space


def load(options: Options) -> Question:
    """Loads the table and reads the space.

    Raises:
        TuneSteelError: Something the user can mend.
    """
    if options.openml_id is not None:
        table = data.load_openml(options.openml_id)
        task = tasks.own_task(table, options.target)
    elif options.target is not None:
        assert options.data is not None
        table = data.load_own(options.data)
        task = tasks.own_task(table, options.target)
    else:
        assert options.task is not None
        table = data.load_steel(options.data, options.source)
        task = tasks.steel_task(table, options.task)
    return ask(options, table, task)


def ask(options: Options, table: data.Table, task: tasks.Task) -> Question:
    """Reads the space for a task that is loaded already.

    Raises:
        TuneSteelError: Something the user can mend.
    """
    if options.threshold != "none" and len(task.classes) != 2:
        raise OptionError(
            f"--threshold {options.threshold}: for two classes only; {task.name} has "
            f"{len(task.classes)}"
        )
    default = options.task or ("binary" if len(task.classes) == 2 else "faults7")
    space = load_space(options.space or spaces_folder() / f"{default}.toml")
    check_classes(space, task.classes)
    return Question(table, task, space)


def resolve(options: Options, question: Question) -> Problem:
    """Cuts the table's rows.

    Raises:
        DataError: A class has too few rows for the splits.
    """
    shares = options.split or question.task.split
    splits = freeze(question.task, seed=options.seed, split=shares, folds=options.folds)
    return assemble(question, splits, shares)


def assemble(question: Question, splits: Splits, shares: tuple[float, float, float]) -> Problem:
    """A problem that is cut already."""
    table, task, space = question.table, question.task, question.space
    development, sealed, notes = prepare(task, splits)
    return Problem(table, task, splits, shares, development, sealed, space, notes)


def check_classes(space: Space, classes: Sequence[str]) -> None:
    """Checks that the class weights in a space fit the classes of a task.

    Raises:
        SpaceError: Weights of another kind of task, or of other classes.
    """
    paths = [*space.fixed, *(leaf.path for leaf in space.leaves)]
    weighted = [path[2] for path in paths if path[:2] == ("loss", "class_weights")]
    if len(classes) == 2:
        wrong = [path[1] for path in paths if path[0] == "loss" and "class_weight" in path[1]]
        if wrong:
            raise SpaceError(
                f"{space.name}: loss.{wrong[0]} is for more than two classes; "
                "a binary task has loss.pos_weight"
            )
    elif ("loss", "pos_weight") in paths:
        raise SpaceError(
            f"{space.name}: loss.pos_weight is for two classes, this task has {len(classes)}; "
            "use loss.class_weight_power or loss.class_weights"
        )
    elif weighted and sorted(weighted) != sorted(classes):
        raise SpaceError(
            f"{space.name}: loss.class_weights names {', '.join(weighted)}; "
            f"the task's classes are {', '.join(classes)}"
        )


def announce(options: Options, problem: Problem, samples: int, path: Path) -> None:
    """Says what is searched on, how, and where the results go."""
    splits, schema = problem.splits, problem.development.schema
    columns = len(schema.numeric) + len(schema.categorical)
    say(
        f"{problem.task.name}: {len(problem.task.y)} rows ({problem.table.source}), "
        f"{len(problem.task.classes)} classes, {columns} features; "
        f"{len(splits.development)} rows to search on, {len(splits.test)} test rows kept apart"
    )
    replicas = f"{options.folds} folds" if options.folds > 1 else "one validation split"
    say(
        f"{samples} trials of at most {options.max_epochs} epochs, {replicas}, "
        f"space {problem.space.name}, seed {options.seed}; results in {path}"
    )
    if options.budget.seconds is not None:
        say("the time budget is the search's; retraining and scoring come after it")
    warn_of_stand_in(problem)


def warn_of_stand_in(problem: Problem) -> None:
    """Says so where the rows are made up."""
    if problem.table.source == "stand-in":
        say(STAND_IN)
