"""The search as a script of Optuna's documentation: processes that share a journal.

    python -m benchmarks.peers.plain_optuna REQUEST

TPE with the constant liar that its documentation advises for parallel workers, and Optuna's own
SuccessiveHalvingPruner.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import optuna
import torch
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from benchmarks.peers.training import Data, Request, Trial, epochs
from tune_steel.space import load_space

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def open_study(request: Request, worker: int) -> optuna.Study:
    return optuna.create_study(
        study_name="peer",
        storage=JournalStorage(JournalFileBackend(f"{request.folder}/study.journal")),
        sampler=TPESampler(seed=request.seed * 1000 + worker, constant_liar=True),
        pruner=SuccessiveHalvingPruner(
            min_resource=request.grace_period, reduction_factor=request.reduction_factor
        ),
        load_if_exists=True,
    )


def work(request: Request, worker: int) -> None:
    """One process."""
    space = load_space(Path(request.space))
    fixed = {".".join(path): value for path, value in space.fixed.items()}
    data = Data.read(request.data)

    def objective(trial: optuna.Trial) -> float:
        config = {**fixed, **space.suggest(trial)}
        for epoch in epochs(config, data, request.max_epochs, request.seed):
            trial.report(epoch.val_loss, epoch.number)
            if trial.should_prune():
                raise optuna.TrialPruned
        return epoch.best_val_loss

    open_study(request, worker).optimize(
        objective,
        callbacks=[MaxTrialsCallback(request.samples, states=ENDED)],
        catch=(FloatingPointError,),
    )


def ended_trials(study: optuna.Study) -> list[Trial]:
    trials = []
    for trial in study.get_trials(deepcopy=False, states=ENDED):
        losses = trial.intermediate_values
        if losses and trial.state != TrialState.FAIL and trial.datetime_complete is not None:
            ended = trial.datetime_complete.timestamp()
            trials.append(Trial(trial.params, min(losses.values()), len(losses), ended))
    return trials


def main(request: Request) -> None:
    study = open_study(request, 0)
    study.enqueue_trial(load_space(Path(request.space)).defaults())
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(request, i)) for i in range(request.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    request.answer(ended_trials(study), torch=torch.__version__, optuna=optuna.__version__)


if __name__ == "__main__":
    main(Request.read(sys.argv[1]))
