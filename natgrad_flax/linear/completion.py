"""Matrix completion by deep factorisation as Arora et al. (2019) run it, the setting of Fig. 5.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from natgrad_flax.linear import completion
  >>> # of rank 1; the diagonal is not observed
  >>> target, mask = jnp.ones((4, 4)), 1 - jnp.eye(4)
  >>> factors = completion.initial_factors(4, 3, 1e-2, jax.random.key(0))
  >>> found = completion.complete(
  ...     target, mask, factors, learning_rate=1e-2, max_steps=2000
  ... )
  >>> beta = found.factors[0] @ found.factors[1] @ found.factors[2]
  >>> bool(jnp.allclose(jnp.diag(beta), 1, atol=0.1))
  True
  >>> round(completion.effective_rank(beta), 1)
  1.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import real_array
from natgrad_flax.arguments.scalars import (
    check_integer,
    check_learning_rate,
    check_number,
    check_steps,
)
from natgrad_flax.linear.factorization_checks import Factors, check_observations, check_start
from natgrad_flax.linear.matrix_factorization import euclidean_step, product, residual

DECAY = 0.99
STABILISER = 1e-4


class Completion(NamedTuple):
    """A completed matrix.

    Attributes:
      factors: W_1 ... W_L after the last step.
      loss: mean over the observed entries of the squared error.
      steps: how many were taken; fewer than asked where the tolerance was reached.
    """

    factors: Factors
    loss: float
    steps: int


def initial_factors(
    size: int,
    depth: int,
    scale: float,
    key: Array,
    *,
    gaussians: int = 1,
    dtype: Any = jnp.float32,
) -> Factors:
    """Square Gaussian factors whose product has entries of order scale / sqrt(size).

    Args:
      size: n, rows and columns of each factor.
      depth: L.
      scale: s; the entries of a factor have variance s^{2/L} / n.
      key: randomness.
      gaussians: each factor is a product of this many Gaussian matrices, rescaled to the
        Frobenius norm s^{1/L} sqrt(n) where there are several (Fig. 5, right).
      dtype: of the factors.

    Raises:
      ValueError: a number is out of range.
    """
    size, depth = check_integer("size", size, 1), check_integer("depth", depth, 1)
    gaussians = check_integer("gaussians", gaussians, 1)
    scale = check_number("scale", scale, positive=True)
    deviation = scale ** (1 / depth) / math.sqrt(size)
    factors = []
    for factor_key in jax.random.split(key, depth):
        keys = jax.random.split(factor_key, gaussians)
        factor = product([jax.random.normal(k, (size, size), dtype) for k in keys])
        if gaussians > 1:
            factor = factor * (size / jnp.linalg.norm(factor))
        factors.append(deviation * factor)
    return tuple(factors)


def complete(
    target: Any,
    mask: Any,
    factors: Sequence[Any],
    *,
    learning_rate: float = 1e-3,
    tolerance: float = 1e-6,
    max_steps: int = 1_000_000,
) -> Completion:
    """Euclidean descent on the mean squared error with one step size for all parameters.

    The step is learning_rate / (sqrt(v) + 1e-4) times the gradient, v the moving average (decay
    0.99, bias-corrected) of the squared norm of the gradient over all factors together
    ("GroupRMSprop").

    Args:
      target: matrix, shape (rows, columns); unobserved entries are not used.
      mask: boolean or 0/1, of the same shape.
      factors: where the descent starts.
      learning_rate: about the length of a step.
      tolerance: stop at this mean squared error.
      max_steps: stop after so many steps.

    Raises:
      ValueError: bad observations, factors or settings.
      TypeError: arrays that are not floating.
    """
    target, mask = check_observations(target, mask)
    checked = check_start(factors, target)
    learning_rate = check_learning_rate(learning_rate)
    tolerance = check_number("tolerance", tolerance, positive=False)
    max_steps = check_steps(max_steps, "max_steps", 1)
    final, loss, steps = _group_rmsprop(
        checked, target, mask, learning_rate, tolerance, jnp.asarray(max_steps)
    )
    return Completion(final, float(loss), int(steps))


@jax.jit
def _group_rmsprop(
    factors: Factors,
    target: Array,
    mask: Array,
    learning_rate: Array | float,
    tolerance: Array | float,
    max_steps: Array,
) -> tuple[Factors, Array, Array]:
    count = jnp.sum(mask)

    def evaluate(factors: Factors) -> tuple[Array, Array]:
        error = residual(factors, target, mask)
        return error, jnp.sum(error**2) / count

    def unfinished(state: tuple[Factors, Array, Array, Array, Array]) -> Array:
        _, _, loss, _, steps = state
        return (loss > tolerance) & (steps < max_steps)

    def step(
        state: tuple[Factors, Array, Array, Array, Array],
    ) -> tuple[Factors, Array, Array, Array, Array]:
        factors, error, _, average, steps = state
        gradient = euclidean_step(factors, 2 * error / count)
        square = sum((jnp.sum(g**2) for g in gradient), start=jnp.zeros((), target.dtype))
        average = DECAY * average + (1 - DECAY) * square
        corrected = average / (1 - DECAY ** (steps + 1).astype(target.dtype))
        rate = learning_rate / (jnp.sqrt(corrected) + STABILISER)
        factors = tuple(w - rate * g for w, g in zip(factors, gradient, strict=True))
        error, loss = evaluate(factors)
        return factors, error, loss, average, steps + 1

    error, loss = evaluate(factors)
    zero = jnp.zeros((), target.dtype)
    start = (factors, error, loss, zero, jnp.zeros((), jnp.asarray(max_steps).dtype))
    final, _, loss, _, steps = jax.lax.while_loop(unfinished, step, start)
    return final, loss, steps


def effective_rank(matrix: Any) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007).

    Args:
      matrix: shape (rows, columns), not zero.

    Raises:
      ValueError: not a finite matrix, or zero.
    """
    matrix = real_array(matrix, "matrix")
    if matrix.ndim != 2 or not np.isfinite(matrix).all() or not matrix.any():
        raise ValueError("the effective rank is that of a finite matrix other than zero")
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))
