"""What a search would do: its space, splits and first configs; nothing is trained or written."""

from __future__ import annotations

import json

import optuna

from tune_steel.options import Options
from tune_steel.problem import Problem, warn_of_stand_in
from tune_steel.run_folder import RunFolder
from tune_steel.samplers import grid
from tune_steel.scheduler import rungs
from tune_steel.splits import split_hash
from tune_steel.study import ask, begin
from tune_steel.terminal import say, show
from tune_steel.warm_start import beginning

_FIRST_CONFIGS = 5


def dry_run(options: Options, problem: Problem) -> None:
    """Prints the resolved space, the splits and the first configs; trains nothing."""
    splits, task, space = problem.splits, problem.task, problem.space
    schema = problem.development.schema
    stops = rungs(options.max_epochs, options.grace_period, options.reduction_factor)
    folds = ", ".join(f"{len(train)}+{len(val)}" for train, val in splits.folds)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    first = beginning(options, space, RunFolder(options.output, options, problem).record)
    for note in (*problem.notes, *first.notes):
        say(note)
    begin(study, first.configs, first.trials)
    fixed = dict(enumerate(grid(space, options.seed))) if options.search == "grid" else None
    configs = [
        ask(study, space, options.search, options.seed, fixed)[1]
        for _ in range(min(_FIRST_CONFIGS, options.budget.samples, len(fixed or range(99))))
    ]
    lines = [
        f"data: {problem.table.source}, {len(problem.table.frame)} rows",
        f"task: {task.name}; classes: {', '.join(task.classes)}",
        f"numeric columns: {', '.join(schema.numeric) or 'none'}",
        f"categorical columns: {', '.join(name for name, _ in schema.categorical) or 'none'}",
        f"splits: train {len(splits.train)}, val {len(splits.val)}, test {len(splits.test)} "
        f"(test hash {split_hash(task.rows[splits.test])[:12]}); folds: {folds}",
        {
            "asha": f"ASHA may stop trials after epochs {', '.join(map(str, stops))} of "
            f"{options.max_epochs}",
            "median": f"the median rule may stop trials from epoch {options.grace_period} of "
            f"{options.max_epochs}",
            "none": f"no trial is stopped before epoch {options.max_epochs}",
        }[options.scheduler],
        f"space {space.name}:",
        *(f"  {key} = {json.dumps(v)}" for key, v in sorted(space.as_dict().items())),
        "first configs:",
        *(f"  {record.slot}: {json.dumps(record.params)}" for record in configs),
    ]
    show("\n".join(lines) + "\n")
    warn_of_stand_in(problem)
