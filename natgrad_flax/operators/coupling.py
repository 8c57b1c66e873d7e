"""Systems (s I + (Sigma (x) I) blockdiag(K_1, ..., K_L)) u = b in sample space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linalg.dense import (
    above_rounding,
    add_diagonal,
    eigh,
    has_full_rank,
    inverse_pd,
    inverse_psd,
    lu_solve,
    pinv_solve,
    reciprocal,
    solve_psd,
)
from natgrad_flax.linalg.execution import many_devices

RESIDUAL = 0.01
"""Of the right-hand side, beyond which an elimination does not count as a solution.

With full rank it leaves some eps whatever s is. With a layer that lacks rank, rounding grows as 1/s
and is about as large in the residual as in the update."""


def mix(sigma: np.ndarray, targets: list[Array]) -> list[Array]:
    """(Sigma (x) I) b."""
    mixed = jnp.asarray(sigma, targets[0].dtype) @ jnp.stack(targets).reshape(len(targets), -1)
    return [row.reshape(targets[0].shape) for row in mixed]


def solve_coupled(
    sigma: np.ndarray,
    grams: list[Array],
    targets: list[Array],
    shift: Array | float,
    *,
    refine: bool = False,
) -> list[Array]:
    """One factorisation of the whole L n x L n system: Cholesky for a definite Sigma, else LU."""
    del refine
    depth, n = len(grams), grams[0].shape[0]
    if np.linalg.eigvalsh(sigma)[0] > 0:
        inverse = np.linalg.inv(sigma)
        eye = jnp.eye(n, dtype=grams[0].dtype)
        coupled = jnp.kron(jnp.asarray(inverse, grams[0].dtype), eye) * shift
        matrix = coupled + jax.scipy.linalg.block_diag(*grams)
        flat = solve_psd(matrix, jnp.concatenate(mix(inverse, targets)), shifted=True)
    else:
        rows = [
            jnp.concatenate([s * k for s, k in zip(row, grams, strict=True)], 1) for row in sigma
        ]
        matrix = add_diagonal(jnp.concatenate(rows), shift)
        flat = lu_solve(matrix, jnp.concatenate(targets))
    return jnp.split(flat, depth)


def solve_tridiagonal(
    sigma: np.ndarray,
    grams: list[Array],
    targets: list[Array],
    shift: Array | float,
    *,
    refine: bool,
) -> list[Array]:
    """The damped tri-diagonal system by odd-even elimination (science: 3.3).

    Layers 1, 3, 5, ... have the positive definite diagonal blocks K_l + s and no coupling among
    themselves; they are eliminated by Cholesky. What remains, of half the size, is indefinite and
    is solved by LU with pivoting. Plain block elimination from one end would divide by blocks that
    become singular as s -> 0. Where layers lack rank and s is too small for that in this precision,
    which residuals tell, the system is solved in the ranges of the layers.

    Args:
      sigma: the tri-diagonal coupling.
      grams: K_l, L arrays (n, n).
      targets: b, L arrays (n,) or (n, k).
      shift: s.
      refine: takes one step of iterative refinement, for what will be divided by s.
    """
    eliminated = _eliminate(grams, shift)
    duals = eliminated(targets)
    left = _residuals(grams, targets, shift, duals)
    if refine:
        duals = [dual + more for dual, more in zip(duals, eliminated(left), strict=True)]
        left = _residuals(grams, targets, shift, duals)
    norms, most = (jnp.linalg.norm(jnp.stack(parts), axis=(0, 1)) for parts in (left, targets))
    return jax.lax.cond(
        jnp.all(norms <= RESIDUAL * most),
        lambda: duals,
        lambda: solve_in_ranges(sigma, grams, targets, shift),
    )


def _residuals(
    grams: list[Array], targets: list[Array], shift: Array | float, duals: list[Array]
) -> list[Array]:
    """What the duals leave of the right-hand sides of a tri-diagonal system."""
    seen = [gram @ dual for gram, dual in zip(grams, duals, strict=True)]
    return [
        target - shift * dual - sum(seen[j] for j in _beside(i, len(grams), 0))
        for i, (target, dual) in enumerate(zip(targets, duals, strict=True))
    ]


def _beside(i: int, depth: int, nearest: int = 1) -> list[int]:
    """The layers next to one, and itself where those at distance 0 count."""
    return [j for j in range(depth) if nearest <= abs(i - j) <= 1]


def _eliminate(grams: list[Array], shift: Array | float) -> Callable[[list[Array]], list[Array]]:
    """The factorised tri-diagonal system, as a function of its right-hand sides."""
    depth, n = len(grams), grams[0].shape[0]
    kept = range(1, depth, 2)
    inverses = {i: inverse_pd(add_diagonal(grams[i], shift)) for i in range(0, depth, 2)}

    # an eliminated layer has u_i = P_i c_i and z_i = K_i u_i = c_i - s P_i c_i with P_i the inverse
    # and c_i = b_i - z_{i-1} - z_{i+1}; no product with K_i is needed
    rows = []
    for i in kept:
        neighbours = _beside(i, depth)
        both = sum((inverses[j] for j in neighbours[1:]), start=inverses[neighbours[0]])
        cells = {j: jnp.zeros((n, n), grams[0].dtype) for j in kept}
        cells[i] = add_diagonal((1 - len(neighbours)) * grams[i] + shift * (both @ grams[i]), shift)
        for j in neighbours:
            other = 2 * j - i
            if 0 < other < depth:
                cells[other] = shift * (inverses[j] @ grams[other]) - grams[other]
        rows.append(jnp.concatenate([cells[j] for j in kept], axis=1))

    def solve(targets: list[Array]) -> list[Array]:
        columns = [target.reshape(n, -1) for target in targets]
        right = []
        for i in kept:
            target = columns[i]
            for j in _beside(i, depth):
                target = target - columns[j] + shift * (inverses[j] @ columns[j])
            right.append(target)
        duals: dict[int, Array] = {}
        if rows:
            solution = lu_solve(jnp.concatenate(rows), jnp.concatenate(right))
            duals = dict(zip(kept, jnp.split(solution, len(right)), strict=True))
        for i in range(0, depth, 2):
            target = columns[i]
            for j in _beside(i, depth):
                target = target - grams[j] @ duals[j]
            duals[i] = inverses[i] @ target
        return [duals[i].reshape(targets[i].shape) for i in range(depth)]

    return solve


def _each(function: Callable[[Array], Any], matrices: list[Array]) -> Any:
    """The stacked results of a function of every matrix.

    In one loop, which is compiled once; on a mesh each of them is a task of its own.
    """
    if many_devices():
        return jax.tree.map(lambda *found: jnp.stack(found), *map(function, matrices))
    return jax.lax.map(function, jnp.stack(matrices))


def solve_undamped(sigma: np.ndarray, grams: list[Array], target: Array) -> list[Array]:
    """u with J_l^T u_l the layers of G^+ S^T (1 (x) b), for one b of all layers.

    Where every K_l is regular these are the weights of Theorem 4.1 times K_l^{-1} b, for a singular
    Sigma moved to the least norm. Layers may lose rank by their data alone (units that are off,
    samples that repeat), which sizes do not tell; then the pseudo-inverse is taken in their ranges.
    """
    weights = (np.linalg.pinv(sigma, hermitian=True) @ np.ones(len(grams))).tolist()

    def regular() -> list[Array]:
        duals = [
            weight * solve_psd(gram, target, shifted=True)
            if abs(weight) > 1e-12
            else jnp.zeros_like(target)
            for weight, gram in zip(weights, grams, strict=True)
        ]
        return duals if _is_regular(sigma) else _minimum_norm(sigma, grams, duals)

    every = jnp.all(jnp.stack([has_full_rank(gram) for gram in grams]))
    return jax.lax.cond(
        every, regular, lambda: solve_in_ranges(sigma, grams, [target] * len(grams), 0.0)
    )


def solve_in_ranges(
    sigma: np.ndarray, grams: list[Array], targets: list[Array], shift: Array | float
) -> list[Array]:
    """u with J_l^T u_l the layers of (G + rho)^+ J_l^T b_l, whatever the rank of the J_l.

    With J_l = U s V^T it is u = U s^{-1} (M + N rho)^+ s U^T b, M = s U^T (Sigma (x) I) U s: one
    eigendecomposition a layer, and one of the whole L n x L n system.
    """
    inside, halves, (roots, vectors) = coupled_gram(sigma, grams)
    inner = halves.mT @ jnp.stack(targets).reshape(len(grams), len(inside) // len(grams), -1)
    solved = pinv_solve(add_diagonal(inside, shift), inner.reshape(len(inside), -1))
    duals = vectors @ (reciprocal(roots)[:, :, None] * solved.reshape(inner.shape))
    return [dual.reshape(target.shape) for dual, target in zip(duals, targets, strict=True)]


def coupled_gram(sigma: np.ndarray, grams: list[Array]) -> tuple[Array, Array, tuple[Array, Array]]:
    """M = s U^T (Sigma (x) I) U s, whose eigenvalues but zeros are those of N G, shape (L n, L n).

    Also U_l s_l of every layer, (L, n, n), and both s_l, (L, n), and U_l: J_l = U_l s_l V_l^T.
    """
    values, vectors = _each(eigh, grams)
    roots = jnp.sqrt(jnp.maximum(jax.vmap(above_rounding)(values), 0))
    halves = vectors * roots[:, None, :]
    depth, n = roots.shape
    blocks = jnp.einsum("iap,jaq->ipjq", halves, halves)
    blocks = blocks * jnp.asarray(sigma, blocks.dtype)[:, None, :, None]
    return blocks.reshape(depth * n, depth * n), halves, (roots, vectors)


def _is_regular(sigma: np.ndarray) -> bool:
    return bool(np.linalg.matrix_rank(sigma, tol=1e-9) == len(sigma))


def _minimum_norm(sigma: np.ndarray, grams: list[Array], duals: list[Array]) -> list[Array]:
    """Moves along the null space of G's range conditions to the update of least norm.

    For a null vector v of Sigma, u_l + v_l K_l^{-1} t solves the same equations for every t; the
    squared norm sum_l z_l^T K_l^{-1} z_l with z_l = K_l u_l + v_l t is least for
    (sum_l v_l^2 K_l^{-1}) t = -sum_l v_l u_l.
    """
    null = np.linalg.svd(sigma)[2][-1].tolist()
    active = [i for i in range(len(grams)) if abs(null[i]) > 1e-9]
    inverses = {i: inverse_psd(grams[i], shifted=False) for i in active}
    metric = sum(null[i] ** 2 * inverses[i] for i in active)
    target = -sum(null[i] * duals[i] for i in active)
    step = solve_psd(jnp.asarray(metric), jnp.asarray(target), shifted=False)
    return [
        dual + null[i] * (inverses[i] @ step) if i in inverses else dual
        for i, dual in enumerate(duals)
    ]
