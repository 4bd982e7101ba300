"""A training step of a stacked network in as few calls as it takes.

For the plain perceptron, forward and backward are written out instead of recorded by autograd. All
parameters are views of one flat buffer that one call of Adam updates. On a small network the calls
are the time, on a large one what they read and write beside the matmuls.
Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_steel.config import OptimizerConfig
from tune_steel.matmul import product
from tune_steel.networks import (
    Network,
    StackedBatchNorm,
    StackedHead,
    StackedLinear,
    StackedMLP,
)

_aten = torch.ops.aten  # the functions that autograd's backward calls
_ALIGNMENT = 16  # numbers; 64 bytes in single precision
_Gradients: TypeAlias = dict[nn.Parameter, Tensor]


class Backprop:
    """Forward and backward pass of a stacked network in training.

    Attributes:
        parameters: All parameters, flat; the network's own become views of them.
        gradients: Their gradients, from the latest backward pass; 0 between the parameters.
    """

    # No bookkeeping for a graph that is never built.
    mode = torch.inference_mode

    def __init__(self, network: StackedMLP) -> None:
        """Moves the network's parameters and running statistics into flat buffers."""
        self.parameters, self.gradients, gradients = _flat_parameters(network)
        norms = [norm for norm in network.norms if isinstance(norm, StackedBatchNorm)]
        self._statistics = _Statistics(norms) if norms else None
        self._dropouts: list[_Dropout] = []
        self._layers = list(self._chain(network, gradients))

    def _chain(self, network: StackedMLP, gradients: _Gradients) -> Iterator[_Layer]:
        for layer, (linear, norm) in enumerate(zip(network.linears, network.norms, strict=True)):
            assert isinstance(linear, StackedLinear)
            yield _Linear(linear, gradients, to_input=layer > 0)
            if self._statistics is not None:
                assert isinstance(norm, StackedBatchNorm)
                yield _BatchNorm(norm, gradients, *self._statistics.batch[layer])
            yield _ACTIVATIONS[network.activation]()
            if network.dropout > 0:
                self._dropouts.append(_Dropout())
                yield self._dropouts[-1]
        yield _Head(network.head, gradients)

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Logits [R, B, K] of a batch; moves the running statistics.

        Args:
            x: Features [R, B, D].
            masks: If the network has dropout: what the output [R, B, width] of each hidden layer
                is multiplied with, 0 or 1 / (1 - dropout).
        """
        rows = x.shape[1]
        for dropout, mask in zip(self._dropouts, masks, strict=True):
            dropout.mask = mask
        for layer in self._layers:
            x = layer.forward(x)
        if self._statistics is not None:
            self._statistics.move(rows)
        return x

    def backward(self, gradient: Tensor) -> None:
        """Fills `gradients` from the gradient of the latest logits."""
        for layer in reversed(self._layers):
            gradient = layer.backward(gradient)


class Recorded:
    """Forward and backward pass of a network in training, through autograd.

    Attributes:
        parameters: As of `Backprop`.
        gradients: As of `Backprop`.
    """

    mode = torch.no_grad

    def __init__(self, network: Network) -> None:
        """Moves the network's parameters and their gradients into flat buffers."""
        self._network = network
        self.parameters, self.gradients, gradients = _flat_parameters(network)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def forward(self, x: Tensor, y: Tensor, batch: int, masks: Sequence[Tensor] = ()) -> Tensor:
        """Logits of a batch, as `Network.training_logits`."""
        self._network.train()
        with torch.enable_grad():
            self._logits = self._network.training_logits(x, y, batch, masks)
        self._network.eval()
        return self._logits.detach()

    def backward(self, gradient: Tensor) -> None:
        """Fills `gradients` from the gradient of the latest logits."""
        self.gradients.zero_()
        # Given a gradient, `Tensor.backward` imports sympy to compare shapes: half a second and
        # 12 MB of every worker. The sum has that gradient, to the bit.
        with torch.enable_grad():
            total = (self._logits * gradient).sum()
        total.backward()  # type: ignore[no-untyped-call]
        del self._logits  # and with it the graph


class _Layer(Protocol):
    """A part of the pass: keeps what its backward needs, may overwrite what it is given."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, gradient: Tensor) -> Tensor:
        """Fills the gradients of the parameters, returns that of the input."""
        ...


class _Linear:
    def __init__(self, layer: StackedLinear, gradients: _Gradients, *, to_input: bool) -> None:
        self._weight = layer.weight.detach()
        self._weight_gradient = gradients[layer.weight]
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._bias_gradient = None if layer.bias is None else gradients[layer.bias]
        self._to_input = to_input

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        return product(x, self._weight, self._bias)

    def backward(self, gradient: Tensor) -> Tensor:
        product(self._x.transpose(1, 2), gradient, out=self._weight_gradient)
        if self._bias_gradient is not None:
            torch.sum(gradient, 1, keepdim=True, out=self._bias_gradient)
        return product(gradient, self._weight.transpose(1, 2)) if self._to_input else gradient


class _Head:
    def __init__(self, layer: StackedHead, gradients: _Gradients) -> None:
        self._weight, self._bias = layer.weight.detach(), layer.bias.detach()
        self._weight_gradient = gradients[layer.weight]
        self._bias_gradient = gradients[layer.bias]

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        return product(self._weight, x.transpose(1, 2), self._bias).transpose(1, 2)

    def backward(self, gradient: Tensor) -> Tensor:
        outputs_first = gradient.transpose(1, 2).contiguous()
        product(outputs_first, self._x, out=self._weight_gradient)
        torch.sum(outputs_first, 2, keepdim=True, out=self._bias_gradient)
        return product(gradient, self._weight)


class _BatchNorm:
    """With c = x - mean: y = bias + c * weight / deviation."""

    def __init__(
        self, norm: StackedBatchNorm, gradients: _Gradients, sums: Tensor, squares: Tensor
    ) -> None:
        self._weight, self._bias = norm.weight.detach(), norm.bias.detach()
        self._weight_gradient = gradients[norm.weight]
        self._bias_gradient = gradients[norm.bias]
        self._sums, self._squares = sums, squares
        # Calls with a Python number take longer than calls with a tensor of one.
        self._eps = sums.new_tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        # Two plain sums instead of torch.var_mean, which takes twenty times as long over this
        # axis on a CPU. Centred first: mean of squares less square of mean would lose the
        # variance of a column whose mean is large.
        share = 1 / x.shape[1]
        torch.sum(x, 1, keepdim=True, out=self._sums)
        self._centred = x.sub_(self._sums, alpha=share)
        squares = x * x
        torch.sum(squares, 1, keepdim=True, out=self._squares)
        self._inverse = torch.add(self._eps, self._squares, alpha=share).rsqrt_()
        self._scale = self._weight * self._inverse
        # Where the squares were, which is memory that the cache still holds.
        return torch.addcmul(self._bias, self._centred, self._scale, out=squares)

    def backward(self, gradient: Tensor) -> Tensor:
        torch.sum(gradient, 1, keepdim=True, out=self._bias_gradient)
        weighted = gradient * self._centred
        torch.sum(weighted, 1, keepdim=True, out=self._weight_gradient)
        slope = self._weight_gradient.mul_(self._inverse) * self._inverse
        # What the input moves through the mean and through the variance.
        indirect = torch.addcmul(self._bias_gradient, self._centred, slope, out=weighted)
        return gradient.sub_(indirect, alpha=1 / gradient.shape[1]).mul_(self._scale)


class _ReLU:
    def forward(self, x: Tensor) -> Tensor:
        self._y = x.relu_()
        return x

    def backward(self, gradient: Tensor) -> Tensor:
        # Dropout has set some of y to 0 since; what it dropped has no gradient here either.
        out: Tensor = _aten.threshold_backward.grad_input(
            gradient, self._y, 0, grad_input=gradient
        )
        return out


class _Smooth:
    """An activation whose backward reads its input."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._function, self._backward = function, backward

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        return self._function(x)

    def backward(self, gradient: Tensor) -> Tensor:
        return self._backward(gradient, self._x)


class _Dropout:
    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.mask)

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient.mul_(self.mask)


_ACTIVATIONS: dict[str, Callable[[], _Layer]] = {
    "relu": _ReLU,
    "gelu": lambda: _Smooth(functional.gelu, _aten.gelu_backward),
    "silu": lambda: _Smooth(functional.silu, _aten.silu_backward),
}


class _Statistics:
    """Running statistics of all batch norms, moved together.

    Attributes:
        batch: For each norm, where it leaves the sum of a batch and the sum of its squared
            deviations, [R, 1, width] each.
    """

    def __init__(self, norms: Sequence[StackedBatchNorm]) -> None:
        buffers = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        running, views = _flat(buffers)
        for norm, mean, var in zip(norms, views, views[len(norms) :], strict=False):
            norm.running_mean, norm.running_var = mean, var
        batch, views = _flat(buffers)
        self.batch = list(zip(views, views[len(norms) :], strict=False))
        # Means in the first half, variances in the second.
        self._running, self._batch = running.view(2, -1), batch.view(2, -1)
        self._momentum = StackedBatchNorm.momentum
        self._kept = running.new_tensor(1 - self._momentum)
        self._shares: dict[int, Tensor] = {}

    def move(self, rows: int) -> None:
        """Takes a batch of so many rows into the running means and unbiased variances."""
        if rows not in self._shares:
            shares = [[self._momentum / rows], [self._momentum / (rows - 1)]]
            self._shares[rows] = self._running.new_tensor(shares)
        self._running.mul_(self._kept).addcmul_(self._batch, self._shares[rows])


class Adam(torch.optim.Optimizer):
    """Adam, or AdamW, on one flat parameter.

    `update` is the step of `torch.optim.Adam(fused=True)` without the hooks, the groups and the
    bookkeeping on the way to it, which take three times as long as a small network's update.

    Attributes:
        moments: Running means of the gradients and of their squares.
        steps: Updates so far.
        rate: Learning rate.
    """

    def __init__(self, config: OptimizerConfig, backprop: Backprop | Recorded) -> None:
        super().__init__([backprop.parameters], {"lr": config.lr})
        self.moments = [torch.zeros_like(backprop.parameters) for _ in range(2)]
        self.steps = torch.zeros((), device=backprop.parameters.device)
        # On a GPU a number of Python's would be a constant of the recorded step.
        on_gpu = backprop.parameters.is_cuda
        self.rate: float | Tensor = self.steps.new_tensor(config.lr) if on_gpu else config.lr
        first, second = self.moments
        self._update = partial(
            torch._fused_adamw_ if config.name == "adamw" else torch._fused_adam_,
            [backprop.parameters],
            [backprop.gradients],
            [first],
            [second],
            [],
            [self.steps],
            beta1=0.9,
            beta2=0.999,
            weight_decay=config.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by torch's constructor; its own imports its compiler: a second and 85 MB."""
        self.param_groups.append({**self.defaults, **param_group})

    def set_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next updates."""
        self.param_groups[0]["lr"] = learning_rate
        if isinstance(self.rate, Tensor):
            self.rate.fill_(learning_rate)
        else:
            self.rate = learning_rate

    def update(self) -> None:
        """Moves the parameters by one step along the gradients."""
        self.steps.add_(1)
        self._update(lr=self.rate)


def _flat_parameters(network: Network) -> tuple[Tensor, Tensor, _Gradients]:
    """All parameters and all gradients, flat, and each parameter's own gradient.

    The network's parameters become views of the flat ones.
    """
    own = list(network.parameters())
    parameters, views = _flat(own)
    for parameter, view in zip(own, views, strict=True):
        parameter.data = view
    gradients, views = _zeros(own)
    return parameters, gradients, dict(zip(own, views, strict=True))


def _flat(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One buffer that holds copies of all, and the view of it that each is."""
    flat, views = _zeros(tensors)
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor.detach())
    return flat, views


def _zeros(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One buffer of zeros, and views of it of the shapes of all.

    The views are aligned as tensors of their own are: a matmul's last bits depend on it.
    """
    sizes = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    flat = tensors[0].new_zeros(sum(sizes))
    parts = zip(torch.split(flat, sizes), tensors, strict=True)
    return flat, [part[: tensor.numel()].view(tensor.shape) for part, tensor in parts]
