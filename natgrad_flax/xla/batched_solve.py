"""Batched solves of many small SPD systems that share a few Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap

_LANES = 32  # units on the minor axis: enough for XLA CPU to vectorise, not to unroll
_MAX_BLOCKS = 8  # column blocks per matrix: bounds the size of the compiled program
_MIN_BLOCK = 10  # smallest worthwhile column block
_MAX_TERMS = 32  # products per fused kernel: LLVM gives up vectorising beyond about 45


class ScaledGram(NamedTuple):
    """M systems ``(diag(d_i) A diag(d_i) + diag(e_i)) v_i = b_i``.

    Attributes:
        gram: Symmetric positive semi-definite matrix A, (N, N).
        scale: d, broadcastable to (N, M); zeros allowed (then ``v = b / e`` in that row).
        shift: e >= 0, broadcastable to (N, M).
        rhs: b, (N, M).
    """

    gram: Array
    scale: Array
    shift: Array
    rhs: Array

    def full(self, dtype: Any) -> ScaledGram:
        """The same of one dtype, with d and e of the shape of b."""
        scale, shift = (jnp.broadcast_to(x, self.rhs.shape) for x in (self.scale, self.shift))
        return ScaledGram(*(x.astype(dtype) for x in (self.gram, scale, shift, self.rhs)))


def solve_scaled_gram(
    gram: Array, scale: Array, shift: Array, rhs: Array, *, chunk_size: int | None = None
) -> Array:
    """The solutions v, (N, M), of one ``ScaledGram``; see ``solve_scaled_grams``."""
    (found,) = solve_scaled_grams([ScaledGram(gram, scale, shift, rhs)], chunk_size=chunk_size)
    return found


@partial(jax.jit, static_argnames="chunk_size")
def solve_scaled_grams(
    systems: Sequence[ScaledGram], *, chunk_size: int | None = None
) -> list[Array]:
    """Solve the systems of several Gram matrices of one size N, unit by unit.

    On CPU this is an own blocked Cholesky with the units on the minor axis, made of elementwise
    operations only. Batched LAPACK calls run serially there (about 7 GFLOP/s) and, in JAX >= 0.10,
    block on XLA's intra-op pool, so that two independent ones can deadlock. Elsewhere it is a
    vmapped Cholesky factorisation.

    Cost: about ``M N^3 / 3`` flops plus ``O(M N^2 K)`` for column blocks of K ~ max(10, N / 8);
    memory ``chunk_size N^2`` numbers plus copies of the inputs. On CPU the program is unrolled:
    compile time grows with N (meant for N <= 200), so all Gram matrices share one. Under ``vmap``
    it runs one by one; derivatives solve with the same matrices.

    Args:
        systems: Gram matrices with M units each; M may differ.
        chunk_size: Units solved at once (default 64 on CPU, where a chunk should stay in the
            cache, and 1024 elsewhere).

    Returns:
        v, (N, M), for each. NaN for units whose matrix is not numerically positive definite.
    """
    dtype = jnp.result_type(*(x for system in systems for x in system))
    kept = [system.full(dtype) for system in systems if 0 not in system.rhs.shape]

    def matvec(v: list[Array]) -> list[Array]:
        return [
            system.scale * (system.gram @ (system.scale * x)) + system.shift * x
            for system, x in zip(kept, v, strict=True)
        ]

    solve = sequential_vmap(partial(_solve_in_chunks, chunk_size=chunk_size))

    def solve_for(_: Any, rhs: list[Array]) -> list[Array]:
        return solve([a._replace(rhs=b) for a, b in zip(kept, rhs, strict=True)])

    rhs = [system.rhs for system in kept]
    found = iter(lax.custom_linear_solve(matvec, rhs, solve_for, symmetric=True) if kept else [])
    return [
        system.rhs.astype(dtype) if 0 in system.rhs.shape else next(found) for system in systems
    ]


def _solve_in_chunks(systems: list[ScaledGram], *, chunk_size: int | None) -> list[Array]:
    """The solves themselves, of one dtype and in full shape, one chunk after the other."""
    if jax.default_backend() != "cpu":
        return [_solve_by_lapack(system, chunk_size or 1024) for system in systems]
    n, most = systems[0].rhs.shape[0], max(system.rhs.shape[1] for system in systems)
    lanes = min(_LANES, most, chunk_size or most)
    blocks = min(_MAX_BLOCKS, -(-n // _MIN_BLOCK))
    size = -(-n // blocks) * blocks
    sizes = [-(-system.rhs.shape[1] // lanes) for system in systems]
    groups = min(max(1, (chunk_size or 64) // lanes), sum(sizes))
    spare = -sum(sizes) % groups

    def split(arrays: Sequence[Array], fill: float) -> Array:
        """(N, M) each -> (chunks, groups, N, lanes) of all."""
        parts = []
        for x, count in zip(arrays, sizes, strict=True):
            x = jnp.pad(x, ((0, size - n), (0, count * lanes - x.shape[1])), constant_values=fill)
            parts.append(jnp.moveaxis(x.reshape(size, count, lanes), 1, 0))
        parts.append(jnp.full((spare, size, lanes), fill, arrays[0].dtype))
        return jnp.concatenate(parts).reshape(-1, groups, size, lanes)

    grams, scales, shifts, rhs = zip(*systems, strict=True)
    gram = jnp.pad(jnp.stack(grams), ((0, 0), (0, size - n), (0, size - n)))
    owner = np.append(np.repeat(np.arange(len(systems)), sizes), np.zeros(spare, int))
    out = lax.map(
        lambda x: _solve_chunk(gram[x[0]], *x[1:]),
        (owner.reshape(-1, groups), split(scales, 0), split(shifts, 1), split(rhs, 0)),
    ).reshape(-1, size, lanes)
    ends = np.cumsum(sizes)
    return [
        jnp.moveaxis(out[end - count : end], 0, 1).reshape(size, -1)[:n, : system.rhs.shape[1]]
        for system, end, count in zip(systems, ends, sizes, strict=True)
    ]


def _solve_by_lapack(system: ScaledGram, size: int) -> Array:
    """The solves of one Gram matrix by vmapped Cholesky factorisations, so many at once."""
    gram, *columns = system

    def solve(unit: tuple[Array, Array, Array]) -> Array:
        d, e, b = unit
        factor = jnp.linalg.cholesky(d[:, None] * gram * d + jnp.diag(e))
        return jax.scipy.linalg.cho_solve((factor, True), b)

    return lax.map(solve, tuple(x.T for x in columns), batch_size=size).T


def _solve_chunk(gram: Array, scale: Array, shift: Array, rhs: Array) -> Array:
    """Solve one chunk (C, N, W) by left-looking blocked Cholesky, units on axes 0 and -1.

    The Gram matrices are (C, N, N).
    """
    (c, n, w), dtype = rhs.shape, rhs.dtype
    k = n // min(_MAX_BLOCKS, -(-n // _MIN_BLOCK))
    # true, but known at run time only, even if gram is a constant, so that XLA keeps the branches
    go = ~(lax.optimization_barrier(gram[0, 0, 0]) < -jnp.inf)

    def kernel(fun: Callable[..., Array], first: Array, *args: Any) -> Array:
        """fun(first, ...) of the shape of first: XLA fuses nothing across a cond."""
        return lax.cond(go, fun, lambda first, *_: first, first, *args)

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
    gram1 = jnp.pad(gram, ((0, 0), (0, 1), (0, 0)))
    lower, inv = list[Array](), list[Array]()
    for p in range(0, n, k):
        rows = n + 1 - p
        d, e, b = (cut(x, 1, p, k)[:, None] for x in (scale, shift, rhs))
        eye = np.eye(rows, k, dtype=dtype)[None, :, :, None]
        last = np.eye(rows, 1, 1 - rows, dtype)[None, :, :, None]
        panel = gram1[:, p:, p : p + k, None] * scale1[:, p:, None] * d + eye * e + last * b

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
    return jnp.where(np.tri(k, dtype=bool)[None, :, :, None], z, 0)
