"""One trial's config: a validated tree, the same for search, retraining and the stored model.

Ranges live in search spaces (`space.py`); here every leaf is a value.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The network (`networks.py` and `architectures.py`), and what it does with numeric features.

    Attributes:
        family: `mlp`, `resnet`, `tabm` (an ensemble that shares its weights) or `nca` (the
            classes of the nearest training rows in a learnt space).
        depth: Of `mlp` and `tabm`: hidden layers.
        width_1: Of `mlp` and `tabm`: units of the first hidden layer; `width_2` and so on of the
            others.
        blocks: Of `resnet` and `nca`: residual blocks.
        width: Of `resnet` and `nca`: units between the blocks.
        activation: Of `mlp` and `tabm`.
        batch_norm: Of `mlp`; the blocks of `resnet` and `nca` always have it, `tabm` never.
        dropout: Dropout probability of every hidden layer.
        members: Of `tabm`: networks that share the weights.
        embedding: What each numeric feature becomes before the first layer (`embeddings.py`).
        embedding_width: Numbers that each feature becomes.
        frequencies: Of periodic embeddings: waves a feature.
        frequency_scale: Of periodic embeddings: standard deviation of the initial frequencies.
        bins: Of piecewise-linear embeddings: the most bins a feature.
    """

    family: Literal["mlp", "resnet", "tabm", "nca"] = "mlp"
    depth: int | None = Field(default=None, ge=1, le=4)
    width_1: int | None = Field(default=None, ge=1, le=4096)
    width_2: int | None = Field(default=None, ge=1, le=4096)
    width_3: int | None = Field(default=None, ge=1, le=4096)
    width_4: int | None = Field(default=None, ge=1, le=4096)
    blocks: int | None = Field(default=None, ge=0, le=8)
    width: int | None = Field(default=None, ge=1, le=4096)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    batch_norm: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    members: int | None = Field(default=None, ge=1, le=64)
    embedding: Literal["none", "pbld", "plr", "piecewise_quantile", "piecewise_tree"] = "none"
    embedding_width: int | None = Field(default=None, ge=2, le=64)
    frequencies: int = Field(default=16, ge=1, le=256)
    frequency_scale: float | None = Field(default=None, gt=0, le=100)
    bins: int | None = Field(default=None, ge=2, le=128)

    @model_validator(mode="after")
    def _fits_the_family(self) -> Self:
        given = [self.width_1, self.width_2, self.width_3, self.width_4]
        layered = self.family in ("mlp", "tabm")
        self._needs("family", self.family, "depth", layered)
        for layer, width in enumerate(given, start=1):
            if (width is not None) != (layer <= (self.depth or 0)):
                verb = "needs" if width is None else "has no layer for"
                raise ValueError(f"depth {self.depth or 0} {verb} width_{layer}")
        self._needs("family", self.family, "blocks", not layered)
        self._needs("family", self.family, "width", not layered)
        if self.family == "resnet" and self.blocks == 0:
            raise ValueError("family 'resnet' needs at least one of its blocks")
        self._needs("family", self.family, "members", self.family == "tabm")
        return self

    @model_validator(mode="after")
    def _fits_the_embedding(self) -> Self:
        periodic = self.embedding in ("pbld", "plr")
        self._needs("embedding", self.embedding, "embedding_width", self.embedding != "none")
        self._needs("embedding", self.embedding, "frequency_scale", periodic)
        self._needs("embedding", self.embedding, "bins", self.embedding.startswith("piecewise"))
        return self

    def _needs(self, what: str, kind: str, key: str, needed: bool) -> None:
        if (getattr(self, key) is not None) != needed:
            raise ValueError(f"{what} {kind!r} {'needs' if needed else 'has no'} {key}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of each hidden layer of `mlp` and `tabm`, first to last."""
        given = (self.width_1, self.width_2, self.width_3, self.width_4)
        return tuple(width for width in given if width is not None)


class LossConfig(_Section):
    """The training loss; the loss that judges trials is the task's (`metrics.py`).

    Attributes:
        pos_weight: Binary tasks: weight of the positive class.
        weighting: Only in spaces that choose between the two kinds of class weights below.
        class_weight_power: More than two classes: class weights are the inverse class
            frequencies to this power; 0 is no weighting, 1 is balanced.
        class_weights: More than two classes: one weight per class name.
        label_smoothing: Share of the target spread evenly over the classes.
        focal_gamma: Each class's term is multiplied with (1 - p)^gamma: rows that are already
            right count less (focal loss, Lin et al. 2017, arXiv 1708.02002). 0 is cross-entropy.
    """

    pos_weight: float | None = Field(default=None, gt=0)
    weighting: Literal["power", "per_class"] | None = None
    class_weight_power: float | None = Field(default=None, ge=0, le=4)
    class_weights: dict[str, float] | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    focal_gamma: float = Field(default=0.0, ge=0, le=10)

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> Self:
        given = {
            "pos_weight": self.pos_weight,
            "class_weight_power": self.class_weight_power,
            "class_weights": self.class_weights,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other")
        wanted = {"power": "class_weight_power", "per_class": "class_weights", None: None}
        need = wanted[self.weighting]
        if need is not None and named != [need]:
            raise ValueError(f"weighting {self.weighting!r} needs {need}")
        if self.class_weights and min(self.class_weights.values()) <= 0:
            raise ValueError("class_weights must be above 0")
        return self


class OptimizerConfig(_Section):
    """Adam with weight decay in the gradient (`adam`) or decoupled (`adamw`).

    Attributes:
        name: `adam` or `adamw`.
        lr: Learning rate.
        weight_decay: Weight decay.
        batch_size: Rows a step.
    """

    name: Literal["adam", "adamw"] = "adam"
    lr: float = Field(gt=0, le=10)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=256, ge=2)


class ScheduleConfig(_Section):
    """Learning rate and early stopping, by epochs.

    A plateau is seen on the validation loss. A cosine falls to 0 over a number of epochs that the
    trial has of its own, and ends it: it is not tied to the most epochs of the search, so that a
    trial which is short by design is compared at ASHA's rungs as it is, and so is a long one.

    Attributes:
        kind: `plateau` or `cosine`.
        cosine_epochs: Of `cosine`: epochs until the learning rate would be 0.
        plateau_factor: What the learning rate is multiplied with on a plateau.
        plateau_patience: Epochs without improvement that are borne before it.
        early_stop_patience: Epochs without an improvement of `early_stop_min_delta`
            after which the trial ends.
        early_stop_min_delta: The least improvement that counts for early stopping.
    """

    kind: Literal["plateau", "cosine"] = "plateau"
    cosine_epochs: int | None = Field(default=None, ge=1)
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    plateau_patience: int = Field(default=10, ge=0)
    early_stop_patience: int = Field(default=10, ge=1)
    early_stop_min_delta: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _a_length_for_a_cosine(self) -> Self:
        if (self.cosine_epochs is not None) != (self.kind == "cosine"):
            verb = "needs" if self.kind == "cosine" else "has no"
            raise ValueError(f"kind {self.kind!r} {verb} cosine_epochs")
        return self


class PreprocessingConfig(_Section):
    """How numeric features are scaled (`preprocess.py`)."""

    scaling: Literal["standard", "robust", "quantile"] = "standard"


class TrialConfig(_Section):
    """Everything about one trial but its seed and its data."""

    model: ModelConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()

    def as_dict(self) -> dict[str, object]:
        """The tree as plain values, without what is unset; `TrialConfig(**_)` reads it back."""
        return self.model_dump(exclude_none=True)
