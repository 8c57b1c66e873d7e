"""Batched solves of many small SPD systems that share one Gram matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

_LANES = 64  # units on the minor axis: enough for XLA CPU to vectorise, not to unroll
_MAX_BLOCKS = 8  # column blocks per matrix: bounds the size of the compiled program
_MIN_BLOCK = 10  # smallest worthwhile column block
_MAX_TERMS = 32  # products per fused kernel: LLVM gives up vectorising beyond about 45


@partial(jax.jit, static_argnames="chunk_size")
def solve_scaled_gram(
    gram: Array, scale: Array, shift: Array, rhs: Array, *, chunk_size: int | None = None
) -> Array:
    """Solve ``(diag(d_i) A diag(d_i) + diag(e_i)) v_i = b_i`` for every unit ``i``.

    On CPU this is an own blocked Cholesky with the units on the minor axis, made of elementwise
    operations only. Batched LAPACK calls run serially there (about 7 GFLOP/s) and, in JAX >= 0.10,
    block on XLA's intra-op pool, so that two independent ones can deadlock. Elsewhere it is a
    vmapped Cholesky factorisation.

    Cost: about ``M N^3 / 3`` flops plus ``O(M N^2 K)`` for column blocks of K ~ max(10, N / 8);
    memory ``chunk_size N^2`` numbers plus copies of the inputs. On CPU the program is unrolled:
    compile time grows with N (meant for N <= 200). Under ``vmap`` it runs one by one; derivatives
    solve with the same matrices.

    Args:
        gram: Symmetric positive semi-definite matrix A, (N, N).
        scale: d, broadcastable to (N, M); zeros allowed (then ``v = b / e`` in that row).
        shift: e >= 0, broadcastable to (N, M).
        rhs: b, (N, M).
        chunk_size: Units solved at once (default 64 on CPU, where a chunk should stay in the
            cache, and 1024 elsewhere).

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
    shape: tuple[int, ...]
    if jax.default_backend() != "cpu":
        size = min(chunk_size or 1024, m)
        shape, size_n, solve = (size,), n, _solve_chunk_lapack
    else:
        lanes = min(_LANES, m, chunk_size or m)
        groups = max(1, min(chunk_size or 64, m) // lanes)
        size, shape, solve = groups * lanes, (groups, lanes), _solve_chunk_cpu
        blocks = min(_MAX_BLOCKS, -(-n // _MIN_BLOCK))
        size_n = -(-n // blocks) * blocks
    pad = ((0, size_n - n), (0, -m % size))
    gram = jnp.pad(gram, (pad[0], pad[0]))

    def split(x: Array, fill: float) -> Array:  # (N, M) -> (chunks, *shape[:-1], N, shape[-1])
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(size_n, -1, *shape), 0, -2)

    out = lax.map(lambda x: solve(gram, *x), (split(scale, 0), split(shift, 1), split(rhs, 0)))
    return jnp.moveaxis(out, -2, 0).reshape(size_n, -1)[:n, :m]


def _solve_chunk_lapack(gram: Array, scale: Array, shift: Array, rhs: Array) -> Array:
    """Solve one chunk (N, B) by vmapped Cholesky factorisations."""

    def solve(d: Array, e: Array, b: Array) -> Array:
        factor = jnp.linalg.cholesky(d[:, None] * gram * d + jnp.diag(e))
        return jax.scipy.linalg.cho_solve((factor, True), b)

    return jax.vmap(solve, in_axes=1, out_axes=1)(scale, shift, rhs)


def _solve_chunk_cpu(gram: Array, scale: Array, shift: Array, rhs: Array) -> Array:
    """Solve one chunk (C, N, W) by left-looking blocked Cholesky, units on axes 0 and -1."""
    (c, n, w), dtype = rhs.shape, rhs.dtype
    k = n // min(_MAX_BLOCKS, -(-n // _MIN_BLOCK))
    # known at run time only, even if gram is a constant, so that XLA keeps the branches
    go = jnp.isfinite(lax.optimization_barrier(gram[0, 0]))

    def kernel(fun: Callable[..., Array], *args: Any) -> Array:  # XLA fuses nothing across a cond
        out = jax.eval_shape(fun, *args)
        return lax.cond(go, fun, lambda *_: jnp.full(out.shape, jnp.nan, out.dtype), *args)

    def add_products(acc: Array, sign: int, count: int, factors: Callable, *args: Any) -> Array:
        """Return acc + sign * (sum over t < count of the product of factors(t, *args))."""

        def part(lo: int, acc: Array, *args: Any) -> Array:
            for t in range(lo, min(count, lo + _MAX_TERMS)):
                x, y = factors(t, *args)
                acc = acc + x * y if sign > 0 else acc - x * y
            return acc

        for lo in range(0, count, _MAX_TERMS):
            acc = kernel(partial(part, lo), acc, *args)
        return acc

    def cut(x: Array, axis: int, lo: int, size: int = 1) -> Array:
        return lax.slice_in_dim(x, lo, lo + size, axis=axis)

    # Column blocks of the factor of [[K, b], [b^T, .]]: its last row is the forward solution.
    scale1 = jnp.pad(scale, ((0, 0), (0, 1), (0, 0)))
    gram1 = jnp.pad(gram, ((0, 1), (0, 0)))
    lower, inv = list[Array](), list[Array]()
    for p in range(0, n, k):
        rows = n + 1 - p
        d, e, b = (cut(x, 1, p, k)[:, None] for x in (scale, shift, rhs))
        eye = jnp.eye(rows, k, dtype=dtype)[None, :, :, None]
        last = jnp.eye(rows, 1, 1 - rows, dtype)[None, :, :, None]
        panel = gram1[None, p:, p : p + k, None] * scale1[:, p:, None] * d + eye * e + last * b

        def update(t: int, done: list[Array], p: int = p, rows: int = rows) -> tuple:
            x = cut(cut(done[t // k], 1, p - t // k * k, rows), 2, t % k)
            return x, cut(x, 1, 0, k).reshape(c, 1, k, w)

        solve = lambda t, x, y: (cut(x, 2, t), cut(y, 2, t).reshape(c, 1, k, w))  # noqa: E731
        panel = add_products(panel, -1, p, update, lower) if p else kernel(lambda x: x, panel)
        inv.append(_inverse_cholesky(cut(panel, 1, 0, k)))
        lower.append(add_products(jnp.zeros_like(panel), 1, k, solve, panel, inv[-1]))

    out: list[Array] = []  # back substitution, L^T v = y
    for p in range(n - k, -1, -k):
        low, y = lower[p // k], lower[p // k][:, n - p]
        if out:
            inner = lambda t, low, v: (cut(low, 1, (t + 1) * k, k), v[t][:, :, None])  # noqa: E731
            zero = jnp.zeros((c, k, k, w), dtype)
            sums = add_products(zero, 1, len(out), inner, low, out)
            y = kernel(lambda y, s: y - sum(s[:, j] for j in range(k)), y, sums)
        outer = lambda t, y, inverse: (cut(y, 1, t), inverse[:, t])  # noqa: E731
        out.insert(0, add_products(jnp.zeros_like(y), 1, k, outer, y, inv[p // k]))
    return jnp.concatenate(out, 1)


def _inverse_cholesky(block: Array) -> Array:
    """Inverse of the Cholesky factor of (C, K, K, W) blocks, by K elimination steps.

    Each step eliminates with row and column 0 and rolls both axes by one (static slices only), so
    that after K steps row r of the result is back in place; ``active`` marks unfinished rows.
    """
    k, dtype = block.shape[1], block.dtype

    def append(x: Array, value: float, axis: int) -> Array:
        return lax.pad(x, jnp.array(value, dtype), [(0, int(i == axis), 0) for i in range(x.ndim)])

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        z, active = state
        s = lax.rsqrt(z[:, :1, :1])
        row = append(z[:, :1, 1:], 1, 2)
        factor = z[:, 1:, :1] * (s * s) * active[None, 1:, None, None]
        low = append(z[:, 1:, 1:], 0, 2) - factor * row
        return jnp.concatenate([low, row * s], 1), append(active[1:], 0, 0)

    z, _ = lax.fori_loop(0, k, step, (block, jnp.ones((k,), dtype)))
    return jnp.where(jnp.tril(jnp.ones((k, k), bool))[None, :, :, None], z, 0)
