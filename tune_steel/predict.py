"""A finished run's model: stored without pickles, loaded, asked for probabilities."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save
from torch import Tensor

from tune_steel.architectures import make_network
from tune_steel.config import TrialConfig
from tune_steel.ensemble import Calibration, Combination
from tune_steel.errors import DataError
from tune_steel.features import Features, Floats, Schema
from tune_steel.fit import predict_log_probabilities
from tune_steel.networks import output_width
from tune_steel.preprocess import Preprocessing
from tune_steel.scores import decide

_FORMAT = 6
T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """Networks of one config that differ in their rows and seeds.

    Attributes:
        trial: Number of the trial.
        config: Its config.
        preprocessing: Their feature transforms, [R] replicas.
        networks: S stacks of [R] replicas.
    """

    trial: int
    config: TrialConfig
    preprocessing: Preprocessing
    networks: tuple[torch.nn.Module, ...]

    def log_probabilities(self, features: Features) -> Floats:
        """Log-probabilities of each network as it gives them [S, R, n, C]."""
        x = self.preprocessing.transform(features)
        return np.stack([predict_log_probabilities(network, x) for network in self.networks])

    def probabilities(self, features: Features) -> Floats:
        """Probabilities of each network as it gives them [S * R, n, C]."""
        p: Floats = np.exp(np.concatenate(self.log_probabilities(features)))
        return p

    def stacks(self, features: Features) -> Floats:
        """Probabilities as the networks give them, mean of each stack [S, n, C]."""
        mean: Floats = np.exp(self.log_probabilities(features)).mean(axis=1)
        return mean


@dataclass(frozen=True)
class FittedModel:
    """The ensemble, and all that scoring raw rows needs.

    Attributes:
        classes: Class names.
        members: Those whose weight is above 0.
        combination: How their probabilities become the ensemble's.
        data_source: Where the training rows came from; `stand-in` means no real data.
    """

    classes: tuple[str, ...]
    members: tuple[Member, ...]
    combination: Combination
    data_source: str

    def predict_proba(self, frame: pd.DataFrame) -> Floats:
        """Probabilities [n, C] for rows with the training table's columns.

        Raises:
            DataError: A column is missing or not of its kind.

        Warns:
            UserWarning: No value of a categorical column is a known one.
        """
        schema = self.members[0].preprocessing.schema
        features = schema.encode(frame)
        for line in schema.foreign(frame):
            warnings.warn(line, stacklevel=2)
        return self.probabilities(features)

    def predict(self, frame: pd.DataFrame) -> NDArray[np.str_]:
        """Class names [n]: by the stored threshold, else the most probable ones.

        Raises:
            DataError: A column is missing or not of its kind.
        """
        return np.array(self.classes)[
            decide(self.predict_proba(frame), self.combination.threshold)
        ]

    def probabilities(self, features: Features) -> Floats:
        """Probabilities [n, C] of encoded rows."""
        return self.combination.apply(
            [member.stacks(features).mean(axis=0) for member in self.members]
        )


def rebuild(
    config: TrialConfig, preprocessing: Preprocessing, classes: int, state: Mapping[str, Tensor]
) -> torch.nn.Module:
    """The stacked network of a state."""
    network = make_network(
        config.model,
        len(preprocessing.schema.numeric),
        preprocessing.width,
        output_width(classes),
        [torch.Generator() for _ in preprocessing.median],
    )
    network.load_state_dict(state)
    return network


def save_model(model: FittedModel, folder: Path) -> None:
    """Makes a folder of `weights.safetensors`, `preprocessing.safetensors` and `model.json`.

    Tensor names begin with the member's position, and those of weights with the stack's too:
    `3.0.head.weight`. The folder appears when all three are written; an older one goes.
    """
    place, folder = folder, folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    weights, arrays = {}, {}
    for m, member in enumerate(model.members):
        for s, network in enumerate(member.networks):
            for name, tensor in network.state_dict().items():
                weights[f"{m}.{s}.{name}"] = tensor.contiguous().cpu()
        state = {"median": member.preprocessing.median, **member.preprocessing.state}
        for name, array in state.items():
            arrays[f"{m}.{name}"] = np.ascontiguousarray(array)
    # Its own writing of files has errors of its own, which do not tell a full disk from others.
    (folder / "weights.safetensors").write_bytes(save(weights))
    (folder / "preprocessing.safetensors").write_bytes(save_arrays(arrays))
    description = {
        "format": _FORMAT,
        "classes": list(model.classes),
        "schema": asdict(model.members[0].preprocessing.schema),
        "calibration": asdict(model.combination.calibration),
        "threshold": model.combination.threshold,
        "data_source": model.data_source,
        "members": [
            {
                "trial": member.trial,
                "weight": float(weight),
                "calibration": asdict(calibration),
                "scaling": member.preprocessing.scaling,
                "stacks": len(member.networks),
                "config": member.config.as_dict(),
            }
            for member, weight, calibration in zip(
                model.members,
                model.combination.weights,
                model.combination.of_members,
                strict=True,
            )
        ],
    }
    text = json.dumps(description, indent=1) + "\n"
    (folder / "model.json").write_text(text, encoding="utf-8")
    if place.exists():
        older = folder.with_name(f".{place.name}.{os.getpid()}.older.tmp")
        place.replace(older)
        folder.replace(place)
        shutil.rmtree(older)
    else:
        folder.replace(place)


def load_model(folder: Path | str) -> FittedModel:
    """Reads what `save_model` wrote.

    Raises:
        DataError: A file is missing or of another format.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        arrays = load_arrays(folder / "preprocessing.safetensors")
        weights = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: no model can be read there ({error})") from None
    known = description.get("format") if isinstance(description, dict) else None
    if known != _FORMAT:
        raise DataError(f"{folder}: model format {known}, known is {_FORMAT}")
    try:
        return _model_of(description, arrays, weights)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: the model there is damaged ({error!r})") from None


def _model_of(
    description: dict[str, Any],
    arrays: Mapping[str, NDArray[np.float64]],
    weights: Mapping[str, Tensor],
) -> FittedModel:
    schema = Schema(
        numeric=tuple(description["schema"]["numeric"]),
        flagged=tuple(description["schema"]["flagged"]),
        categorical=tuple(
            (name, tuple(values)) for name, values in description["schema"]["categorical"]
        ),
    )
    classes = tuple(description["classes"])
    members = []
    for m, entry in enumerate(description["members"]):
        state = _below(f"{m}.", arrays)
        median = state.pop("median")
        preprocessing = Preprocessing(entry["scaling"], schema, median, state)
        config = TrialConfig.model_validate(entry["config"])
        networks = tuple(
            rebuild(config, preprocessing, len(classes), _below(f"{m}.{s}.", weights))
            for s in range(entry["stacks"])
        )
        members.append(Member(entry["trial"], config, preprocessing, networks))
    combination = Combination(
        np.array([entry["weight"] for entry in description["members"]]),
        tuple(_calibration(**entry["calibration"]) for entry in description["members"]),
        _calibration(**description["calibration"]),
        description["threshold"],
    )
    return FittedModel(classes, tuple(members), combination, description["data_source"])


def _calibration(temperature: float, bias: list[float] | None) -> Calibration:
    return Calibration(temperature, None if bias is None else tuple(bias))


def _below(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
