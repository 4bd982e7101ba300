"""A real search some of whose trials meet a real fault: `python faulty_search.py OPTIONS...`.

`FAULTS` in the environment is JSON: the fault of each slot, and as `again 3` that of training the
trial of slot 3 again. A fault with `-once` in its name comes only in the first try; `MARKS` is a
folder where tries leave a mark.
"""

from __future__ import annotations

import tune_steel.ray_environment

import ctypes
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tune_steel.ray_tune
from tune_steel.seeds import derive
from tune_steel.trainable import train_trial as real

FAULTS = json.loads(os.environ["FAULTS"])
MARKS = os.environ["MARKS"]


def hoard() -> list[Any]:
    """5 GB, a page at a time."""
    import numpy as np

    return [np.ones(2**24) for _ in range(40)]


def faulty(trial: dict[str, Any], **given: Any) -> None:
    import tune_steel.fit as room
    from tune_steel.fit import Fit

    name = FAULTS.get(str(trial["slot"]), "")
    mark = Path(MARKS) / f"{trial['slot']}"
    first = not mark.exists()
    mark.touch()

    class Faulty(Fit):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if name.endswith("-once") and not first:
                return
            kind = name.removesuffix("-once")
            if kind == "raise":
                raise ValueError("no such thing")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "exit":
                os._exit(3)
            if kind == "hang":
                ctypes.PyDLL(None).sleep(3600)  # with Python's lock held, as a stuck library does
            if kind == "memory":
                self.hoard = hoard()

    room.Fit = Faulty  # type: ignore[misc]
    try:
        real(trial, **given)
    finally:
        room.Fit = Fit  # type: ignore[misc]


def faulty_again(how: Any, plan: Any, *given: Any) -> Any:
    from tune_steel.refit import train_in_worker

    slot = next(s for s in itertools.count() if derive(0, "trial", s) == plan.seed)
    mark = Path(MARKS) / f"again {slot}"
    first = not mark.exists()
    mark.touch()

    def broken(*arguments: Any) -> Any:
        name = FAULTS.get(f"again {slot}", "")
        if name == "raise":
            raise ValueError("no such thing")
        if name == "kill" or (name == "kill-once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "memory":
            hoard()
        return how(*arguments)

    return train_in_worker(broken, plan, *given)


if __name__ == "__main__":
    import tune_steel.refit
    from tune_steel.search import main

    tune_steel.refit.train_in_worker = faulty_again
    tune_steel.ray_tune.train_trial = faulty  # type: ignore[assignment]
    sys.exit(main())
