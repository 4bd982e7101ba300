"""A finished run's model: stored without pickles, loaded, asked for probabilities."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from tune_steel.architectures import make_network
from tune_steel.config import TrialConfig
from tune_steel.errors import DataError
from tune_steel.features import Features, Floats, Schema
from tune_steel.fit import predict_probabilities
from tune_steel.networks import Network, output_width
from tune_steel.preprocess import Preprocessing

_FORMAT = 2


@dataclass(frozen=True)
class FittedModel:
    """R networks of one config that differ in their seed, and all that scoring raw rows needs.

    Attributes:
        config: The trial's config.
        classes: Class names.
        network: The stacked networks, [R] replicas.
        preprocessing: Their feature transforms, [R] replicas.
        data_source: Where the training rows came from; `stand-in` means no real data.
    """

    config: TrialConfig
    classes: tuple[str, ...]
    network: Network
    preprocessing: Preprocessing
    data_source: str

    def predict_proba(self, frame: pd.DataFrame) -> Floats:
        """Mean probabilities of the networks [n, C] for rows with the training table's columns.

        Raises:
            DataError: A column is missing or not of its kind.
        """
        features = self.preprocessing.schema.encode(frame)
        mean: Floats = self.replica_probabilities(features).mean(axis=0)
        return mean

    def replica_probabilities(self, features: Features) -> Floats:
        """Probabilities of each network [R, n, C]."""
        return predict_probabilities(self.network, self.preprocessing, features)


def save_model(model: FittedModel, folder: Path) -> None:
    """Makes a folder of `weights.safetensors`, `preprocessing.safetensors` and `model.json`.

    The folder appears when all three are written; an older one goes.
    """
    place, folder = folder, folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    weights = {name: t.contiguous().cpu() for name, t in model.network.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    arrays = {"median": model.preprocessing.median, **model.preprocessing.state}
    save_arrays(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "preprocessing.safetensors",
    )
    description = {
        "format": _FORMAT,
        "config": model.config.as_dict(),
        "classes": list(model.classes),
        "schema": asdict(model.preprocessing.schema),
        "scaling": model.preprocessing.scaling,
        "replicas": len(model.preprocessing.median),
        "data_source": model.data_source,
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


def load_model(folder: Path) -> FittedModel:
    """Reads what `save_model` wrote.

    Raises:
        DataError: A file is missing or of another format.
    """
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        arrays = load_arrays(folder / "preprocessing.safetensors")
        weights = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: no model can be read there ({error})") from None
    if description.get("format") != _FORMAT:
        raise DataError(f"{folder}: model format {description.get('format')}, known is {_FORMAT}")
    schema = Schema(
        numeric=tuple(description["schema"]["numeric"]),
        flagged=tuple(description["schema"]["flagged"]),
        categorical=tuple(
            (name, tuple(values)) for name, values in description["schema"]["categorical"]
        ),
    )
    median = arrays.pop("median")
    preprocessing = Preprocessing(description["scaling"], schema, median, arrays)
    config = TrialConfig.model_validate(description["config"])
    classes = tuple(description["classes"])
    network = make_network(
        config.model,
        len(schema.numeric),
        preprocessing.width,
        output_width(len(classes)),
        [torch.Generator() for _ in range(description["replicas"])],
    )
    network.load_state_dict(weights)
    return FittedModel(config, classes, network, preprocessing, description["data_source"])
