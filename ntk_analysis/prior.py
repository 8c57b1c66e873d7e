"""Networks before training: drawn outputs, and their variance at infinite width."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import MLP, ConvNet
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import Matrix
from ntk_analysis.infinite_width import require_limit

_ROWS = 2000
"""Inputs at a time."""


def initial_outputs(model: nnx.Module, x: ArrayLike, seeds: range) -> Matrix:
    """f_0(x) of freshly drawn networks of the model's architecture, shape (S, N, C).

    Args:
      model: an ``ng.MLP`` or an ``ng.ConvNet``.
      x: shape (N, ...).
      seeds: one a network.

    Raises:
      TypeError: the model is neither.
    """
    architecture = require_limit(model)
    inputs = np.asarray(x, np.float32)
    forward = nnx.jit(lambda network, batch: network(batch))
    results = []
    for seed in seeds:
        network = _fresh(architecture, seed)
        rows = [forward(network, inputs[i : i + _ROWS]) for i in range(0, len(inputs), _ROWS)]
        results.append(np.concatenate([np.asarray(row, np.float64) for row in rows]))
    return np.stack(results)


def _fresh(architecture: MLP | ConvNet, seed: int) -> MLP | ConvNet:
    """A network of the same architecture with parameters of its own."""
    drawn: dict[str, Any] = {
        "weight_variance": architecture.weight_variance,
        "bias_variance": architecture.bias_variance,
        "parametrization": architecture.parametrization,
    }
    if isinstance(architecture, MLP):
        return MLP(
            architecture.widths,
            activation=architecture.activation,
            **drawn,
            rngs=nnx.Rngs(seed),
        )
    return ConvNet(
        architecture.input_shape,
        architecture.channels,
        architecture.outputs,
        kernel_size=architecture.kernel_size,
        strides=architecture.strides,
        padding=architecture.padding,
        pooling=architecture.pooling,
        activation=architecture.activation,
        **drawn,
        rngs=nnx.Rngs(seed),
    )


def prior_variances(model: nnx.Module, x: Matrix) -> Matrix:
    """The variance of f_0 at each input, the diagonal of the NNGP kernel, shape (N,)."""
    rows = range(0, len(x), _ROWS)
    parts = [analytic_kernels(model, x[i : i + _ROWS], parts=("nngp",)).nngp for i in rows]
    return np.concatenate([np.diagonal(part) for part in parts])
