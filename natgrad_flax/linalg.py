"""Small dense solves with a rank decision.

All of these are unbatched on purpose. From JAX 0.10 on, LAPACK calls with a batch dimension wait
for XLA's CPU thread pool from inside that pool, and two independent ones can block each other for
ever on a machine with two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import linalg as lax_linalg

# called outside of any program, a cond would be compiled anew each time; inside one it is inlined
_compiled_once = partial(jax.jit, static_argnames="shifted", inline=True)


@contextmanager
def full_products() -> Iterator[None]:
    """What is traced within it multiplies float32 in all of its bits; also a decorator.

    By default GPUs since Ampere multiply float32 in TF32 and TPUs in bfloat16. That suits the
    passes through a model, whose precision stays the user's; a Gram matrix, an inverse or a
    difference that is divided by a small damping would lose all digits by it. On a CPU it changes
    nothing.
    """
    with jax.default_matmul_precision("highest"):
        yield


def _cholesky_solve(factor: Array, rhs: Array) -> Array:
    columns = rhs[:, None] if rhs.ndim == 1 else rhs
    half = lax_linalg.triangular_solve(factor, columns, left_side=True, lower=True)
    full = lax_linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)
    return full.reshape(rhs.shape)


def pinv_solve(matrix: Array, rhs: Array) -> Array:
    """The pseudo-inverse of a symmetric matrix (n, n) times rhs (n,) or (n, k).

    Eigenvalues below max(n, 32) eps |lambda|_max count as zero: the rounding of the matrix itself
    is several eps, however small n is.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    size = jnp.abs(values)
    cutoff = max(matrix.shape[0], 32) * jnp.finfo(matrix.dtype).eps * jnp.max(size)
    inverse = jnp.where(size > cutoff, 1 / jnp.where(size > cutoff, values, 1), 0)
    return vectors @ (inverse.reshape((-1,) + (1,) * (rhs.ndim - 1)) * (vectors.T @ rhs))


@_compiled_once
def solve_psd(matrix: Array, rhs: Array, *, shifted: bool) -> Array:
    """Solves a positive semi-definite system, by Cholesky where it is definite in this precision.

    Args:
      matrix: (n, n), symmetric; only the lower triangle is read by the Cholesky factorisation.
      rhs: (n,) or (n, k).
      shifted: a damping has been added to the diagonal. Then any factorisation that exists is
        used; without one, a pivot below max(n eps, eps^(3/4)) times its diagonal entry leaves the
        decision to the eigenvalues.

    Returns:
      matrix^{-1} rhs, or matrix^+ rhs (n^3 x 10 flops more) where it has no full rank.
    """
    factor = lax_linalg.cholesky(matrix, symmetrize_input=False)
    return jax.lax.cond(
        is_full_rank(matrix, factor, shifted),
        lambda: _cholesky_solve(factor, rhs),
        lambda: pinv_solve(matrix, rhs),
    )


def is_full_rank(matrix: Array, factor: Array, shifted: bool) -> Array:
    """Whether a Cholesky factor is that of a regular matrix, as ``solve_psd`` decides it."""
    # elimination magnifies the rounding of a zero pivot by the condition of those before it, so
    # the limit is generous: eigenvalues decide what it refuses, at a price in time alone
    eps = float(jnp.finfo(matrix.dtype).eps)
    threshold = 0.0 if shifted else max(matrix.shape[0] * eps, eps**0.75)
    return jnp.all(jnp.diagonal(factor) ** 2 > threshold * jnp.diagonal(matrix))


@_compiled_once
def inverse_psd(matrix: Array, *, shifted: bool) -> Array:
    """The inverse, or pseudo-inverse, of an (n, n) matrix; the arguments are ``solve_psd``'s."""
    factor = lax_linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)

    return jax.lax.cond(
        is_full_rank(matrix, factor, shifted),
        lambda: _inverse_from_factor(factor),
        lambda: pinv_solve(matrix, eye),
    )


def _inverse_from_factor(factor: Array) -> Array:
    """(L L^T)^{-1} = X^T X with X = L^{-1} = [[A, 0], [C, B]], without the products with zeros.

    Nearly all of it is matrix products, which use every core; triangular solves with many
    right-hand sides do not.
    """
    n = factor.shape[0]
    if n < 512:
        inverse = _inverse_lower(factor)
        return inverse.T @ inverse
    a, c, b = _inverse_blocks(factor)
    corner = b.T @ c
    top = jnp.concatenate([symmetric_product(a.T) + symmetric_product(c.T), corner.T], axis=1)
    return jnp.concatenate([top, jnp.concatenate([corner, symmetric_product(b.T)], axis=1)])


def _inverse_lower(factor: Array) -> Array:
    """The inverse of a lower triangular matrix, by halves."""
    n = factor.shape[0]
    if n <= 160:
        eye = jnp.eye(n, dtype=factor.dtype)
        return lax_linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    a, c, b = _inverse_blocks(factor)
    top = jnp.pad(a, ((0, 0), (0, b.shape[1])))
    return jnp.concatenate([top, jnp.concatenate([c, b], axis=1)])


def _inverse_blocks(factor: Array) -> tuple[Array, Array, Array]:
    """A, C, B of the inverse [[A, 0], [C, B]] of a lower triangular matrix."""
    half = factor.shape[0] // 2
    a, b = _inverse_lower(factor[:half, :half]), _inverse_lower(factor[half:, half:])
    return a, -(b @ factor[half:, :half]) @ a, b


def add_diagonal(matrix: Array, value: Array | float) -> Array:
    """matrix + value I, for an (n, n) matrix."""
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return matrix + jnp.asarray(value, matrix.dtype) * eye


def lu_solve(matrix: Array, rhs: Array) -> Array:
    """Solves a general (n, n) system with rhs (n,) or (n, k) by LU with partial pivoting."""
    return jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(matrix), rhs)


def symmetric_product(x: Array, halvings: int = 2) -> Array:
    """x x^T for x (n, m), with the blocks above the diagonal mirrored where n is large.

    XLA has no symmetric rank-k product; two halvings do 5/8 of the full product's work.
    """
    n = x.shape[0]
    if halvings == 0 or n < 512:
        return x @ x.T
    upper, lower = x[: n // 2], x[n // 2 :]
    corner = lower @ upper.T
    top = jnp.concatenate([symmetric_product(upper, halvings - 1), corner.T], axis=1)
    bottom = jnp.concatenate([corner, symmetric_product(lower, halvings - 1)], axis=1)
    return jnp.concatenate([top, bottom])
