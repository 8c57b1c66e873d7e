"""The traced forms of the natural gradient of deep linear networks, without checks.

The notation is that of ``deep_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.linalg.dense import add_diagonal, solve_psd
from natgrad_flax.linear.deep_linear_moments import Moments, Weights

T = TypeVar("T")
R = TypeVar("R")


def chain(weights: Weights) -> tuple[list[Array], list[Array], Array]:
    """The products around each layer: A_1..A_L, B_1..B_L and W = A_i W_i B_i."""
    first, last = weights[0], weights[-1]
    before = [jnp.eye(first.shape[0], dtype=first.dtype)]
    for factor in weights[:-1]:
        before.append(before[-1] @ factor if len(before) > 1 else factor)
    after = [jnp.eye(last.shape[1], dtype=last.dtype)]
    for factor in reversed(weights[1:]):
        after.append(factor @ after[-1] if len(after) > 1 else factor)
    after.reverse()
    return before, after, before[-1] @ last


def inverse_form(factors: Array, inputs: Array, residual: Array) -> Array:
    """A_i^{-1} V B_i^{-1} with V = Sigma^+ R, for square factors.

    Args:
      factors: W_1..W_L as one array, shape (L, n, n).
      inputs: Sigma, shape (n, n).
      residual: R = <x^T (y - f)>, shape (n, n).

    Returns:
      Shape (L, n, n): L times the natural-gradient descent direction, about 9 n^3 flops a layer.
    """
    inverses = jax.lax.map(jnp.linalg.inv, factors)
    eye = jnp.eye(factors.shape[1], dtype=factors.dtype)
    start = solve_psd(inputs, residual, shifted=False)
    _, lefts = jax.lax.scan(lambda left, inverse: (inverse @ left, left), start, inverses)
    _, rights = jax.lax.scan(
        lambda right, inverse: (right @ inverse, right), eye, inverses, reverse=True
    )
    return jax.lax.map(lambda pair: pair[0] @ pair[1], (lefts, rights))


def damped_form(
    before: Sequence[Array],
    after: Sequence[Array],
    inputs: Array,
    seen: Array,
    precision: Array,
    input_shift: Array | float,
    error_shift: Array | float,
) -> tuple[list[Array], Array]:
    """L times the descent direction of Eq. 20, and the sum of its inner products with -dL/dW_i.

    Args:
      before: A_i, shape (n_0, n_{i-1}).
      after: B_i, shape (n_i, n_L).
      inputs: Sigma, shape (n_0, n_0).
      seen: <x^T (y - f)> S^{-1}, shape (n_0, n_L).
      precision: S^{-1}, shape (n_L, n_L).
      input_shift: added to the second moments of layer inputs.
      error_shift: added to those of errors.
    """

    def layer(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = pair
        down = a.T @ seen @ b.T
        step = sandwich(a.T @ inputs @ a, down, b @ precision @ b.T, input_shift, error_shift)
        return step, jnp.sum(step * down)

    results = map_by_shape(layer, list(zip(before, after, strict=True)))
    return [step for step, _ in results], sum((slope for _, slope in results), jnp.zeros(()))


def sandwich(
    left: Array,
    middle: Array,
    right: Array,
    left_shift: Array | float,
    right_shift: Array | float,
) -> Array:
    """(left + s I)^{-1} middle (right + t I)^{-1} for positive semi-definite left and right."""
    half = solve_psd(add_diagonal(left, left_shift), middle, shifted=True)
    return solve_psd(add_diagonal(right, right_shift), half.T, shifted=True).T


def map_by_shape(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Maps over trees of arrays, compiling the function once for each distinct set of shapes.

    Items of equal shapes are stacked and run one after another (``lax.map``): never as a batch,
    which LAPACK calls inside the function would not survive on a CPU.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, item in enumerate(items):
        key = tuple(leaf.shape for leaf in jax.tree.leaves(item))
        groups.setdefault(key, []).append(index)
    results: dict[int, R] = {}
    for members in groups.values():
        if len(members) == 1:
            results[members[0]] = function(items[members[0]])
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(items[i] for i in members))
        mapped = jax.lax.map(function, stacked)
        for position, index in enumerate(members):
            results[index] = jax.tree.map(lambda leaf, at=position: leaf[at], mapped)
    return [results[index] for index in range(len(items))]


class Whitened(NamedTuple):
    """A network between white inputs and white output noise.

    With Sigma = R^T R and S^{-1} = K K^T, a step dW of the product becomes R dW K, and the loss is
    half the squared Frobenius norm of ``residual``, up to its minimum.

    Attributes:
      before: R A_i, shape (rank of Sigma, n_{i-1}).
      after: B_i K, shape (n_i, n_L).
      residual: R (W* - W) K, shape (rank of Sigma, n_L).
    """

    before: list[Array]
    after: list[Array]
    residual: Array


def whiten(weights: Weights, data: Moments) -> Whitened:
    """The network in white coordinates; directions that the inputs lack count as zero rows."""
    before, after, product = chain(weights)
    values, vectors = jnp.linalg.eigh(data.inputs)
    cutoff = max(len(values), 32) * jnp.finfo(values.dtype).eps * jnp.max(values)
    kept = values > cutoff
    scale = jnp.where(kept, jnp.sqrt(jnp.where(kept, values, 1)), 0)
    inverse_scale = jnp.where(kept, 1 / jnp.where(kept, scale, 1), 0)
    root = scale[:, None] * vectors.T
    noise = jnp.linalg.cholesky(data.precision)
    seen = (data.cross - data.inputs @ product) @ noise
    return Whitened(
        [root @ a for a in before],
        [b @ noise for b in after],
        inverse_scale[:, None] * (vectors.T @ seen),
    )
