"""AutoGluon on each fold in turn, for a given time; probabilities of the validation rows.

    PYTHON_WITH_AUTOGLUON benchmarks/peers/autogluon_folds.py REQUEST

It is run by the Python of another environment (AutoGluon needs an older pandas), so it imports
nothing of this project. Each fold is a fit of its own with its share of the time, and no look at
the validation rows.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from autogluon.tabular import TabularPredictor


def main(request: dict[str, Any]) -> None:
    folder = Path(request["folder"])
    parts = []
    with np.load(request["data"]) as arrays:
        table = pd.DataFrame(arrays["x"]).add_prefix("x")
        table["y"] = arrays["y"]
        for fold in range(request["folds"]):
            train, val = arrays[f"train_{fold}"], arrays[f"val_{fold}"]
            predictor = TabularPredictor(
                "y", eval_metric="log_loss", path=str(folder / f"fold-{fold}"), verbosity=0
            ).fit(
                table.iloc[train],
                time_limit=request["seconds"] / request["folds"],
                presets="best_quality",
                num_cpus=request["workers"],
            )
            p = predictor.predict_proba(table.iloc[val].drop(columns="y"))
            parts.append(pd.DataFrame({"fold": fold, "y": table["y"].iloc[val], "p1": p[1]}))
    pd.concat(parts).to_parquet(folder / "out-of-fold.parquet")
    versions = {name: version(name) for name in ("autogluon.tabular", "pandas", "scikit-learn")}
    (folder / "versions.json").write_text(json.dumps(versions), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
