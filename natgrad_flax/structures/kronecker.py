"""Kronecker factors from rows: A = a^T a / R for R rows, and systems with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.layer_signals import LayerSignals
from natgrad_flax.linalg import add_diagonal, inverse_psd, solve_psd, symmetric_product
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.signals import DenseSignals
from natgrad_flax.structures.base import Space
from natgrad_flax.structures.least_squares import normal_solve

Rows = DenseSignals | SharedSignals
"""Signals of an affine layer, which has Kronecker factors."""


def kronecker_words(layer: LayerSignals, sharing: Sharing) -> str:
    """What becomes of the Fisher block of a layer, in words."""
    if isinstance(layer, ExplicitSignals):
        return "exact block a unit"
    return f"Kronecker, {sharing}" if isinstance(layer, SharedSignals) else "Kronecker"


def factor_rows(layer: Rows, sharing: Sharing) -> tuple[Array, Array]:
    """Rows of A and B for each group, (G, R, fan_in) and (G, R', M/G)."""
    if isinstance(layer, SharedSignals):
        return layer.rows(sharing)
    return layer.augmented_inputs()[None], layer.flat_derivatives()[None]


def num_positions(layer: Rows, sharing: Sharing) -> int:
    """How many rows of A a sample has in each group: T for "expand" of shared weights, else 1."""
    if isinstance(layer, SharedSignals) and sharing == "expand":
        return layer.num_positions
    return 1


def factor_means(layer: Rows, sharing: Sharing) -> tuple[Array, Array]:
    """A = sum a^T a / (N T) and B = sum D^T D / N for each group; means over samples."""
    left, right = factor_rows(layer, sharing)
    n = layer.num_samples
    over = float(n * num_positions(layer, sharing))
    return _products(left) / over, _products(right) / float(n)


def _products(rows: Array) -> Array:
    return jnp.stack([symmetric_product(group.T) for group in rows])


def in_parameters(space: Space, rows: int, params: int) -> bool:
    """Whether a factor is inverted as (params, params) and not as (rows, rows)."""
    return params < rows if space == "auto" else space == "parameter"


def factor_of(rows: Array, over: float) -> Array:
    """rows^T rows / over, shape (P, P), for rows (R, P)."""
    return symmetric_product(rows.T) / over


def solve_factor(
    rows: Array, over: float, rho: Array | float, target: Array, *, shifted: bool, space: Space
) -> Array:
    """(rows^T rows / over + rho)^{-1} target.

    Args:
      rows: shape (R, P).
      over: divisor of the factor.
      rho: damping.
      target: shape (P, k).
      shifted: rho is not the number 0; at 0 this is the pseudo-inverse.
      space: where the system is solved.
    """
    if not shifted:
        return normal_solve(rows, over * target)
    if in_parameters(space, *rows.shape):
        return solve_psd(add_diagonal(factor_of(rows, over), rho), target, shifted=True)
    gram = add_diagonal(symmetric_product(rows), over * rho)
    solution = solve_psd(gram, rows @ target, shifted=True)
    return (target - rows.T @ solution) / rho


def solve_kronecker(
    left: Array,
    right: Array,
    overs: tuple[float, float],
    rhos: tuple[Array | float, Array | float],
    target: Array,
    *,
    shifted: bool,
    space: Space,
) -> Array:
    """(A + rho_A)^{-1} G (B + rho_B)^{-1} for each of g groups.

    Args:
      left: rows of A, shape (g, R, K).
      right: rows of B, shape (g, R', M).
      overs: divisors of A and B.
      rhos: dampings of A and B.
      target: G, shape (g, K, M).
      shifted: as in ``solve_factor``.
      space: as in ``solve_factor``.
    """

    def group(parts: tuple[Array, Array, Array]) -> Array:
        a, b, matrix = parts
        half = solve_factor(a, overs[0], rhos[0], matrix, shifted=shifted, space=space)
        return solve_factor(b, overs[1], rhos[1], half.T, shifted=shifted, space=space).T

    return over_groups(group, (left, right, target))


def grouped(matrix: Array, groups: int) -> Array:
    """(K, g m) with units in groups as (g, K, m)."""
    return jnp.moveaxis(matrix.reshape(matrix.shape[0], groups, -1), 1, 0)


def ungrouped(matrices: Array) -> Array:
    """The inverse of ``grouped``."""
    g, k, m = matrices.shape
    return jnp.moveaxis(matrices, 0, 1).reshape(k, g * m)


def inverse_groups(factors: Array, rho: Array | float, *, shifted: bool) -> Array:
    """(A + rho)^{-1} for each of g groups, shape (g, K, K); the pseudo-inverse at the number 0."""

    def group(factor: Array) -> Array:
        return inverse_psd(add_diagonal(factor, rho), shifted=shifted)

    return over_groups(group, factors)


def over_groups(function: Callable[[Any], Any], parts: Any) -> Any:
    """A function of every group, one after the other; without a loop where there is but one."""
    if len(jax.tree.leaves(parts)[0]) == 1:
        first = function(jax.tree.map(lambda leaf: leaf[0], parts))
        return jax.tree.map(lambda leaf: leaf[None], first)
    return jax.lax.map(function, parts)
