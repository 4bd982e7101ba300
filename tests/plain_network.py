"""One replica of a stacked network, written with torch.nn."""

import torch
from torch import nn

from tune_steel.config import ModelConfig
from tune_steel.networks import StackedHead

PLAIN_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
WIDTHS = (7, 6, 4, 3)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_config(depth, **settings):
    widths = {f"width_{layer}": WIDTHS[layer - 1] for layer in range(1, depth + 1)}
    return ModelConfig(depth=depth, **widths, **settings)


def copy_linear(stacked, replica):
    weight = stacked.weight[replica].detach()
    if not isinstance(stacked, StackedHead):
        weight = weight.T
    plain = nn.Linear(*reversed(weight.shape), bias=stacked.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if stacked.bias is not None:
            plain.bias.copy_(stacked.bias[replica].flatten())
    return plain.to(weight.dtype)


class PlainMLP(nn.Module):
    """Replica r of a stacked network, written with torch.nn."""

    def __init__(self, stacked, config, replica):
        super().__init__()
        self.linears = nn.ModuleList(copy_linear(linear, replica) for linear in stacked.linears)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if config.batch_norm else nn.Identity()
            for width in config.widths
        )
        for norm, plain in zip(stacked.norms, self.norms, strict=True):
            state = {name: tensor[replica, 0] for name, tensor in norm.state_dict().items()}
            plain.load_state_dict(state, strict=False)
        self.activation = PLAIN_ACTIVATIONS[config.activation]()
        self.head = copy_linear(stacked.head, replica)

    def forward(self, x, masks=None):
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self.activation(norm(linear(x)))
            if masks is not None:
                x = x * masks[layer]
        return self.head(x)
