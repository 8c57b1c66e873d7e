"""Fisher blocks of single units, from Jacobians: small systems, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.layer_signals import LayerSignals
from natgrad_flax.linalg import add_diagonal, inverse_psd, solve_psd
from natgrad_flax.structures.base import Space
from natgrad_flax.structures.least_squares import least_squares, normal_solve


def solve_units(
    jacobian: Array,
    slope: Array,
    rho: Array | float,
    *,
    coefficients: Array | None = None,
    space: Space = "auto",
) -> Array:
    """(J_i^T J_i / N + rho)^{-1} g_i for every unit i.

    Args:
      jacobian: J, shape (N, S, fan_in, M).
      slope: g, shape (fan_in, M).
      rho: damping; the number 0 means the pseudo-inverse.
      coefficients: w with g = J^T w / N, shape (N, S), where there are such; they save the
        rounding of a small damping in sample space.
      space: "sample" (N S x N S systems), "parameter", or "auto" for the smaller.

    Returns:
      Shape (fan_in, M).
    """
    n, s, fan_in, m = jacobian.shape
    small = fan_in <= n * s if space == "auto" else space == "parameter"
    if fan_in == 1 and small:
        block = jnp.sum(jacobian**2, axis=(0, 1)) / n + rho
        return jnp.where(block != 0, slope / jnp.where(block != 0, block, 1), 0)
    rows = jnp.moveaxis(jacobian, 3, 0).reshape(m, n * s, fan_in)
    if is_zero(rho):
        if coefficients is not None:
            w = coefficients.reshape(-1)
            return jax.lax.map(lambda matrix: least_squares(matrix, w), rows).T
        return jax.lax.map(lambda unit: normal_solve(unit[0], n * unit[1]), (rows, slope.T)).T
    if small:
        return jax.lax.map(
            lambda unit: solve_block(unit[0] / float(n) ** 0.5, unit[1], rho), (rows, slope.T)
        ).T

    def in_samples(unit: tuple[Array, Array]) -> Array:
        matrix, g = unit
        gram = matrix @ matrix.T
        shifted = add_diagonal(gram, n * rho)
        if coefficients is not None:
            return matrix.T @ solve_psd(shifted, coefficients.reshape(-1), shifted=True)
        return (g - matrix.T @ solve_psd(shifted, matrix @ g, shifted=True)) / rho

    return jax.lax.map(in_samples, (rows, slope.T)).T


def solve_block(rows: Array, slope: Array, rho: Array | float) -> Array:
    """(rows^T rows + rho)^{-1} g for one unit; the pseudo-inverse at the number 0."""
    if is_zero(rho):
        return normal_solve(rows, slope)
    return solve_psd(add_diagonal(rows.T @ rows, rho), slope, shifted=True)


def unit_blocks(layer: LayerSignals) -> Array:
    """The Fisher block of every unit, J_i^T J_i / N, shape (M, fan_in, fan_in)."""
    jacobian = layer.jacobian()
    return jnp.einsum("nskm,nsjm->mkj", jacobian, jacobian) / layer.num_samples


def invert_blocks(blocks: Array, rho: Array | float) -> Array:
    """(block + rho)^{-1} for blocks (M, Q, Q); the pseudo-inverse at the number 0."""
    if blocks.shape[-1] == 1:
        shifted = blocks + rho
        return jnp.where(shifted != 0, 1 / jnp.where(shifted != 0, shifted, 1), 0)
    return jax.lax.map(
        lambda block: inverse_psd(add_diagonal(block, rho), shifted=not is_zero(rho)), blocks
    )


def multiply_blocks(blocks: Array, slope: Array) -> Array:
    """Blocks (M, Q, Q) times the columns of g (Q, M), unit by unit."""
    return jnp.einsum("mqp,pm->qm", blocks, slope)
