"""Undamped systems from the rows of J: its normal equations would square the condition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.linalg.dense import lu_solve, pinv_solve, qr
from natgrad_flax.linalg.execution import cubic


def least_squares(rows: Array, target: Array) -> Array:
    """J^+ b for J (R, P) and b (R,) or (R, k), by a QR factorisation of J or of its transpose."""
    return cubic(_least_squares, rows, target)


def normal_solve(rows: Array, target: Array) -> Array:
    """(J^T J)^+ g = J^+ (J^+)^T g for J (R, P) and g (P,) or (P, k)."""

    def solve(rows: Array, target: Array) -> Array:
        return _least_squares(rows, _least_squares(rows.T, target))

    return cubic(solve, rows, target)


def _least_squares(rows: Array, target: Array) -> Array:
    if rows.shape[0] < rows.shape[1]:
        span, triangle = qr(rows.T)
        return span @ _pseudo_inverse_times(triangle.T, target)
    span, triangle = qr(rows)
    return _pseudo_inverse_times(triangle, span.T @ target)


def _pseudo_inverse_times(triangle: Array, target: Array) -> Array:
    """T^+ b for a triangular T (n, n).

    Where T is near to singular its singular values decide, which are the eigenvalues of
    [[0, T], [T^T, 0]] up to their sign.
    """
    eps = float(jnp.finfo(triangle.dtype).eps)
    pivots = jnp.abs(jnp.diagonal(triangle))

    def by_singular_values() -> Array:
        zero = jnp.zeros_like(triangle)
        matrix = jnp.block([[zero, triangle], [triangle.T, zero]])
        both = jnp.concatenate([target, jnp.zeros_like(target)])
        return pinv_solve(matrix, both)[len(triangle) :]

    return jax.lax.cond(
        jnp.all(pivots > eps**0.5 * jnp.max(jnp.abs(triangle))),
        lambda: lu_solve(triangle, target),
        by_singular_values,
    )
