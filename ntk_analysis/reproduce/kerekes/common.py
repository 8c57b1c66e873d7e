"""Random instances, their derivatives by automatic differentiation, and long runs in pieces."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import expit

from natgrad_flax.linear import diagonal_network, logistic
from natgrad_flax.linear.descent import Integrator, descend
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.registry import Report

# compiled as a whole: their solves contain branches, which JAX compiles anew at every plain call
logistic_step = jax.jit(logistic.natural_gradient)
logistic_field = jax.jit(logistic.natural_gradient_field)
logistic_fisher = jax.jit(logistic.fisher)
diagonal_step = jax.jit(diagonal_network.natural_gradient)

SEEDS = 4
"""Random draws of every shape; the worst counts."""
DRAWN = f"Gaussian data with the labels of a linear teacher, {SEEDS} draws of every shape, float64"


@dataclass(frozen=True, eq=False)
class Case:
    """Separable data, a start and an invertible matrix.

    Attributes:
      x: standard normal inputs, shape (N, D).
      y: labels -1 or +1 of a linear teacher, shape (N,).
      start: beta at time 0, shape (D,).
      change: A with singular values from 1/3 to 3, shape (D, D).
    """

    x: Matrix
    y: Matrix
    start: Matrix
    change: Matrix

    @property
    def signed(self) -> Matrix:
        """Z = y * X, shape (N, D)."""
        rows: Matrix = self.y[:, None] * self.x
        return rows

    @property
    def changed(self) -> Matrix:
        """X A^T, shape (N, D)."""
        rows: Matrix = self.x @ self.change.T
        return rows

    @property
    def changed_start(self) -> Matrix:
        """The b' with A^T b' = b, shape (D,)."""
        return np.linalg.solve(self.change.T, self.start).astype(np.float64)


def draw(seed: int, num: int, dim: int) -> Case:
    """A random case, different for every seed and shape."""
    rng = np.random.default_rng([seed, num, dim])
    x, teacher = rng.standard_normal((num, dim)), rng.standard_normal(dim)
    left, right = (np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(2))
    values = 3.0 ** rng.uniform(-1, 1, dim)
    y = np.where(x @ teacher >= 0, 1.0, -1.0)
    return Case(x, y, 0.3 * rng.standard_normal(dim), (left * values) @ right)


def draws(shapes: tuple[tuple[int, int], ...], seeds: int) -> Iterator[Case]:
    """That many cases of every shape (N, D)."""
    for (num, dim), seed in itertools.product(shapes, range(seeds)):
        yield draw(seed, num, dim)


def paths(
    case: Case, field: Any, *, step_size: float, steps: int, integrator: Integrator
) -> tuple[Matrix, Matrix]:
    """Coefficients at ten times of a descent on X and of one on X A^T, from the same function.

    Args:
      case: data, start and A.
      field: from inputs and labels to the field.
      step_size: of ``descend``.
      steps: a multiple of 10.
      integrator: of ``descend``.

    Returns:
      b and A^T b', each of shape (11, D); equal if the descent does not see A.
    """
    found = [
        descend(
            field(x, case.y),
            start,
            step_size=step_size,
            steps=steps,
            record_every=steps // 10,
            integrator=integrator,
        )
        for x, start in ((case.x, case.start), (case.changed, case.changed_start))
    ]
    plain, changed = (np.asarray(run.recorded) for run in found)
    return plain, changed @ case.change


def in_pieces(
    field: Any,
    start: Any,
    *,
    step_size: float,
    steps: int,
    pieces: int,
    report: Report,
    what: str,
) -> list[Any]:
    """``descend`` in pieces of one length, so that a long run tells how far it is.

    Args:
      field: as ``descend`` takes it.
      start: parameters.
      step_size: eta.
      steps: of all pieces together.
      pieces: how many; they divide the steps.
      report: told after each piece.
      what: the run, for the report.

    Returns:
      The parameters at the start and after each piece.

    Raises:
      ValueError: the pieces do not divide the steps, or as ``descend``.
    """
    if pieces < 1 or steps % pieces:
        raise ValueError(f"pieces={pieces} must divide steps={steps}")
    states = [start]
    for piece in range(1, pieces + 1):
        run = descend(field, states[-1], step_size=step_size, steps=steps // pieces)
        states.append(jax.block_until_ready(run.final))
        report(f"{what}: step {piece * (steps // pieces)} of {steps}")
    return states


def negative_log_likelihood(coefficients: Array, x: Array, y: Array) -> Array:
    """The sum of -log p(y_n | x_n . beta), written out."""
    return jnp.sum(jnp.log1p(jnp.exp(-y * (x @ coefficients))))


_gradient = jax.jit(jax.grad(negative_log_likelihood))
_scores = jax.jit(jax.vmap(jax.grad(negative_log_likelihood), (None, None, 0)))


def gradient(x: Matrix, y: Matrix, coefficients: Matrix) -> Matrix:
    """The gradient of the loss by automatic differentiation, shape (D,)."""
    return np.asarray(_gradient(coefficients, x, y))


def expected_fisher(x: Matrix, coefficients: Matrix) -> Matrix:
    """E[grad grad^T] over all 2^N label vectors with the probabilities of the model, (D, D)."""
    labels = np.array(list(itertools.product((-1.0, 1.0), repeat=len(x))))
    probabilities = np.prod(expit(labels * (x @ coefficients)), axis=1)
    scores = np.asarray(_scores(coefficients, x, labels))
    matrix: Matrix = scores.T @ (probabilities[:, None] * scores)
    return matrix


def cosine(one: Any, other: Any) -> float:
    """The cosine of the angle between two vectors."""
    one, other = np.asarray(one), np.asarray(other)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def product_jacobian(factors: Sequence[Matrix]) -> Matrix:
    """d beta / d (W_1, ..., W_L) for beta = W_1 ... W_L, everything raveled row by row.

    Returns:
      Shape (entries of beta, entries of all factors), by automatic differentiation.
    """
    blocks = jax.jacobian(lambda *f: reduce(operator.matmul, f), tuple(range(len(factors))))(
        *map(jnp.asarray, factors)
    )
    size = factors[0].shape[0] * factors[-1].shape[1]
    return np.hstack([np.asarray(block).reshape(size, -1) for block in blocks])
