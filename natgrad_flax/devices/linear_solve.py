"""Solves of symmetric positive definite systems whose rows lie on different devices.

To be called inside ``jax.shard_map``: device p of k holds rows p m to (p + 1) m of an n x n matrix
(m = n / k) and the same rows of the right-hand side, and gets those of the solution. No device
ever holds the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import linalg as lax_linalg

_MAX_GROUPS = 16  # each is unrolled, so they bound the size of the program
_MIN_ROWS = 32  # of a group on one device


class Solution(NamedTuple):
    """What a distributed solve found; all but ``value`` are the same on every device.

    Attributes:
      value: this device's rows of the solution.
      converged: whether it is one: the matrix was positive definite, the tolerance was reached.
      iterations: of conjugate gradients, 0 for a factorisation.
      residual: |A v - b| / |b|, taken anew at the end; 0 for a factorisation.
    """

    value: Array
    converged: Array
    iterations: Array
    residual: Array


def cholesky_solve(rows: Array, rhs: Array, axis: str, *, shifted: bool) -> Solution:
    """One system by a blocked Cholesky factorisation.

    The unknowns are renumbered so that each of q groups of them has n / (k q) on every device,
    which costs no communication and keeps all devices busy to the end. Groups are finished from
    left to right. For each, the devices gather its rows of the factor, n^2 / 2 numbers in all;
    every device factorises the square of the group on the diagonal by itself, and solves for its
    own rows below. So a device does 1 / k of the n^3 / 3 operations, and 2 / q + k / q^2 of that
    more; q is 16 where a device has 512 rows or more.

    Args:
      rows: (m, n), this device's rows of the matrix.
      rhs: (m,), this device's part of the right-hand side.
      axis: the mesh axis over which rows are sharded.
      shifted: a damping has been added to the diagonal; then any factorisation that exists counts
        as converged, and otherwise only one whose pivots are well above rounding.
    """
    k, me = lax.axis_size(axis), lax.axis_index(axis)
    m = rows.shape[0]
    count = max(1, min(_MAX_GROUPS, m // _MIN_ROWS))
    height = -(-m // count)
    width = k * height
    lower = _renumber(rows, me, k, count, height)
    padded = jnp.pad(rhs, (0, count * height - m)).reshape(count, height)
    target = lax.all_gather(padded, axis, axis=1).reshape(count, 1, width)
    floor = 0.0 if shifted else max(k * m * _eps(rows), _eps(rows) ** 0.75)

    half = jnp.zeros((1, 0), rows.dtype)
    corners, definite = [], jnp.array(True)
    for group in range(count):
        done, here = slice(0, group * width), slice(group * width, (group + 1) * width)
        left = lax.all_gather(lower[group, :, done], axis, tiled=True)
        panel = lower[group:, :, here] - lower[group:, :, done] @ left.T
        square = lax.all_gather(panel[0], axis, tiled=True)
        corner = lax_linalg.cholesky(square, symmetrize_input=False)
        definite &= jnp.all(jnp.diagonal(corner) ** 2 > floor * jnp.diagonal(square))
        below = _right_solve(corner, panel[1:].reshape(-1, width), transpose=True)
        lower = lower.at[group + 1 :, :, here].set(below.reshape(-1, height, width))
        following = _right_solve(corner, target[group] - half @ left.T, transpose=True)
        half = jnp.concatenate([half, following], axis=1)
        corners.append(corner)

    def back(sums: Array, group: tuple[Array, ...]) -> tuple[Array, Array]:
        index, corner, goal, mine = group
        known = lax.psum(lax.dynamic_slice_in_dim(sums, index * width, width, 1), axis)
        value = _right_solve(corner, goal[None] - known, transpose=False)
        own = lax.dynamic_slice_in_dim(value, me * height, height, 1)
        # what it adds to groups that are finished is never read
        return sums + own @ mine, own[0]

    groups = (jnp.arange(count), jnp.stack(corners), half.reshape(count, width), lower)
    _, found = lax.scan(back, jnp.zeros_like(half), groups, reverse=True)
    value = found.reshape(-1)[:m]
    definite &= lax.pmin(jnp.all(jnp.isfinite(value)).astype(jnp.int32), axis) > 0
    return Solution(value, definite, jnp.zeros((), jnp.int32), jnp.zeros((), rows.dtype))


def _renumber(rows: Array, me: Array, k: int, count: int, height: int) -> Array:
    """Rows (m, k m) as (groups, height, all unknowns group by group), padded by an identity."""
    m, padded = rows.shape[0], count * height
    cells = jnp.pad(rows.reshape(m, k, m), ((0, padded - m), (0, 0), (0, padded - m)))
    new = jnp.arange(m, padded)
    cells = cells.at[new, me, new].set(1)
    columns = cells.reshape(padded, k, count, height).swapaxes(1, 2)
    return columns.reshape(count, height, k * padded)


def _right_solve(factor: Array, value: Array, *, transpose: bool) -> Array:
    """value factor^{-1}, or value factor^{-T}."""
    return lax_linalg.triangular_solve(
        factor, value, left_side=False, lower=True, transpose_a=transpose
    )


def _eps(array: Array) -> float:
    return float(jnp.finfo(array.dtype).eps)


def conjugate_gradients(
    times: Callable[[Array], Array],
    blocks: list[Array],
    rhs: Array,
    axis: str,
    *,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """L coupled systems of n unknowns by preconditioned conjugate gradients.

    The preconditioner is the part of the matrix that couples the unknowns of one layer on one
    device (block Jacobi): each device factorises its own blocks, and nothing is sent.

    Args:
      times: the matrix times (L, m) vectors, this device's parts of them.
      blocks: L arrays (m, m), the diagonal blocks of the matrix on this device.
      rhs: (L, m).
      axis: the mesh axis over which unknowns are sharded.
      tolerance: the solution counts as converged at |A v - b| <= tolerance |b|.
      max_iterations: it stops there, too, unconverged.
    """
    factors = [lax_linalg.cholesky(block, symmetrize_input=False) for block in blocks]

    def precondition(vector: Array) -> Array:
        return jnp.stack(
            [
                jax.scipy.linalg.cho_solve((factor, True), part)
                for factor, part in zip(factors, vector, strict=True)
            ]
        )

    def dot(left: Array, right: Array) -> Array:
        return lax.psum(jnp.sum(left * right), axis)

    Carry = tuple[Array, Array, Array, Array, Array, Array]
    # half of it is left to the drift of the running residual, which ends the loop
    target = (tolerance / 2) ** 2 * dot(rhs, rhs)

    def unfinished(carry: Carry) -> Array:
        _, _, _, _, square, count = carry
        return (square > target) & (count < max_iterations)

    def step(carry: Carry) -> Carry:
        value, left, direction, product, _, count = carry
        moved = times(direction)
        rate = product / dot(direction, moved)
        value, left = value + rate * direction, left - rate * moved
        scaled = precondition(left)
        following = dot(left, scaled)
        direction = scaled + following / product * direction
        return value, left, direction, following, dot(left, left), count + 1

    start = precondition(rhs)
    square = dot(rhs, rhs)
    carry = (jnp.zeros_like(rhs), rhs, start, dot(rhs, start), square, jnp.zeros((), jnp.int32))
    value, _, _, _, _, count = lax.while_loop(unfinished, step, carry)
    left = times(value) - rhs
    reached = jnp.sqrt(dot(left, left) / jnp.where(square > 0, square, 1))
    return Solution(value, reached <= tolerance, count, reached)
