"""Batched solves of many small SPD systems that share one Gram matrix."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from natgrad_flax.flops import telling_steps

_UNITS = 64  # solved at once on a CPU, always: layers of all widths share their compiled kernels
_BASE = 16  # most rows of a block that is eliminated row by row
_BLOCK = 2 * _BASE  # rows of a block in products, which reach 140 GFLOP/s a core from 32 on
_FEW = 16  # units that are solved one by one on a CPU: no slower, and much less to compile
_MAX_BLOCKS = 8  # block columns per matrix: bounds the size of the compiled program


@partial(jax.jit, static_argnames="chunk_size")
def solve_scaled_gram(
    gram: Array, scale: Array, shift: Array, rhs: Array, *, chunk_size: int | None = None
) -> Array:
    """Solve ``(diag(d_i) A diag(d_i) + diag(e_i)) v_i = b_i`` for every unit ``i``.

    On CPU this is an own blocked Cholesky: batched products of small blocks, and eliminations of
    16 rows at a time. Batched LAPACK calls run serially there (about 7 GFLOP/s) and, in JAX >=
    0.10, block on XLA's intra-op pool, so that two independent ones can deadlock. Elsewhere it is
    a vmapped Cholesky factorisation.

    Cost: about ``M N^3 / 3`` flops plus ``O(M N^2 K)`` for blocks of K = max(32, N / 8); memory
    ``chunk_size N^2`` numbers plus copies of the inputs. On CPU the program grows with N / 16 and
    not with the number of units. Under ``vmap`` it runs one by one; derivatives solve with the
    same matrices.

    Args:
        gram: Symmetric positive semi-definite matrix A, (N, N).
        scale: d, broadcastable to (N, M); zeros allowed (then ``v = b / e`` in that row).
        shift: e >= 0, broadcastable to (N, M).
        rhs: b, (N, M).
        chunk_size: Units solved at once (default 64 on CPU, where a chunk should stay in the
            cache and smaller numbers of units are padded, and at most 1024 elsewhere).

    Returns:
        v, (N, M). NaN for units whose matrix is not numerically positive definite.
    """
    dtype = jnp.result_type(gram, scale, shift, rhs)
    if 0 in rhs.shape:
        return rhs.astype(dtype)
    gram, rhs = gram.astype(dtype), rhs.astype(dtype)
    scale, shift = (jnp.broadcast_to(x, rhs.shape).astype(dtype) for x in (scale, shift))
    solve = sequential_vmap(partial(_solve_in_chunks, chunk_size=chunk_size))
    return lax.custom_linear_solve(
        lambda v: scale * (gram @ (scale * v)) + shift * v,
        rhs,
        lambda _, b: solve(gram, scale, shift, b),
        symmetric=True,
    )


def _solve_in_chunks(
    gram: Array, scale: Array, shift: Array, rhs: Array, *, chunk_size: int | None
) -> Array:
    """The solve itself, of arguments of one dtype and full shape, one chunk after the other."""
    n, m = rhs.shape
    if jax.default_backend() == "cpu":
        size, solve = chunk_size or _UNITS, _solve_blocked
        size_n = n if n <= _BASE else -(-n // 8) * 8  # products of odd sizes are slower
        if m <= _FEW and not chunk_size:
            size, size_n, solve = 1, n, _solve_lapack
    else:
        size, size_n, solve = min(chunk_size or 1024, m), n, _solve_lapack
    pad = ((0, size_n - n), (0, -m % size))
    units = [jnp.pad(x, pad, constant_values=e) for x, e in ((scale, 0), (shift, 1), (rhs, 0))]
    return solve(jnp.pad(gram, (pad[0], pad[0])), units, size)[:n, :m]


def _solve_lapack(gram: Array, units: list[Array], size: int) -> Array:
    """Solve for scale, shift and rhs (N, M) by LAPACK or the like, ``size`` units at once."""

    def solve(unit: list[Array]) -> Array:
        scale, shift, rhs = unit
        matrix = scale[:, None] * gram * scale + shift * jnp.eye(len(rhs), dtype=rhs.dtype)
        factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
        return jax.scipy.linalg.cho_solve((factor, True), rhs)

    return lax.map(solve, [x.T for x in units], batch_size=size if size > 1 else None).T


def _solve_blocked(gram: Array, units: list[Array], size: int) -> Array:
    """Solve for scale, shift and rhs (N, M) block by block, ``size`` units at once."""
    n, m = units[0].shape
    step = _BLOCK
    while step * _MAX_BLOCKS < n:
        step *= 2
    cuts = [slice(p, min(p + step, n)) for p in range(0, n, step)]
    grams = [[gram[rows, columns] for columns in cuts] for rows in cuts]

    def load(index: Array) -> Array:
        at = jnp.minimum(index, m // size - 1) * size
        return jnp.stack([lax.dynamic_slice_in_dim(x, at, size, 1).T for x in units], axis=1)

    def chunk(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index, now, out = telling_steps(state[0], m // size), *state[1:]
        found = _solve_chunk(grams, [now[..., cut] for cut in cuts])
        # a slice that is fused into arithmetic is not vectorised: it comes a chunk ahead instead
        return index + 1, load(index), lax.dynamic_update_index_in_dim(out, found, index - 1, 0)

    # known at run time only, so that XLA does not unroll a single chunk, but compiles for it what
    # other layers have
    none, count = lax.optimization_barrier((jnp.asarray(0), jnp.asarray(m // size)))
    start = (none + 1, load(none), jnp.zeros((m // size, size, n), gram.dtype))
    _, _, out = lax.while_loop(lambda state: state[0] <= count, chunk, start)
    return out.reshape(m, n).T


@jax.jit
def _solve_chunk(grams: list[list[Array]], units: list[Array]) -> Array:
    """Solve one chunk by left-looking blocked Cholesky, (B, N).

    Scale and shift ride along as right-hand sides: products of single rows are slower.

    Args:
        grams: Blocks of A, (K, K).
        units: Scale, shift and rhs in blocks, (B, 3, K).
    """
    blocks = range(len(units))

    def matrix(i: int, j: int) -> Array:
        block = units[i][:, 0, :, None] * grams[i][j] * units[j][:, :1]
        if i > j:
            return block
        return block + units[i][:, 1, :, None] * jnp.eye(block.shape[1], dtype=block.dtype)

    lower: dict[tuple[int, int], Array] = {}
    inverse, half, out = list[Array](), list[Array](), list[Array]()
    for j in blocks:
        pivot, rhs = matrix(j, j), units[j]
        for t in range(j):
            pivot = pivot - _times_transpose(lower[j, t], lower[j, t])
            rhs = rhs - _times_transpose(half[t], lower[j, t])
        inverse.append(_inverse_cholesky(pivot))
        half.append(_times_transpose(rhs, inverse[j]))
        for i in blocks[j + 1 :]:
            block = matrix(i, j)
            for t in range(j):
                block = block - _times_transpose(lower[i, t], lower[j, t])
            lower[i, j] = _times_transpose(block, inverse[j])
    for j in reversed(blocks):
        rhs = half[j]
        for i, found in zip(blocks[j + 1 :], out, strict=True):
            rhs = rhs - found @ lower[i, j]
        out.insert(0, rhs @ inverse[j])
    return jnp.concatenate([rows[:, 2] for rows in out], axis=1)


def _times_transpose(x: Array, y: Array) -> Array:
    """x y^T for stacks of matrices (B, N, K) and (B, M, K)."""
    return jnp.einsum("bnk,bmk->bnm", x, y)


def _inverse_cholesky(block: Array) -> Array:
    """Inverse of the Cholesky factor of (B, K, K) blocks, by halves."""
    k = block.shape[1]
    if k <= _BASE:
        return _inverse_by_rows(block.transpose(1, 2, 0)).transpose(2, 0, 1)
    half = k // 2
    first = _inverse_cholesky(block[:, :half, :half])
    lower = _times_transpose(block[:, half:, :half], first)
    second = _inverse_cholesky(block[:, half:, half:] - _times_transpose(lower, lower))
    corner = -(second @ lower) @ first
    top = jnp.pad(first, ((0, 0), (0, 0), (0, k - half)))
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)


def _inverse_by_rows(block: Array) -> Array:
    """Inverse of the Cholesky factor of (K, K, B) blocks, by K elimination steps in place.

    Units are on the minor axis, which XLA CPU vectorises.
    """
    k = block.shape[0]
    index = jnp.arange(k)

    def step(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, row = state
        here = index == t
        scale = lax.rsqrt(lax.dynamic_slice_in_dim(row, t, 1))
        factors = jnp.where(here[:, None], -scale, 0)
        factors = jnp.where((index > t)[:, None], row * (scale * scale), factors)
        row = jnp.where(here[:, None], 1, row)
        keep = 1 - here.astype(block.dtype)
        rest = rest * (keep[:, None] * keep)[:, :, None] - factors[:, None] * row
        # the next row as part of the state: read from ``rest``, it would cost a copy of all of it
        return rest, lax.dynamic_index_in_dim(rest, jnp.minimum(t + 1, k - 1), keepdims=False)

    done, _ = lax.fori_loop(0, k, step, (block, block[0]))
    return jnp.where(jnp.tril(jnp.ones((k, k), bool))[:, :, None], done, 0)
