"""One trial's config: a validated tree, the same for search, retraining and the stored model.

Ranges live in search spaces (`space.py`); here every leaf is a value.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The network: `depth` hidden layers of linear, batch norm, activation and dropout."""

    family: Literal["mlp"] = "mlp"
    depth: int = Field(ge=1, le=4)
    width_1: int = Field(ge=1, le=4096)
    width_2: int | None = Field(default=None, ge=1, le=4096)
    width_3: int | None = Field(default=None, ge=1, le=4096)
    width_4: int | None = Field(default=None, ge=1, le=4096)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    batch_norm: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _a_width_for_each_layer(self) -> Self:
        given = [self.width_1, self.width_2, self.width_3, self.width_4]
        for layer, width in enumerate(given, start=1):
            if (width is not None) != (layer <= self.depth):
                verb = "needs" if width is None else "has no layer for"
                raise ValueError(f"depth {self.depth} {verb} width_{layer}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of each hidden layer, first to last."""
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
    """

    pos_weight: float | None = Field(default=None, gt=0)
    weighting: Literal["power", "per_class"] | None = None
    class_weight_power: float | None = Field(default=None, ge=0, le=4)
    class_weights: dict[str, float] | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

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
    """Adam with weight decay in the gradient (`adam`) or decoupled (`adamw`)."""

    name: Literal["adam", "adamw"] = "adam"
    lr: float = Field(gt=0, le=10)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(ge=2)


class ScheduleConfig(_Section):
    """Plateau and early stopping, both on the validation loss, both counted in epochs.

    Attributes:
        plateau_factor: What the learning rate is multiplied with on a plateau.
        plateau_patience: Epochs without improvement that are borne before it.
        early_stop_patience: Epochs without an improvement of `early_stop_min_delta`
            after which the trial ends.
        early_stop_min_delta: The least improvement that counts for early stopping.
    """

    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    plateau_patience: int = Field(default=10, ge=0)
    early_stop_patience: int = Field(default=10, ge=1)
    early_stop_min_delta: float = Field(default=0.01, ge=0)


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
