"""Small networks on random inputs, a step of theirs, and the coefficient matrix of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax import MLP, ConvNet, MeanSquaredError, Structure, natural_gradient
from natgrad_flax.structures.base import dense_layer
from ntk_analysis.coefficient import Damping
from ntk_analysis.empirical import Matrix, initial_signals
from ntk_analysis.reproduce.karakida_osawa.figure3 import gaussian_inputs


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
        alone = [replace(signals, layers=(layer,)) for layer in signals.layers]
        return [np.asarray(structure.coefficient(part, part, 0.0)) for part in alone]


def deviation(matrix: Matrix, alpha: float) -> float:
    """Spectral norm of Theta-bar / alpha - I."""
    return float(np.linalg.norm(matrix / alpha - np.eye(len(matrix)), 2))


def off_diagonal(matrix: Matrix) -> float:
    """The largest entry beside the diagonal, over the largest on it."""
    diagonal = np.diag(matrix)
    return float(np.max(np.abs(matrix - np.diag(diagonal))) / np.max(np.abs(diagonal)))


def dense_net(
    widths: Sequence[int], activation: str, seed: int = 0, param_dtype: Any = jnp.float32
) -> MLP:
    """A network without biases whose derivatives neither grow nor shrink with the depth for ReLU.

    Args:
      widths: M_0, ..., M_L.
      activation: "relu", with sigma_w^2 = 2, or another, with sigma_w^2 = 1.
      seed: of the parameters.
      param_dtype: their precision.
    """
    variance = 2.0 if activation == "relu" else 1.0
    return MLP(
        widths,
        activation=activation,
        weight_variance=variance,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(seed),
    )


def sphere(count: int, features: int, seed: int = 0) -> Matrix:
    """Gaussian directions of norm sqrt(M_0): pre-activations have the variance sigma_w^2."""
    return np.sqrt(features) * gaussian_inputs(count, features, seed)


def digits_pair(count: int) -> tuple[Matrix, Matrix]:
    """Digits 0 and 7 of norm sqrt(M_0) and targets +-0.5, both float64: (N, 64) and (N, 1)."""
    problem = natgrad_datasets.load(
        "digits", classes=(0, 7), num_train=count, num_test=1, dtype="float64"
    )
    return np.sqrt(problem.input_dim) * problem.x_train, np.asarray(problem.y_train)


class Layer(NamedTuple):
    """Arrays of one dense layer at N samples and one output.

    Attributes:
      inputs: a, shape (N, K).
      derivatives: D, shape (N, M).
    """

    inputs: Matrix
    derivatives: Matrix

    @property
    def grams(self) -> tuple[Matrix, Matrix]:
        """a a^T and D D^T, both (N, N)."""
        return self.inputs @ self.inputs.T, self.derivatives @ self.derivatives.T


def dense_layers(model: MLP, x: Matrix) -> list[Layer]:
    """Inputs and derivatives of every layer, float64."""
    with jax.enable_x64(True):
        return [
            Layer(np.asarray(layer.augmented_inputs()), np.asarray(layer.flat_derivatives()))
            for layer in map(dense_layer, initial_signals(model, x).train.layers)
        ]


def condition_number(matrix: Matrix) -> float:
    """Largest over smallest eigenvalue of a symmetric positive matrix."""
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    return float(values[-1] / values[0])


@partial(jax.jit, static_argnames=("graphdef", "structure", "damping"))
def natural_step(
    graphdef: Any,
    state: nnx.State,
    x: Array,
    y: Array,
    rate: float,
    structure: Structure,
    damping: Damping = 0.0,
) -> nnx.State:
    """The state after one step of natural gradient for the mean squared error."""
    model = nnx.merge(graphdef, state)
    update = natural_gradient(
        model, x, y, structure=structure, loss=MeanSquaredError(), damping=damping
    )
    return jax.tree.map(lambda p, u: p - rate * u, state, update)


@partial(jax.jit, static_argnames=("graphdef",))
def mean_loss(graphdef: Any, state: nnx.State, x: Array, y: Array) -> Array:
    """Half the mean squared distance of the outputs from y."""
    return jnp.mean(jnp.sum((nnx.merge(graphdef, state)(x) - y) ** 2, axis=1)) / 2
