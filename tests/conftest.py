import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from tune_steel.space import Space
    from tune_steel.splits import Development, SealedTest

REAL = os.environ.get("TUNE_STEEL_DATA")

# Cores are shared with other tests: scikit-learn's threads would burn them while they wait.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

SMALL_SPACE = """
[model]
depth = { int = [1, 2], default = 1 }
width_1 = { choices = [8, 16], default = 8 }
width_2 = { choices = [8, 16], default = 8, when = { depth = [2] } }
dropout = { float = [0.0, 0.5], default = 0.1 }
[loss]
pos_weight = { float = [0.5, 4.0], log = true, default = 1.0 }
[optimizer]
lr = { float = [1e-3, 1e-1], log = true, default = 1e-2 }
batch_size = { choices = [32, 64], default = 64 }
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="TUNE_STEEL_DATA is not set")
    for item in items:
        if "real_data" in item.keywords and not REAL:
            item.add_marker(skip)
    # Their files take longest, and whoever gets one last is waited for.
    items.sort(key=lambda item: "ray" not in item.keywords)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the cache of the person who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The number of threads changes the last bits of a sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL_SPACE)
    return path


@pytest.fixture
def decaying_space(tmp_path: Path) -> "Space":
    """The small space, where the learning rate falls at every epoch that is not better."""
    from tune_steel.space import load_space

    text = SMALL_SPACE + "[schedule]\nplateau_patience = 0\nplateau_factor = 0.3\n"
    (tmp_path / "s.toml").write_text(text)
    return load_space(tmp_path / "s.toml")


@pytest.fixture
def steel_rows() -> "tuple[Development, SealedTest]":
    """Development and test rows of `binary` on the stand-in, two folds."""
    from tune_steel.data import load_steel
    from tune_steel.splits import freeze, prepare
    from tune_steel.tasks import steel_task

    task = steel_task(load_steel(source="stand-in"), "binary")
    development, sealed, _ = prepare(task, freeze(task, seed=0, split=task.split, folds=2))
    return development, sealed


@pytest.fixture
def own_csv(tmp_path: Path) -> Path:
    """300 rows, string labels, one categorical, one half-missing and one constant column."""
    rng = np.random.default_rng(0)
    size = rng.normal(size=300)
    shade = rng.choice(["red", "green", "blue"], size=300)
    frame = pd.DataFrame(
        {
            "size": size,
            "weight": np.where(rng.random(300) < 0.5, np.nan, size + rng.normal(size=300)),
            "shade": shade,
            "site": "north",
            "verdict": np.where(size + (shade == "red") + rng.normal(size=300) > 0, "bad", "good"),
        }
    )
    path = tmp_path / "plates.csv"
    frame.to_csv(path, index=False)
    return path


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """Runs the real command line in an empty folder; returns what it printed and its code."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tune_steel.search", *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
