"""Small dense solves with a rank decision.

Under ``vmap`` all of these run one by one. From JAX 0.10 on, LAPACK calls with a batch dimension
wait for XLA's CPU thread pool from inside that pool, and two independent ones can block each other
for ever. So LAPACK stands inside of ``sequential_vmap``, which JAX cannot differentiate backwards,
and the derivatives are rules of products with inverses: any mode, any order, batched or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.lax import linalg as lax_linalg

from natgrad_flax.linalg.execution import cubic, many_devices, product

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

    Eigenvalues below ``rank_cutoff`` times the largest count as zero.
    """
    return cubic(lambda matrix, rhs: _solve(matrix, rhs, None), matrix, rhs)


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
    if many_devices() and rhs.ndim == 2 and 3 * rhs.shape[1] > len(matrix):
        return product(inverse_psd(matrix, shifted=shifted), rhs)
    return cubic(partial(_solved, shifted=shifted), matrix, rhs)


def inverse_psd(matrix: Array, *, shifted: bool) -> Array:
    """The inverse, or pseudo-inverse, of an (n, n) matrix; the arguments are ``solve_psd``'s."""
    return cubic(partial(_inverted, shifted=shifted), matrix)


@_compiled_once
def _solved(matrix: Array, rhs: Array, *, shifted: bool) -> Array:
    return _solve(matrix, rhs, shifted)


@_compiled_once
def _inverted(matrix: Array, *, shifted: bool) -> Array:
    return _inverse(matrix, shifted)


def is_full_rank(matrix: Array, factor: Array, shifted: bool) -> Array:
    """Whether a Cholesky factor is that of a regular matrix, as ``solve_psd`` decides it."""
    if shifted:
        # a factorisation that fails is NaN as a whole, and NaN in a pivot reaches the last one
        return factor[-1, -1] > 0
    pivots, n = jnp.diagonal(factor) ** 2, matrix.shape[0]
    eps = float(jnp.finfo(matrix.dtype).eps)
    threshold = max(n * eps, eps**0.75)
    # elimination magnifies the rounding of a zero pivot by the condition of those before it, but
    # the solution for any vector still tells an eigenvalue near to zero. Both limits are generous:
    # eigenvalues decide what they refuse, at a price in time alone
    probe = jnp.asarray(np.random.default_rng(0).standard_normal(n), matrix.dtype)
    length, most = jnp.linalg.norm(_cholesky_solve(factor, probe)), jnp.linalg.norm(probe)
    near = n**0.5 * rank_cutoff(n, matrix.dtype) * jnp.linalg.norm(matrix) * length > most
    return jnp.all(pivots > threshold * jnp.diagonal(matrix)) & ~near


@partial(jax.jit, inline=True)
def has_full_rank(matrix: Array) -> Array:
    """Whether ``solve_psd`` solves with an undamped (n, n) matrix by its Cholesky factor."""

    def decide(matrix: Array) -> Array:
        factor = lax_linalg.cholesky(matrix, symmetrize_input=False)
        return is_full_rank(matrix, factor, shifted=False)

    return sequential_vmap(decide)(lax.stop_gradient(matrix))


def rank_cutoff(size: int | Array, dtype: jnp.dtype) -> Any:
    """What of the largest eigenvalue, or singular value, counts as zero: max(n^(1/2), 32) eps.

    The rounding of the matrix itself is several eps, however small n is, and grows slower than n:
    3.4 eps were measured for float32 Gram matrices of n = 800.
    """
    eps = float(jnp.finfo(dtype).eps)
    if isinstance(size, Array):
        return jnp.maximum(jnp.sqrt(size.astype(dtype)), 32) * eps
    return max(size**0.5, 32) * eps


def above_rounding(values: Array, largest: Array | None = None) -> Array:
    """Eigenvalues or singular values (n,), with 0 for those that the largest takes as rounding."""
    size = jnp.abs(values)
    largest = jnp.max(size) if largest is None else largest
    return jnp.where(size > rank_cutoff(len(values), values.dtype) * largest, values, 0)


def reciprocal(values: Array) -> Array:
    """1 / values, and 0 where they are 0."""
    return jnp.where(values != 0, 1 / jnp.where(values != 0, values, 1), 0)


def _spectrum(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues of the pseudo-inverse of a symmetric matrix, and its eigenvectors."""
    vectors, values = lax_linalg.eigh(matrix, symmetrize_input=False)
    # in ascending order
    return reciprocal(above_rounding(values, jnp.maximum(-values[0], values[-1]))), vectors


def _solve_by_eigenvalues(matrix: Array, rhs: Array) -> Array:
    inverse, vectors = _spectrum(matrix)
    return vectors @ (inverse.reshape((-1,) + (1,) * (rhs.ndim - 1)) * (vectors.T @ rhs))


# in what follows shifted is that of solve_psd, or None: eigenvalues decide


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _solve(matrix: Array, rhs: Array, shifted: bool | None) -> Array:
    """matrix^{-1} rhs or matrix^+ rhs."""

    def solve(matrix: Array, rhs: Array) -> Array:
        if shifted is None:
            return _solve_by_eigenvalues(matrix, rhs)
        factor = lax_linalg.cholesky(matrix, symmetrize_input=False)
        return lax.cond(
            is_full_rank(matrix, factor, shifted),
            lambda: _cholesky_solve(factor, rhs),
            lambda: _solve_by_eigenvalues(matrix, rhs),
        )

    return sequential_vmap(solve)(matrix, rhs)


@_solve.defjvp
def _solve_jvp(
    shifted: bool | None, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The derivative of A^+ b along matrices of the same rank (Golub & Pereyra 1973, Eq. 4.12)."""
    (matrix, rhs), (d_matrix, d_rhs) = primals, tangents
    found = _solve(matrix, rhs, shifted)
    inverse, null = _inverse_and_null(matrix, shifted)
    change = inverse @ (d_rhs - d_matrix @ found)
    change = change + inverse @ (inverse @ (d_matrix @ (null @ rhs)))
    return found, change + null @ (d_matrix @ (inverse @ found))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse(matrix: Array, shifted: bool) -> Array:
    """matrix^{-1} or matrix^+."""

    def invert(matrix: Array) -> Array:
        factor = lax_linalg.cholesky(matrix, symmetrize_input=False)
        eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
        return lax.cond(
            is_full_rank(matrix, factor, shifted),
            lambda: _inverse_from_factor(factor),
            lambda: _solve_by_eigenvalues(matrix, eye),
        )

    return sequential_vmap(invert)(matrix)


@_inverse.defjvp
def _inverse_jvp(
    shifted: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return jax.jvp(lambda matrix: _inverse_and_null(matrix, shifted)[0], primals, tangents)


@jax.custom_jvp
def inverse_pd(matrix: Array) -> Array:
    """The inverse of a positive definite (n, n) matrix; NaN where it has no Cholesky factor."""

    def invert(matrix: Array) -> Array:
        return _inverse_from_factor(lax_linalg.cholesky(matrix, symmetrize_input=False))

    return cubic(sequential_vmap(invert), matrix)


@inverse_pd.defjvp
def _inverse_pd_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = inverse_pd(*primals)
    return inverse, -inverse @ tangents[0] @ inverse


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse_and_null(matrix: Array, shifted: bool | None) -> tuple[Array, Array]:
    """A^+, and the projection on the null space of A: exactly zero where Cholesky serves."""

    def decompose(matrix: Array) -> tuple[Array, Array]:
        def by_eigenvalues() -> tuple[Array, Array]:
            inverse, vectors = _spectrum(matrix)
            return (vectors * inverse) @ vectors.T, (vectors * (inverse == 0)) @ vectors.T

        if shifted is None:
            return by_eigenvalues()
        factor = lax_linalg.cholesky(matrix, symmetrize_input=False)
        return lax.cond(
            is_full_rank(matrix, factor, shifted),
            lambda: (_inverse_from_factor(factor), jnp.zeros_like(matrix)),
            by_eigenvalues,
        )

    return sequential_vmap(decompose)(matrix)


@_inverse_and_null.defjvp
def _inverse_and_null_jvp(
    shifted: bool | None, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (matrix,), (change,) = primals, tangents
    inverse, null = _inverse_and_null(matrix, shifted)
    across = inverse @ change @ null  # of the two, the one that turns null vectors
    square = inverse @ across
    d_inverse = square + square.T - inverse @ change @ inverse
    return (inverse, null), (d_inverse, -(across + across.T))


def _inverse_from_factor(factor: Array) -> Array:
    """(L L^T)^{-1} = X^T X with X = L^{-1}, without most of the products with zeros.

    Nearly all of it is matrix products, which use every core; triangular solves with many
    right-hand sides do not.
    """
    inverse = _inverse_lower(factor)
    if len(factor) < 640:
        return inverse.T @ inverse
    product = jnp.zeros_like(factor)
    for begin, end in _bounds(len(factor), 4):
        rows = inverse[begin:, begin:end].T @ inverse[begin:, :end]
        product = lax.dynamic_update_slice(product, rows, (begin, 0))
    return jnp.tril(product) + jnp.tril(product, -1).T


def _inverse_lower(factor: Array) -> Array:
    """The inverse of a lower triangular matrix, by blocks of rows."""
    n = len(factor)
    if n <= 400:
        eye = jnp.eye(n, dtype=factor.dtype)
        return lax_linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    inverse = jnp.zeros_like(factor)
    # four have fewer steps; two are fewer kernels, and fewer products with zeros, which count where
    # there is more to do
    for begin, end in _bounds(n, 4 if 640 < n <= 1600 else 2):
        own = _inverse_lower(factor[begin:end, begin:end])
        inverse = lax.dynamic_update_slice(inverse, own, (begin, begin))
        if begin:
            left = -own @ (factor[begin:end, :begin] @ inverse[:begin, :begin])
            inverse = lax.dynamic_update_slice(inverse, left, (begin, 0))
    return inverse


def _bounds(n: int, count: int) -> list[tuple[int, int]]:
    """Where blocks of n rows begin and end."""
    return list(itertools.pairwise(n * i // count for i in range(count + 1)))


def add_diagonal(matrix: Array, value: Array | float) -> Array:
    """matrix + value I, for an (n, n) matrix."""
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return matrix + jnp.asarray(value, matrix.dtype) * eye


def lu_solve(matrix: Array, rhs: Array) -> Array:
    """Solves a general (n, n) system with rhs (n,) or (n, k) by LU with partial pivoting."""
    return cubic(_lu_solve, matrix, rhs)


def _lu_solve(matrix: Array, rhs: Array) -> Array:
    @sequential_vmap
    def solve(matrix: Array, rhs: Array) -> Array:
        return jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(matrix), rhs)

    return lax.custom_linear_solve(
        lambda v: matrix @ v,
        rhs,
        lambda _, b: solve(matrix, b),
        lambda _, b: solve(matrix.T, b),
    )


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a symmetric (n, n) matrix.

    Eigenvectors of equal eigenvalues have no derivative: it is not finite.
    """
    values, vectors = cubic(_eigh, matrix)
    return values, vectors


@jax.custom_jvp
def _eigh(matrix: Array) -> tuple[Array, Array]:
    return sequential_vmap(lambda matrix: tuple(jnp.linalg.eigh(matrix)))(matrix)


@_eigh.defjvp
def _eigh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    values, vectors = _eigh(*primals)
    eye = jnp.eye(len(values), dtype=values.dtype)
    turned = vectors.T @ tangents[0] @ vectors
    between = 1 / (values[None, :] - values[:, None] + eye) - eye
    return (values, vectors), (jnp.diagonal(turned), vectors @ (between * turned))


def eigvalsh(matrix: Array) -> Array:
    """Eigenvalues of a symmetric (n, n) matrix in ascending order; for values, not derivatives."""
    values: Array = sequential_vmap(lambda matrix: jnp.linalg.eigvalsh(matrix))(matrix)
    return values


def psd_eigenvalues(matrix: Array) -> Array:
    """As ``eigvalsh`` of a positive semi-definite matrix: rounding below zero counts as zero."""
    return jnp.maximum(eigvalsh(matrix), 0)


@jax.custom_jvp
def qr(matrix: Array) -> tuple[Array, Array]:
    """Q (n, m) and R (m, m) of a matrix (n, m) with n >= m."""
    return sequential_vmap(lambda matrix: tuple(jnp.linalg.qr(matrix)))(matrix)


@qr.defjvp
def _qr_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    span, triangle = qr(*primals)
    change = lu_solve(triangle.T, tangents[0].T).T
    inner = span.T @ change
    lower = jnp.tril(inner, -1)
    rest = inner - lower + lower.T
    return (span, triangle), (change - span @ rest, rest @ triangle)


def symmetric_product(x: Array, halvings: int = 2) -> Array:
    """x x^T for x (n, m), with the blocks above the diagonal mirrored where n and m are large.

    XLA has no symmetric rank-k product; two halvings do 5/8 of the full product's work. Below m of
    about 256 the copies of blocks cost more than that saves, and so they do where x is a transposed
    array: x^T x is better written out. On a mesh it is a whole product, whose rows XLA shares out.
    """
    n, m = x.shape
    if halvings == 0 or n < 512 or m < 256 or many_devices():
        return x @ x.T
    upper, lower = x[: n // 2], x[n // 2 :]
    corner = lower @ upper.T
    top = jnp.concatenate([symmetric_product(upper, halvings - 1), corner.T], axis=1)
    bottom = jnp.concatenate([corner, symmetric_product(lower, halvings - 1)], axis=1)
    return jnp.concatenate([top, bottom])


def symmetric_blocks(block: Callable[..., Array], count: int, width: int, dtype: Any) -> Array:
    """A symmetric matrix (count width, count width), by 10 of 4 x 4 blocks in one loop.

    Args:
      block: from the first row and column, counted in widths, and the side of a block in
        widths to the entries of the block.
      count: rows, in widths.
      width: rows that stand together.
      dtype: of the entries.
    """
    side = -(-count // 4)
    # the last block begins where it fits, over a part of the one before
    corners = np.minimum(side * np.stack(np.tril_indices(4), axis=1), count - side)

    def mirrored(matrix: Array, corner: Array) -> tuple[Array, None]:
        row, column = corner
        entries = block(row, column, side)
        matrix = lax.dynamic_update_slice(matrix, entries, (width * row, width * column))
        return lax.dynamic_update_slice(matrix, entries.T, (width * column, width * row)), None

    start = jnp.zeros((count * width, count * width), dtype)
    # of numbers without a sign nothing asks whether they count from the end
    return lax.scan(mirrored, start, jnp.asarray(corners, jnp.uint32))[0]
