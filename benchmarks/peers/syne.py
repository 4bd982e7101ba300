"""The search as a script of Syne Tune's documentation: local backend, BOHB (ASHA with a model).

    python -m benchmarks.peers.syne REQUEST

Syne Tune's spaces have no conditions: every leaf is always sampled, and the searcher also sees
the values that the training does not read. A trial is a process, started anew. Its tuner looks
for results every 5 s by default; trials here take seconds, so it looks five times a second.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.training import Request, Trial
from tune_steel.space import Leaf, Space, load_space

ENTRY_POINT = Path(__file__).with_name("syne_trial.py")


def config_space(space: Space) -> dict[str, Any]:
    """The space without its conditions; what is fixed is a constant."""
    from syne_tune.config_space import choice, lograndint, loguniform, randint, uniform

    def domain(leaf: Leaf) -> Any:
        if leaf.kind == "choices":
            return choice(list(leaf.values))
        low, high = leaf.values
        if leaf.kind == "int":
            return (lograndint if leaf.log else randint)(int(low), int(high))
        return (loguniform if leaf.log else uniform)(float(low), float(high))

    fixed = {".".join(path): value for path, value in space.fixed.items()}
    return {**fixed, **{leaf.key: domain(leaf) for leaf in space.leaves}}


def main(request: Request) -> None:
    os.environ["SYNETUNE_FOLDER"] = request.folder

    import syne_tune
    import torch
    from syne_tune import StoppingCriterion, Tuner
    from syne_tune.backend import LocalBackend
    from syne_tune.experiments import load_experiment
    from syne_tune.optimizer.baselines import BOHB

    space = load_space(Path(request.space))
    defaults = {leaf.key: leaf.default for leaf in space.leaves}
    constants = {"data": request.data, "max_epochs": request.max_epochs, "seed": request.seed}
    scheduler = BOHB(
        {**config_space(space), **constants},
        metric="val_loss",
        time_attr="epoch",
        max_t=request.max_epochs,
        grace_period=request.grace_period,
        reduction_factor=request.reduction_factor,
        random_seed=request.seed,
        points_to_evaluate=[defaults],
    )
    tuner = Tuner(
        trial_backend=LocalBackend(entry_point=str(ENTRY_POINT), pass_args_as_json=True),
        scheduler=scheduler,
        stop_criterion=StoppingCriterion(max_num_trials_finished=request.samples - 1),
        n_workers=request.workers,
        sleep_time=0.2,
        tuner_name="peer",
    )
    tuner.run()
    results = load_experiment(tuner.name).results
    trials = []
    for _, curve in results.groupby("trial_id"):
        config = {
            key.removeprefix("config_"): value
            for key, value in curve.iloc[0].items()
            if str(key).startswith("config_")
        }
        config = {key: v.item() if hasattr(v, "item") else v for key, v in config.items()}
        loss, ended = float(curve["val_loss"].min()), float(curve["st_worker_timestamp"].max())
        trials.append(Trial(config, loss, len(curve), ended))
    versions = {"syne-tune": syne_tune.__version__, "torch": torch.__version__}
    request.answer(trials, **versions)


if __name__ == "__main__":
    main(Request.read(sys.argv[1]))
