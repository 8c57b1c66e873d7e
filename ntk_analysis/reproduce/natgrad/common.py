"""Small ConvNets on random images, and the coefficient matrix of one layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from natgrad_flax import ConvNet, Signals, Structure
from ntk_analysis.empirical import Matrix, initial_signals


def conv_net(
    shape: Sequence[int],
    channels: Sequence[int],
    outputs: int = 1,
    *,
    seed: int = 0,
    **options: Any,
) -> ConvNet:
    """A network with 3 x 3 kernels and, where nothing else is said, stride 1 and no biases."""
    options = {"strides": 1} | options
    return ConvNet(shape, channels, outputs, **options, rngs=nnx.Rngs(seed))


def images(count: int, shape: Sequence[int], seed: int = 0) -> Matrix:
    """Independent Gaussian pixels, shape (N, H, W, C)."""
    return np.random.default_rng(seed).normal(size=(count, *shape))


def layer_coefficients(structure: Structure, model: nnx.Module, x: Matrix) -> list[Matrix]:
    """Theta-bar_l(x, x) of every layer, as if the others were held; zero damping.

    Their sum is Theta-bar(x, x) of a structure whose blocks do not reach across layers.

    Args:
      structure: one that treats no layer otherwise for being the first or the last.
      model: the network, L layers.
      x: inputs, shape (N, ...).

    Returns:
      L arrays (N C, N C).
    """
    signals = initial_signals(model, x).train
    with jax.enable_x64(True):
        alone = [Signals((layer,), signals.outputs) for layer in signals.layers]
        return [np.asarray(structure.coefficient(part, part, 0.0)) for part in alone]


def deviation(matrix: Matrix, alpha: float) -> float:
    """Spectral norm of Theta-bar / alpha - I."""
    return float(np.linalg.norm(matrix / alpha - np.eye(len(matrix)), 2))


def off_diagonal(matrix: Matrix) -> float:
    """The largest entry beside the diagonal, over the largest on it."""
    diagonal = np.diag(matrix)
    return float(np.max(np.abs(matrix - np.diag(diagonal))) / np.max(np.abs(diagonal)))
