"""The recorded training step, on a machine without a GPU.

In the place of a CUDA graph, `operations` records torch's own operations and runs them again on
the memory of the recording, as a graph does. What a graph could not hold is an error here too: an
operation whose result Python reads, or a constant that would be copied from the host.
"""

from functools import partial

import numpy as np
import pytest
import torch
from test_fit import SEEDS, develop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tune_steel.captured import CapturedStep
from tune_steel.config import TrialConfig
from tune_steel.fit import Fit

pytestmark = pytest.mark.usefixtures("one_thread")

HOST = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "unique")
RATES = (2**-7, 2**-7, 2**-9, 2**-8)  # exact in single precision, in which a GPU reads them


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(HOST), f"a graph cannot hold {name}"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def operations(function):
    """Records as a CUDA graph does, but runs it, too: the first replay has been done then."""
    recorder = Recorder()
    with recorder:
        output = function()
    replays = iter([lambda: None])
    return output, lambda: next(replays, recorder.replay)()


MODELS = {
    "perceptron": {"depth": 2, "width_1": 12, "width_2": 7, "dropout": 0.3},
    "smooth": {"depth": 1, "width_1": 12, "activation": "gelu", "batch_norm": False},
    "embedded": {
        "depth": 1,
        "width_1": 12,
        "dropout": 0.2,
        "embedding": "pbld",
        "embedding_width": 4,
        "frequencies": 4,
        "frequency_scale": 0.3,
    },
    "bins": {
        "depth": 1,
        "width_1": 12,
        "embedding": "piecewise_quantile",
        "embedding_width": 4,
        "bins": 4,
    },
    "resnet": {"family": "resnet", "blocks": 1, "width": 8, "dropout": 0.2},
    "tabm": {"family": "tabm", "depth": 1, "width_1": 8, "members": 4, "dropout": 0.2},
    "nca": {"family": "nca", "blocks": 1, "width": 8, "dropout": 0.2},
}


def fit_of(model, gamma=0.0):
    tree = {
        "model": MODELS[model],
        "loss": {"label_smoothing": 0.1, "focal_gamma": gamma},
        "optimizer": {"lr": RATES[0], "batch_size": 32},  # 80 rows: the last batch has 16
    }
    development = develop()
    return Fit(TrialConfig.model_validate(tree), development, development.folds, SEEDS)


def curve(fit):
    return [np.concatenate([fit.train_epoch(rate), fit.score()["loss"]]) for rate in RATES]


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("model", MODELS)
def test_replays_of_a_recorded_step_train_as_the_step_does_bit_for_bit(model, gamma):
    plain = fit_of(model, gamma)
    expected = curve(plain)
    captured = fit_of(model, gamma)
    captured._optimizer.rate = torch.tensor(RATES[0])  # as on a GPU
    recordings = []

    def record(function):
        recordings.append(function)
        return operations(function)

    captured._captured = CapturedStep(record)
    assert np.array_equal(curve(captured), expected)
    assert len(recordings) == 2  # one a batch size, in all epochs
    state, theirs = captured.network.state_dict(), plain.network.state_dict()
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)


def test_each_output_is_its_own_and_each_shape_has_a_recording():
    steps = []

    def step(x, y):
        steps.append(len(x))
        return x * 2 + y

    captured = partial(CapturedStep(operations), step)
    ones, threes = torch.ones(4), torch.ones(3)
    outputs = [captured(ones * i, ones) for i in range(5)] + [captured(threes, threes)]
    assert [float(out[0]) for out in outputs] == [1, 3, 5, 7, 9, 3]
    assert steps == [4, 4, 3]  # as it is, recorded, and the other shape as it is


def test_what_the_host_would_read_is_an_error_of_the_recording():
    captured = partial(CapturedStep(operations), lambda x: x * x.sum().item())
    captured(torch.ones(2))
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        captured(torch.ones(2))


def test_on_a_cpu_no_step_is_recorded():
    fit = fit_of("perceptron")
    assert fit._captured is None
    assert isinstance(fit._optimizer.rate, float)
