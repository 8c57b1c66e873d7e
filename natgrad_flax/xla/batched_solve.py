"""Batched solves of many small SPD systems that share a few Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap

_LANES = 32  # units on the minor axis: enough for XLA CPU to vectorise, not to unroll
_BLOCK = 16  # rows of a tile, and products in a kernel: LLVM gives up vectorising beyond about 45
_STORE = 6 << 20  # bytes of the factors of a chunk


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

    Cost: about ``M N^3 / 3`` flops plus ``O(M N^2 K)`` for tiles of K <= 16 rows; memory half of
    ``chunk_size N^2`` numbers plus copies of the inputs. The program does not grow with N or with
    the number of Gram matrices. Under ``vmap`` it runs one by one; derivatives solve with the same
    matrices.

    Args:
        systems: Gram matrices with M units each; M may differ.
        chunk_size: Units solved at once (default 64 to 288 on CPU, where the factors of a chunk
            should stay in the cache, and 1024 elsewhere).

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

    solve = sequential_vmap(partial(_solve_all, chunk_size=chunk_size))

    def solve_for(_: Any, rhs: list[Array]) -> list[Array]:
        return solve([a._replace(rhs=b) for a, b in zip(kept, rhs, strict=True)])

    rhs = [system.rhs for system in kept]
    found = iter(lax.custom_linear_solve(matvec, rhs, solve_for, symmetric=True) if kept else [])
    return [
        system.rhs.astype(dtype) if 0 in system.rhs.shape else next(found) for system in systems
    ]


def _solve_all(systems: list[ScaledGram], *, chunk_size: int | None) -> list[Array]:
    """The solves themselves, of one dtype and in full shape."""

    def by_lapack(systems: list[ScaledGram]) -> list[Array]:
        return [_solve_by_lapack(system, chunk_size or 1024) for system in systems]

    by_tiles = partial(_solve_in_chunks, chunk_size=chunk_size)
    found: list[Array] = lax.platform_dependent(systems, cpu=by_tiles, default=by_lapack)
    return found


def _solve_by_lapack(system: ScaledGram, size: int) -> Array:
    """The solves of one Gram matrix by vmapped Cholesky factorisations, so many at once."""
    gram, *columns = system

    def solve(unit: tuple[Array, Array, Array]) -> Array:
        d, e, b = unit
        factor = jnp.linalg.cholesky(d[:, None] * gram * d + jnp.diag(e))
        return jax.scipy.linalg.cho_solve((factor, True), b)

    return lax.map(solve, tuple(x.T for x in columns), batch_size=size).T


def _solve_in_chunks(systems: list[ScaledGram], *, chunk_size: int | None) -> list[Array]:
    """One chunk of units after the other, in tiles of factors of all its units at once."""
    n, most = systems[0].rhs.shape[0], max(system.rhs.shape[1] for system in systems)
    lanes = min(_LANES, most, chunk_size or most)
    count = -(-n // _BLOCK)
    k = -(-n // count)
    sizes = [-(-system.rhs.shape[1] // lanes) for system in systems]
    shape = count * (count + 1) // 2, k, k, lanes
    dtype = systems[0].rhs.dtype
    # many share the price of a step of the loops over tiles, as far as the cache holds them
    few = min(8, max(2, _STORE // (math.prod(shape) * dtype.itemsize)))
    wanted = [few, few + 1] if chunk_size is None else [max(1, chunk_size // lanes)]
    groups = min(sum(sizes), min(wanted, key=lambda size: -sum(sizes) % size))
    spare, padding = -sum(sizes) % groups, count * k - n

    def split(arrays: Sequence[Array], fill: float) -> Array:
        """(N, M) each -> (chunks, groups, N, lanes) of all."""
        parts = []
        for x, size in zip(arrays, sizes, strict=True):
            x = jnp.pad(x, ((0, padding), (0, size * lanes - x.shape[1])), constant_values=fill)
            parts.append(jnp.moveaxis(x.reshape(-1, size, lanes), 1, 0))
        parts.append(jnp.full((spare, *parts[0].shape[1:]), fill, arrays[0].dtype))
        return jnp.concatenate(parts).reshape(-1, groups, *parts[0].shape[1:])

    grams, scales, shifts, rhs = zip(*systems, strict=True)
    gram = jnp.pad(jnp.stack(grams), ((0, 0), (0, padding), (0, padding)))
    gram = gram.reshape(-1, count, k, count, k).swapaxes(2, 3)
    owner = np.append(np.repeat(np.arange(len(systems)), sizes), np.zeros(spare, int))
    store = jnp.zeros((shape[0], groups, *shape[1:]), dtype)
    _, out = lax.scan(
        lambda store, x: _solve_chunk(store, gram[x[0]], *x[1:]),
        store,
        (owner.reshape(-1, groups), split(scales, 0), split(shifts, 1), split(rhs, 0)),
    )
    out, ends = out.reshape(-1, count * k, lanes), np.cumsum(sizes)
    return [
        jnp.moveaxis(out[end - size : end], 0, 1).reshape(count * k, -1)[:n, : len(system.rhs.T)]
        for system, end, size in zip(systems, ends, sizes, strict=True)
    ]


def _solve_chunk(
    store: Array, gram: Array, scale: Array, shift: Array, rhs: Array
) -> tuple[Array, Array]:
    """Solve one chunk by Cholesky in tiles of K rows and columns, units on axes 1 and -1.

    A tile is one kernel over all units, and loops over tiles compile it once, whatever N is. XLA
    fuses nothing across a loop, so kernels stay apart.

    Args:
      store: (tiles, C, K, K, W), for the tiles of the factors row by row up to the diagonal, where
        the inverses of tiles stand; what it holds is overwritten.
      gram: (C, N / K, N / K, K, K), the Gram matrices in tiles.
      scale: (C, N, W), as shift and rhs.
      shift: see ``scale``.
      rhs: see ``scale``.

    Returns:
      The store, to be used again, and the solutions.
    """
    (c, n, w), dtype = rhs.shape, rhs.dtype
    k = gram.shape[-1]
    zero, terms = np.uint32(0), np.arange(k, dtype=np.uint32)
    eye = np.eye(k, dtype=dtype)[None, :, :, None]

    def rows(x: Array, first: Array) -> Array:
        return lax.dynamic_slice(x, (zero, first, zero), (c, k, w))

    def column(store: Array, tile: Array, t: np.uint32) -> Array:
        return lax.dynamic_slice(store, (tile, zero, zero, t, zero), (1, c, k, 1, w))[0, :, :, 0]

    def row(store: Array, tile: Array, t: np.uint32) -> Array:
        return lax.dynamic_slice(store, (tile, zero, t, zero, zero), (1, c, 1, k, w))[0, :, 0]

    def factorise(store: Array, place: Array) -> tuple[Array, None]:
        """Tile (i, p), which needs those to the left of it and of (p, p)."""
        i, p, left, top = place
        on_diagonal = i == p
        corner = lax.dynamic_slice(gram, (zero, i, p, zero, zero), (c, 1, 1, k, k))
        tile = (
            corner.reshape(c, k, k, 1)
            * rows(scale, i * k)[:, :, None]
            * rows(scale, p * k)[:, None]
        )
        tile = tile + jnp.where(on_diagonal, eye, 0) * rows(shift, p * k)[:, None]

        def subtract(q: Array, tile: Array) -> Array:
            for t in terms:
                x, y = column(store, left + q, t), column(store, top + q, t)
                tile = tile - x[:, :, None] * y[:, None]
            return tile

        tile = lax.fori_loop(zero, p, subtract, tile)

        def solve() -> Array:
            inverse = (column(store, top + p, t) for t in terms)
            products = (
                tile[:, :, t, None] * y[:, None] for t, y in zip(terms, inverse, strict=True)
            )
            return reduce(jnp.add, products)

        tile = lax.cond(on_diagonal, lambda: _inverse_cholesky(tile), solve)
        return lax.dynamic_update_index_in_dim(store, tile, left + p, 0), None

    def substitute(part: Callable[..., Array], v: Array, step: Array) -> tuple[Array, None]:
        """Rows p of v lose their part in rows q; the tile on the diagonal divides them."""
        p, q, tile = step
        source = rows(v, q * k)
        products = (part(store, tile, t) * source[:, t, None] for t in terms)
        moved = reduce(jnp.add, products)
        moved = jnp.where(p == q, moved, rows(v, p * k) - moved)
        return lax.dynamic_update_slice(v, moved, (zero, p * k, zero)), None

    count = n // k
    number = [i * (i + 1) // 2 for i in range(count)]
    places = [(i, p, number[i], number[p]) for p in range(count) for i in range(p, count)]
    store, _ = lax.scan(factorise, store, jnp.asarray(places, np.uint32))
    down = [(p, q, number[p] + q) for p in range(count) for q in range(p + 1)]
    up = [(p, q, number[q] + p) for p in range(count)[::-1] for q in range(p, count)[::-1]]
    v, _ = lax.scan(partial(substitute, column), rhs, jnp.asarray(down, np.uint32))
    v, _ = lax.scan(partial(substitute, row), v, jnp.asarray(up, np.uint32))
    return store, v


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
