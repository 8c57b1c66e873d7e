"""Systems (s I + (Sigma (x) I) blockdiag(K_1, ..., K_L)) u = b in sample space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linalg import add_diagonal, inverse_psd, lu_solve, solve_psd


def mix(sigma: np.ndarray, targets: list[Array]) -> list[Array]:
    """(Sigma (x) I) b."""
    mixed = jnp.asarray(sigma, targets[0].dtype) @ jnp.stack(targets).reshape(len(targets), -1)
    return [row.reshape(targets[0].shape) for row in mixed]


def solve_coupled(
    sigma: np.ndarray, grams: list[Array], targets: list[Array], shift: Array | float
) -> list[Array]:
    """One factorisation of the whole L n x L n system: Cholesky for a definite Sigma, else LU."""
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
    grams: list[Array], targets: list[Array], shift: Array | float
) -> list[Array]:
    """The damped tri-diagonal system by odd-even elimination (science: 3.3).

    Layers 1, 3, 5, ... have the positive definite diagonal blocks K_l + s and no coupling among
    themselves; they are eliminated by Cholesky. What remains, of half the size, is indefinite and
    is solved by LU with pivoting. Plain block elimination from one end would divide by blocks that
    become singular as s -> 0.
    """
    depth, n = len(grams), grams[0].shape[0]
    kept = range(1, depth, 2)
    inverses = {
        i: inverse_psd(add_diagonal(grams[i], shift), shifted=True) for i in range(0, depth, 2)
    }
    width = 1 if targets[0].ndim == 1 else targets[0].shape[1]
    columns = [target.reshape(n, width) for target in targets]

    # an eliminated layer has u_i = P_i c_i and z_i = K_i u_i = c_i - s P_i c_i with P_i the inverse
    # and c_i = b_i - z_{i-1} - z_{i+1}; no product with K_i is needed
    rows, right = [], []
    for i in kept:
        neighbours = [j for j in (i - 1, i + 1) if j < depth]
        both = sum((inverses[j] for j in neighbours[1:]), start=inverses[neighbours[0]])
        cells = {j: jnp.zeros((n, n), grams[0].dtype) for j in kept}
        cells[i] = add_diagonal((1 - len(neighbours)) * grams[i] + shift * (both @ grams[i]), shift)
        target = columns[i]
        for j in neighbours:
            target = target - columns[j] + shift * (inverses[j] @ columns[j])
            other = 2 * j - i
            if 0 < other < depth:
                cells[other] = shift * (inverses[j] @ grams[other]) - grams[other]
        rows.append(jnp.concatenate([cells[j] for j in kept], axis=1))
        right.append(target)
    duals: dict[int, Array] = {}
    if rows:
        solution = lu_solve(jnp.concatenate(rows), jnp.concatenate(right))
        duals = dict(zip(kept, jnp.split(solution, len(rows)), strict=True))
    for i in range(0, depth, 2):
        target = columns[i]
        for j in (i - 1, i + 1):
            if 0 < j < depth:
                target = target - grams[j] @ duals[j]
        duals[i] = inverses[i] @ target
    return [duals[i].reshape(targets[i].shape) for i in range(depth)]


def minimum_norm(sigma: np.ndarray, grams: list[Array], duals: list[Array]) -> list[Array]:
    """Moves along the null space of G's range conditions to the update of least norm.

    For a null vector v of Sigma, u_l + v_l K_l^{-1} t solves the same equations for every t; the
    squared norm sum_l z_l^T K_l^{-1} z_l with z_l = K_l u_l + v_l t is least for
    (sum_l v_l^2 K_l^{-1}) t = -sum_l v_l u_l.
    """
    null = np.linalg.svd(sigma)[2][-1]
    active = [i for i in range(len(grams)) if abs(null[i]) > 1e-9]
    inverses = {i: inverse_psd(grams[i], shifted=False) for i in active}
    metric = sum(null[i] ** 2 * inverses[i] for i in active)
    slope = -sum(null[i] * duals[i] for i in active)
    step = solve_psd(jnp.asarray(metric), jnp.asarray(slope), shifted=False)
    return [
        dual + null[i] * (inverses[i] @ step) if i in inverses else dual
        for i, dual in enumerate(duals)
    ]
