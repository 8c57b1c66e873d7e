"""What both sides share: networks and batches as arrays, and how they travel. NumPy only.

Quantities are given in natgrad's order of parameters: layer after layer, the kernel (K, M) row by
row, then the bias (M,). The kernel of a convolution is (height, width, channels in, channels out),
so K counts its patches in the order height, width, channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ACTIVATIONS = ("relu", "tanh")
"""Those that every side has."""


@dataclass(frozen=True)
class Layer:
    """A layer u = scale * h W + b, or the same as a convolution.

    Attributes:
      kernel: W, shape (K, M), or (height, width, channels in, channels out).
      bias: b, shape (M,), or None.
      scale: a constant in front of the inputs.
      strides: of a convolution, one a dimension.
      pads: zeros before and after each dimension of a convolution.
    """

    kernel: Array
    bias: Array | None
    scale: float
    strides: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()

    @property
    def is_convolution(self) -> bool:
        """Whether its inputs are images, channels last."""
        return self.kernel.ndim > 2

    @property
    def fan_in(self) -> int:
        """K: weights a unit."""
        return self.kernel.size // self.num_units

    @property
    def num_units(self) -> int:
        """M."""
        return int(self.kernel.shape[-1])

    @property
    def num_params(self) -> int:
        """Weights and biases."""
        return int(self.kernel.size) + (self.num_units if self.bias is not None else 0)


@dataclass(frozen=True)
class Problem:
    """A network, a batch and the settings of a step, the same on both sides.

    Attributes:
      layers: in forward order; the activation stands between them.
      activation: one of ACTIVATIONS.
      pooling: what leads from convolutions to dense layers: "flatten", "average", or "none".
      loss: "cross-entropy" or "mse": means over samples of it, and of half the squared error.
      x: inputs (N, ...), images with channels last.
      y: targets (N, C): one-hot for the cross-entropy.
      drawn: targets (N, C) drawn from the network itself: those of a Monte-Carlo Fisher.
      damping: rho, added to the Fisher in the 1/N convention.
    """

    layers: tuple[Layer, ...]
    activation: str
    pooling: str
    loss: str
    x: Array
    y: Array
    drawn: Array
    damping: float

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.x)

    @property
    def num_outputs(self) -> int:
        """C."""
        return int(self.y.shape[1])


def save(path: Path, problem: Problem) -> None:
    """Writes a problem as one .npz file."""
    arrays = {"x": problem.x, "y": problem.y, "drawn": problem.drawn}
    layers = []
    for index, layer in enumerate(problem.layers):
        arrays[f"kernel{index}"] = layer.kernel
        if layer.bias is not None:
            arrays[f"bias{index}"] = layer.bias
        layers.append({"scale": layer.scale, "strides": layer.strides, "pads": layer.pads})
    facts = {
        "layers": layers,
        "activation": problem.activation,
        "pooling": problem.pooling,
        "loss": problem.loss,
        "damping": problem.damping,
    }
    np.savez(path, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Problem:
    """Reads what ``save`` wrote."""
    with np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
    facts = json.loads(str(found["facts"]))
    layers = tuple(
        Layer(
            found[f"kernel{index}"],
            found.get(f"bias{index}"),
            fact["scale"],
            tuple(fact["strides"]),
            tuple((low, high) for low, high in fact["pads"]),
        )
        for index, fact in enumerate(facts["layers"])
    )
    return Problem(
        layers,
        facts["activation"],
        facts["pooling"],
        facts["loss"],
        found["x"],
        found["y"],
        found["drawn"],
        facts["damping"],
    )


def ravel(layers: Sequence[Mapping[str, Array]]) -> Array:
    """Kernels and biases of all layers as one vector (P,)."""
    parts = [
        np.asarray(layer[name]).reshape(-1)
        for layer in layers
        for name in ("kernel", "bias")
        if name in layer
    ]
    return np.concatenate(parts)


def relative_difference(found: Array, wanted: Array) -> float:
    """|found - wanted| over |wanted|, Frobenius norms in float64.

    Raises:
      ValueError: shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"the peer gives {found.shape}, natgrad {wanted.shape}")
    rest = found.astype(np.float64) - wanted
    return float(np.linalg.norm(rest) / np.linalg.norm(wanted.astype(np.float64)))
