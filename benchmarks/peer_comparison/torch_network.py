"""A problem in PyTorch: the network, its batch, and natgrad's order of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peer_comparison.exchange import Array, Layer, Problem, ravel

if TYPE_CHECKING:
    import torch


class Batch:
    """Network, batch and loss of a problem, on the CPU.

    Attributes:
      network: with a ``torch.nn.Linear`` or ``Conv2d`` for each layer, and no other parameters.
      x: inputs, images with channels first.
      y: targets: classes for the cross-entropy, which is what PyTorch takes.
      drawn: the same of the drawn targets.
      loss: PyTorch's own, a mean.
    """

    def __init__(self, problem: Problem) -> None:
        import torch

        x = torch.tensor(problem.x)
        # nngeometry makes identity matrices and epsilons of the default type
        torch.set_default_dtype(x.dtype)
        self._layers = problem.layers
        self.network = make_network(problem)
        self.x = x.movedim(-1, 1).contiguous() if x.ndim > 2 else x
        entropy = problem.loss == "cross-entropy"
        self.y, self.drawn = (
            torch.tensor(targets).argmax(dim=1) if entropy else torch.tensor(targets)
            for targets in (problem.y, problem.drawn)
        )
        self.loss = torch.nn.CrossEntropyLoss() if entropy else torch.nn.MSELoss()

    def parameters(self) -> list[torch.Tensor]:
        """Weights and biases, layer after layer."""
        return list(self.network.parameters())

    def gradient(self) -> Sequence[torch.Tensor]:
        """Of the loss, one tensor a parameter."""
        import torch

        value = self.loss(self.network(self.x), self.y)
        slopes: Sequence[torch.Tensor] = torch.autograd.grad(value, self.parameters())
        return slopes

    def vector(self, tensors: Sequence[torch.Tensor]) -> Array:
        """Tensors shaped as the parameters in natgrad's order, (P,)."""
        found = iter(tensors)
        parts = []
        for layer in self._layers:
            part = {"kernel": to_kernel(next(found).detach().numpy())}
            if layer.bias is not None:
                part["bias"] = next(found).detach().numpy()
            parts.append(part)
        return ravel(parts)

    def order(self) -> Array:
        """Where PyTorch keeps each parameter of natgrad's order, (P,)."""
        parts, start = [], 0
        for layer in self._layers:
            size = int(layer.kernel.size)
            shape = to_weight(layer.kernel).shape
            part = {"kernel": to_kernel(np.arange(start, start + size).reshape(shape))}
            if layer.bias is not None:
                part["bias"] = np.arange(start + size, start + layer.num_params)
            start += layer.num_params
            parts.append(part)
        return ravel(parts)

    def descend(self, directions: Sequence[torch.Tensor], rate: float) -> None:
        """Moves the parameters."""
        import torch

        with torch.no_grad():
            for weight, direction in zip(self.parameters(), directions, strict=True):
                weight -= rate * direction


def to_weight(kernel: Array) -> Array:
    """A kernel as PyTorch has it: units first, then channels, then height and width."""
    return np.ascontiguousarray(np.moveaxis(kernel, (-1, -2), (0, 1)))


def to_kernel(weight: Array) -> Array:
    """The inverse of ``to_weight``."""
    return np.ascontiguousarray(np.moveaxis(weight, (0, 1), (-1, -2)))


def make_network(problem: Problem) -> torch.nn.Sequential:
    """A PyTorch network with the parameters and outputs of a problem."""
    import torch

    function = {"relu": torch.relu, "tanh": torch.tanh}[problem.activation]

    class Inputs(torch.nn.Module):
        """What makes the inputs of a layer from the outputs of the one before."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.layer, self.first = problem.layers[index], index == 0
            self.pools = index > 0 and (
                problem.layers[index - 1].is_convolution and not self.layer.is_convolution
            )

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            h = u if self.first else function(u)
            if self.pools:
                # natgrad flattens with channels last
                images = h.movedim(1, -1)
                flat = problem.pooling == "flatten"
                h = images.flatten(1) if flat else images.mean(dim=(1, 2))
            h = self.layer.scale * h
            if any(map(any, self.layer.pads)):
                # the last dimension comes first
                ends = [end for pair in reversed(self.layer.pads) for end in pair]
                h = torch.nn.functional.pad(h, ends)
            return h

    modules: list[torch.nn.Module] = []
    for index, layer in enumerate(problem.layers):
        modules += [Inputs(index), _parametrised(layer)]
    return torch.nn.Sequential(*modules)


def _parametrised(layer: Layer) -> torch.nn.Module:
    import torch

    weight = to_weight(layer.kernel)
    biased = layer.bias is not None
    made: torch.nn.Module
    if layer.is_convolution:
        made = torch.nn.Conv2d(
            weight.shape[1], weight.shape[0], weight.shape[2:], layer.strides, bias=biased
        )
    else:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=biased)
    made.weight = torch.nn.Parameter(torch.tensor(weight))
    if biased:
        made.bias = torch.nn.Parameter(torch.tensor(layer.bias))
    return made
