"""Fisher blocks of single units, from Jacobians: small systems, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, of_block
from natgrad_flax.linalg.dense import add_diagonal, inverse_psd, psd_eigenvalues, solve_psd
from natgrad_flax.linalg.execution import by_columns, cubic
from natgrad_flax.operators.base import OfLayer, Space, add, noise
from natgrad_flax.operators.least_squares import least_squares, normal_solve
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.gradient import Gradient


class ExactDiagonal(OfLayer):
    """An operator with the diagonal of the Fisher itself."""

    layer: LayerSignals

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        n = self.layer.num_samples
        return (jax.tree.map(lambda entry: entry / n, self.layer.squares()),)

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(self.layer.gram_norms()) / self.layer.num_samples


@dataclass(frozen=True)
class WholeUnits(ExactDiagonal):
    """J_i^T J_i / N of every unit i of a layer, from its per-sample Jacobians.

    Attributes:
      layer: signals of any kind.
      space: "sample" for (N S, N S) systems, "parameter", "auto" for the smaller.
    """

    layer: LayerSignals
    space: Space = "auto"

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``; of a pair of dampings the first counts."""
        (g,) = gradient.vector((self.layer,))
        solved = by_columns(
            partial(solve_units, rho=of_block(damping), space=self.space),
            (self.layer.jacobian(), matrix_of(g)),
            (gradient.coefficients,),
        )
        return (self.layer.update(solved),)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        jacobian = self.layer.jacobian()
        images = jnp.einsum("nskm,km->nsm", jacobian, matrix_of(vector[0]))
        moved = jnp.einsum("nskm,nsm->km", jacobian, images) / self.layer.num_samples
        return (self.layer.update(moved),)

    def eigenvalues(self) -> Array:
        """Of all units, one after the other."""
        return jax.lax.map(psd_eigenvalues, unit_blocks(self.layer)).reshape(-1)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """J_i^T z_i / N^(1/2) of every unit, and noise of variance rho, with z standard normal."""
        keys, jacobian = jax.random.split(key), self.layer.jacobian()
        n, s, _, m = jacobian.shape
        draw = jax.random.normal(keys[0], (n, s, m), jacobian.dtype) / float(n) ** 0.5
        seen = (self.layer.update(jnp.einsum("nskm,nsm->km", jacobian, draw)),)
        return add(seen, noise(keys[1], (self.layer,), of_block(damping)))

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """J^T J / N between parameters of one unit, plus rho I."""
        jacobian, m = self.layer.to_dense(), self.layer.num_units
        unit = np.arange(self.layer.num_params) % m
        block = jacobian.T @ jacobian / self.layer.num_samples
        return add_diagonal((unit[:, None] == unit) * block, of_block(damping))


def solve_units(
    jacobian: Array,
    gradient: Array,
    coefficients: Array | None = None,
    *,
    rho: Array | float,
    space: Space = "auto",
) -> Array:
    """(J_i^T J_i / N + rho)^{-1} g_i for every unit i.

    Args:
      jacobian: J, shape (N, S, fan_in, M).
      gradient: g, shape (fan_in, M).
      coefficients: w with g = J^T w / N, shape (N, S), where there are such; they save the
        rounding of a small damping in sample space.
      rho: damping; the number 0 means the pseudo-inverse.
      space: "sample" (N S x N S systems), "parameter", or "auto" for the smaller.

    Returns:
      Shape (fan_in, M).
    """
    n, s, fan_in, m = jacobian.shape
    small = fan_in <= n * s if space == "auto" else space == "parameter"
    if fan_in == 1 and small:
        block = jnp.sum(jacobian**2, axis=(0, 1)) / n + rho
        return jnp.where(block != 0, gradient / jnp.where(block != 0, block, 1), 0)
    rows = jnp.moveaxis(jacobian, 3, 0).reshape(m, n * s, fan_in)
    if is_zero(rho):
        if coefficients is not None:
            w = coefficients.reshape(-1)
            return jax.lax.map(lambda matrix: least_squares(matrix, w), rows).T
        return jax.lax.map(lambda unit: normal_solve(unit[0], n * unit[1]), (rows, gradient.T)).T
    if small:
        return jax.lax.map(
            lambda unit: solve_block(unit[0] / float(n) ** 0.5, unit[1], rho), (rows, gradient.T)
        ).T

    def in_samples(unit: tuple[Array, Array]) -> Array:
        matrix, g = unit
        gram = matrix @ matrix.T
        shifted = add_diagonal(gram, n * rho)
        if coefficients is not None:
            return matrix.T @ solve_psd(shifted, coefficients.reshape(-1), shifted=True)
        return (g - matrix.T @ solve_psd(shifted, matrix @ g, shifted=True)) / rho

    return jax.lax.map(in_samples, (rows, gradient.T)).T


def solve_block(rows: Array, gradient: Array, rho: Array | float) -> Array:
    """(rows^T rows + rho)^{-1} g for one unit; the pseudo-inverse at the number 0."""
    if is_zero(rho):
        return normal_solve(rows, gradient)
    return solve_psd(add_diagonal(rows.T @ rows, rho), gradient, shifted=True)


def unit_blocks(layer: LayerSignals) -> Array:
    """The Fisher block of every unit, J_i^T J_i / N, shape (M, fan_in, fan_in)."""
    jacobian = layer.jacobian()
    return jnp.einsum("nskm,nsjm->mkj", jacobian, jacobian) / layer.num_samples


def invert_blocks(blocks: Array, rho: Array | float) -> Array:
    """(block + rho)^{-1} for blocks (M, Q, Q); the pseudo-inverse at the number 0."""
    if blocks.shape[-1] == 1:
        shifted = blocks + rho
        return jnp.where(shifted != 0, 1 / jnp.where(shifted != 0, shifted, 1), 0)

    def invert(blocks: Array, rho: Array | float) -> Array:
        return jax.lax.map(
            lambda block: inverse_psd(add_diagonal(block, rho), shifted=not is_zero(rho)), blocks
        )

    return cubic(invert, blocks, rho)


def multiply_blocks(blocks: Array, gradient: Array) -> Array:
    """Blocks (M, Q, Q) times the columns of g (Q, M), unit by unit."""
    return jnp.einsum("mqp,pm->qm", blocks, gradient)
