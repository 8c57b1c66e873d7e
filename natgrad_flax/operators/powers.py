"""Kronecker products of matrices that are given, and of powers of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import above_rounding, eigh, reciprocal
from natgrad_flax.operators.base import extreme_eigenvalues, log_determinant
from natgrad_flax.operators.kronecker import Kronecker
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import DenseSignals, expand_samples
from natgrad_flax.signals.gradient import Gradient, ParameterGradient


@partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["power"])
@dataclass(frozen=True)
class PoweredFactor:
    """A^p of a positive semi-definite A, (A + rho)^p damped; it answers as ``Factor`` does.

    Attributes:
      matrix: A, shape (P, P).
      power: p, positive.
    """

    matrix: Array
    power: float

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """(A + rho)^p, shape (P, P)."""
        return self._powered(damping, self.power)

    def solve(self, target: Array, damping: Array | float) -> Array:
        """(A + rho)^-p G for G of shape (P, k)."""
        return self.inverse(damping) @ target

    def inverse(self, damping: Array | float) -> Array:
        """(A + rho)^-p; the pseudo-inverse at the number 0."""
        return self._powered(damping, -self.power)

    def matvec(self, matrix: Array) -> Array:
        """A^p G."""
        return self.to_dense() @ matrix

    def diagonal(self) -> Array:
        """Of A^p, shape (P,)."""
        return jnp.diagonal(self.to_dense())

    def root_times(self, matrix: Array, damping: Array | float) -> Array:
        """(A + rho)^(p/2) Z for Z of shape (P, k)."""
        return self._powered(damping, self.power / 2) @ matrix

    def eigenvalues(self) -> Array:
        """Of A^p."""
        return self._values(eigh(self.matrix)[0], 0.0) ** self.power

    def logdet(self, damping: Array | float) -> Array:
        """p log det(A + rho), shape ()."""
        values = self._values(eigh(self.matrix)[0], damping)
        return self.power * log_determinant(values, len(values), 0.0)

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """The smallest and the largest eigenvalue of (A + rho)^p."""
        values = self._values(eigh(self.matrix)[0], damping)
        return extreme_eigenvalues(values**self.power, len(values), 0.0)

    def _powered(self, damping: Array | float, power: float) -> Array:
        values, vectors = eigh(self.matrix)
        scaled = self._values(values, damping) ** abs(power)
        return vectors * (scaled if power > 0 else reciprocal(scaled)) @ vectors.T

    @staticmethod
    def _values(values: Array, damping: Array | float) -> Array:
        """Eigenvalues of A + rho; a root would make much of what of a singular A is rounding."""
        values = jnp.maximum(above_rounding(values), 0)
        return values if is_zero(damping) else values + damping


@dataclass(frozen=True)
class MatrixKronecker(Kronecker):
    """``Kronecker`` of factors that are matrices and not rows."""

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """A^{-1} G B^{-1}."""
        return super().solve(ParameterGradient(gradient.vector((self.layer,))), damping)

    def cross(self, test: DenseSignals, damping: Array | float) -> Array:
        """See ``Kronecker.cross``."""
        own, (by_a, by_b) = cast(DenseSignals, self.layer), self.split(damping)
        inputs = test.augmented_inputs() @ self.left.solve(own.augmented_inputs().T, by_a)
        units = test.flat_derivatives() @ self.right.solve(own.flat_derivatives().T, by_b)
        return units * expand_samples(inputs, test.num_directions, own.num_directions)


def powered(layer: LayerSignals, matrices: Array, power: float) -> PoweredFactor:
    """The powers of the matrices of all groups (G, P, P), of a dense layer of the only one."""
    return PoweredFactor(matrices[0] if isinstance(layer, DenseSignals) else matrices, power)


def input_moments(layer: LayerSignals, units: Array | None = None) -> Array:
    """sum_n sum_s J_ns B J_ns^T / N for each group of units, shape (G, fan_in, fan_in).

    Args:
      layer: signals of an affine layer; J_ns is the Jacobian (fan_in, M/G) of a direction.
      units: B, shape (G, M/G, M/G); the identity unless given.
    """
    n = layer.num_samples
    if isinstance(layer, DenseSignals):
        d, a = layer.derivatives, layer.augmented_inputs()
        weights = jnp.sum(d * (d if units is None else d @ units[0]), axis=(1, 2))
        return ((a * weights[:, None]).T @ a / n)[None]
    jacobian = _by_groups(layer)
    seen = jacobian if units is None else jnp.einsum("nskgm,gmi->nskgi", jacobian, units)
    return jnp.einsum("nskgm,nsjgm->gkj", seen, jacobian) / n


def unit_moments(layer: LayerSignals, inputs: Array | None = None) -> Array:
    """sum_n sum_s J_ns^T A J_ns / N for each group of units, shape (G, M/G, M/G).

    Args:
      layer: signals of an affine layer.
      inputs: A, shape (G, fan_in, fan_in); the identity unless given.
    """
    n = layer.num_samples
    if isinstance(layer, DenseSignals):
        d, a = layer.derivatives, layer.augmented_inputs()
        weights = jnp.sum(a * (a if inputs is None else a @ inputs[0]), axis=1)
        return jnp.einsum("nsm,nsi->mi", d * weights[:, None, None], d)[None] / n
    jacobian = _by_groups(layer)
    seen = jacobian if inputs is None else jnp.einsum("nskgm,gkj->nsjgm", jacobian, inputs)
    return jnp.einsum("nskgm,nskgi->gmi", seen, jacobian) / n


def mean_diagonals(matrices: Array) -> Array:
    """Of each of (G, P, P), shape (G,)."""
    return jnp.einsum("gpp->g", matrices) / matrices.shape[1]


def _by_groups(layer: LayerSignals) -> Array:
    """The Jacobian as (N, S, fan_in, G, M/G)."""
    jacobian = layer.jacobian()
    groups = getattr(layer, "num_groups", 1)
    return jacobian.reshape(*jacobian.shape[:3], groups, -1)
