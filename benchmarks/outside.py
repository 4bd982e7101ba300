"""Methods that want an environment of their own, whose pins are not ours.

    pip install pytabkit pyarrow              (in an environment of its own, without torchvision)
    python -m benchmarks.quality --methods TabM,RealMLP --rivals-python .../bin/python
    pip install "autogluon.tabular[all]"      (in another one)
    python -m benchmarks.quality --methods AutoGluon --rivals-python .../bin/python

The benchmark runs this very file with that interpreter, which needs nothing of this project:

    python benchmarks/outside.py METHOD train.parquet test.parquet out.parquet '{"seed": 0, ...}'

reads the training rows, whose last column `y` is the class index, and the features of the test
rows, and writes a column of probabilities for each class.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.rivals import Fold, Method, Outcome

_MARGIN = 3  # AutoGluon overruns its limit a little; three times the limit is no answer any more


def _pytabkit(name: str, train: Any, test: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    import pytabkit

    kind = {"TabM": pytabkit.TabM_D_Classifier, "RealMLP": pytabkit.RealMLP_TD_Classifier}[name]
    model = kind(device="cpu", random_state=given["seed"], n_threads=given["threads"], n_cv=1)
    model.fit(train.drop(columns="y"), train["y"].to_numpy())
    return model.classes_, model.predict_proba(test)


def _autogluon(train: Any, test: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    from autogluon.tabular import TabularPredictor

    with TemporaryDirectory() as folder:
        predictor = TabularPredictor("y", path=folder, eval_metric="log_loss", verbosity=0)
        predictor.fit(
            train,
            presets="best_quality",
            time_limit=given["seconds"],
            num_cpus=given["threads"],
            num_gpus=0,
        )
        p = predictor.predict_proba(test)
        return list(p.columns), p.to_numpy()


def _work() -> None:
    import numpy as np
    import pandas as pd

    name, train_file, test_file, out_file, options = sys.argv[1:]
    train, test = pd.read_parquet(train_file), pd.read_parquet(test_file)
    given = json.loads(options)
    if name == "AutoGluon":
        seen, p = _autogluon(train, test, given)
    else:
        seen, p = _pytabkit(name, train, test, given)
    columns = {f"p{c}": np.asarray(p, dtype=np.float64)[:, i] for i, c in enumerate(seen)}
    pd.DataFrame(columns).to_parquet(out_file)


def _method(name: str) -> Method:
    def method(fold: Fold) -> Outcome:
        return _run(name, fold)

    return method


def _run(name: str, fold: Fold) -> Outcome:
    """Runs this file with the other interpreter."""
    import subprocess

    import numpy as np
    import pandas as pd

    from benchmarks.rivals import MissingError, Outcome
    from tune_steel.seeds import derive

    python, threads = fold.settings.python, fold.settings.threads
    if python is None:
        raise MissingError("it needs --rivals-python, an environment with it (outside.py)")
    given = {"seed": derive(fold.seed, name) % 2**31, "threads": threads}
    limit = None
    if name == "AutoGluon":
        if "seconds" not in fold.earlier:
            raise MissingError("it gets the seconds of tune_steel on this fold, which has not run")
        given["seconds"] = max(round(fold.earlier["seconds"]), 1)
        limit = _MARGIN * given["seconds"] + 60
    columns = [f"f{i}" for i in range(fold.x.shape[1])]
    with TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{part}.parquet") for part in ("train", "test", "out")]
        pd.DataFrame(fold.x, columns=columns).assign(y=fold.y).to_parquet(files[0])
        pd.DataFrame(fold.x_test, columns=columns).to_parquet(files[1])
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(python), str(Path(__file__).resolve()), name, *files, json.dumps(given)],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise MissingError(lines[-1])
        out = pd.read_parquet(files[2])
    p = np.zeros((len(fold.test), fold.classes))
    for column in out.columns:
        p[:, int(column[1:])] = out[column].to_numpy()
    # They predict in single precision.
    notes = f"time limit {given['seconds']} s" if limit else ""
    return Outcome({name: p / p.sum(axis=1, keepdims=True)}, notes)


METHODS: dict[str, Method] = {name: _method(name) for name in ("TabM", "RealMLP", "AutoGluon")}


if __name__ == "__main__":
    _work()
