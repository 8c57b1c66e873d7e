"""Signals of an infinitely wide network: kernels that answer as the signals of a layer do.

A structure reaches signals only through Gram matrices when it builds a coefficient matrix, so the
same formulas give its finite-width and its infinite-width kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax import MLP, ConvNet, Signals, Structure
from natgrad_flax.damping import is_zero
from natgrad_flax.models.layers import Conv, Dense
from natgrad_flax.signals.dense import DenseSignals
from ntk_analysis.analytic import AnalyticKernels
from ntk_analysis.empirical import Matrix
from ntk_analysis.infinite_width import num_outputs


@dataclass(frozen=True, eq=False)
class LimitLayer:
    """A layer of an infinitely wide network on training or on test inputs, for one output.

    It answers what is asked of a ``DenseSignals`` in sample space: Gram matrices, and sizes, of
    which some are infinite.

    Attributes:
      index: of the layer, from 0.
      train: kernels between training inputs.
      cross: kernels between test and training inputs; None for the training layer itself.
      raw_inputs: x times the scale of the weights, (N, M_0); None behind the first layer, and in
        a convolutional network.
      bias_scale: sigma_b of the layer, None without biases.
      outputs: C, of which one stands for all.
    """

    index: int
    train: AnalyticKernels
    cross: AnalyticKernels | None
    raw_inputs: Matrix | None
    bias_scale: float | None
    outputs: int

    @property
    def num_samples(self) -> int:
        """N, or N' on test inputs."""
        kernels = self.cross if self.cross is not None else self.train
        return len(next(iter(kernels.arrays.values())))

    @property
    def row_weights(self) -> None:
        """None: all samples count the same."""
        return None

    @property
    def num_directions(self) -> int:
        """1: outputs are independent at infinite width."""
        return 1

    @property
    def fan_in(self) -> float:
        """That of the first layer; infinite behind it."""
        if self.raw_inputs is None:
            return math.inf
        return self.raw_inputs.shape[1] + (self.bias_scale is not None)

    @property
    def num_units(self) -> float:
        """1 in the last layer; infinite before it."""
        return 1 if self.index == self.train.limit.depth - 1 else math.inf

    @property
    def num_params(self) -> float:
        """Infinite."""
        return math.inf

    def augmented_inputs(self) -> Array:
        """Scaled inputs of the first layer with the column of the bias, (N, fan_in)."""
        assert self.raw_inputs is not None
        inputs = jnp.asarray(self.raw_inputs)
        if self.bias_scale is None:
            return inputs
        return jnp.pad(inputs, ((0, 0), (0, 1)), constant_values=self.bias_scale)

    def flat_derivatives(self) -> Array:
        """D of the last layer, which is 1 for every sample, shape (N, 1)."""
        assert self.num_units == 1
        return jnp.ones((self.num_samples, 1))

    def input_norms(self) -> Array:
        """The diagonal of Q_l, shape (N,)."""
        return self._diagonal("inputs")

    def derivative_norms(self) -> Array:
        """The diagonal of B_l, shape (N, 1)."""
        return self._diagonal("derivatives")[:, None]

    def derivative_sums(self) -> Array:
        """C times the diagonal of B_l, shape (N,)."""
        return self.outputs * self._diagonal("derivatives")

    def gram_norms(self) -> Array:
        """The diagonal of Theta_l, shape (N, 1)."""
        return self._diagonal("tangent")[:, None]

    def input_gram(self, other: LimitLayer | None = None) -> Array:
        """Q_l between two sets of inputs."""
        return self._between(other, "inputs")

    def derivative_gram(self, other: LimitLayer | None = None) -> Array:
        """B_l between two sets of inputs."""
        return self._between(other, "derivatives")

    def gram(self, other: LimitLayer | None = None) -> Array:
        """Theta_l between two sets of inputs, without 1/N."""
        return self._between(other, "tangent")

    def _diagonal(self, part: str) -> Array:
        return jnp.asarray(np.diagonal(getattr(self.train, part)[self.index]))

    def _between(self, other: LimitLayer | None, part: str) -> Array:
        def kernel(kernels: AnalyticKernels) -> Array:
            return jnp.asarray(getattr(kernels, part)[self.index])

        if other is None or (self.cross is None and other.cross is None):
            assert self.cross is None
            return kernel(self.train)
        if self.cross is not None and other.cross is None:
            return kernel(self.cross)
        assert other.cross is not None
        return kernel(other.cross).T


def limit_signals(
    model: MLP | ConvNet,
    train: AnalyticKernels,
    cross: AnalyticKernels | None,
    x_train: Matrix,
    x_test: Matrix | None,
) -> tuple[Signals, Signals | None]:
    """Signals on training and on test inputs, for ``Structure.coefficient``.

    Args:
      model: what the kernels are the limit of.
      train: kernels between training inputs.
      cross: kernels between test and training inputs, or None.
      x_train: (N, ...).
      x_test: (N', ...), or None.
    """
    dense, outputs = isinstance(model, MLP), num_outputs(model)
    modules: list[Dense | Conv] = (
        list(model.layers) if isinstance(model, MLP) else [*model.convolutions, model.readout]
    )

    def signals(kernels: AnalyticKernels | None, x: Matrix) -> Signals:
        layers = []
        for index, layer in enumerate(modules):
            raw = x * layer.weight_scale if dense and index == 0 else None
            layers.append(LimitLayer(index, train, kernels, raw, layer.bias_scale, outputs))
        start = jnp.zeros((len(x), 1), jnp.float64)
        return Signals(cast("tuple[DenseSignals, ...]", tuple(layers)), start)

    with jax.enable_x64(True):
        inside = signals(None, x_train)
        return inside, None if cross is None or x_test is None else signals(cross, x_test)


def check_limit(structure: Structure, has_test: bool, damping: object) -> None:
    """Raises ValueError where a structure has no infinite-width coefficient matrix.

    Args:
      structure: the Fisher approximation.
      has_test: whether it is asked for at test inputs.
      damping: rho.
    """
    where = structure.infinite_width
    if where == "none":
        raise ValueError(
            f"{structure.name} has no infinite-width kernel: {structure.why_no_limit}; "
            'use kernels="empirical"'
        )
    if where == "train" and (has_test or not is_zero(damping)):
        raise ValueError(
            f"{structure.name} has an infinite-width kernel only between training inputs at zero "
            f'damping, alpha I; elsewhere {structure.why_no_limit}; use kernels="empirical"'
        )
    if reason := structure.no_limit(shared=False):
        raise ValueError(reason)


def check_shared_weights(structure: Structure, model: nnx.Module) -> None:
    """Raises ValueError where weights that positions share leave a structure without a formula.

    Args:
      structure: the Fisher approximation.
      model: the network.
    """
    if reason := structure.no_limit(shared=isinstance(model, ConvNet)):
        raise ValueError(reason)
