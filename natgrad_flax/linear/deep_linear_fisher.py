"""The Fisher information of deep linear networks as matrices: for small networks and for tests.

The notation is that of ``deep_linear``. The parameters are those of W_1, row by row, then of W_2
and so on; the Fisher has the 1/N of a mean over inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.memory import check_fits
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.linear.deep_linear_forms import chain
from natgrad_flax.linear.deep_linear_moments import (
    Moments,
    Weights,
    check_invertible,
    check_weights,
    is_square,
)


def fisher_block(weights: Weights, data: Moments, i: int, j: int) -> Array:
    """F_ij = (A_i^T Sigma A_j) (x) (B_i S^{-1} B_j^T), shape (n_{i-1} n_i, n_{j-1} n_j) (Eq. 22).

    Args:
      weights: W_1..W_L, of shapes (n_{i-1}, n_i).
      data: the moments.
      i: the layer of the rows, from 1 as in the paper.
      j: the layer of the columns.

    Raises:
      ValueError: shapes that do not fit, or no such layer.
    """
    check_weights(weights, data)
    i, j = check_integer("i", i, 1), check_integer("j", j, 1)
    for name, value in (("i", i), ("j", j)):
        if value > len(weights):
            raise ValueError(f"{name} must be at most the depth {len(weights)}, got {value}")
    return _fisher_block(tuple(weights), data, i - 1, j - 1)


@partial(jax.jit, static_argnums=(2, 3))
def _fisher_block(weights: Weights, data: Moments, i: int, j: int) -> Array:
    before, after, _ = chain(weights)
    return jnp.kron(*_second_moments(before, after, data, i, j))


def fisher(weights: Weights, data: Moments) -> Array:
    """The whole Fisher information, shape (P, P), of rank n_L n_0 without a bottleneck.

    At a bottleneck of width r its rank is r (n_0 + n_L - r).

    Raises:
      ValueError: shapes that do not fit, or more parameters than memory allows.
    """
    _check_size(weights, data)
    return _fisher(tuple(weights), data)


@jax.jit
def _fisher(weights: Weights, data: Moments) -> Array:
    return _assemble(weights, data, jnp.kron)


def generalised_inverse(weights: Weights, data: Moments) -> Array:
    """The paper's generalised inverse of the Fisher of a square network, shape (P, P) (Eq. 23).

    Its block (i, j) is (1/L^2) <x_{j-1} x_{i-1}>^{-1} (x) <e_j e_i>^{-1}: the inverse of the block
    (j, i) of the Fisher over L^2. F F^g F = F and F^g F F^g = F^g, but F F^g is not symmetric, so
    it is not the pseudo-inverse.

    Raises:
      ValueError: layers of different widths, a singular factor (which), inputs of deficient rank,
        or more parameters than memory allows.
    """
    check_weights(weights, data)
    if not is_square(weights):
        raise ValueError("Eq. 23 needs layers of one width; use the pseudo-inverse of the Fisher")
    check_invertible(weights, data)
    _check_size(weights, data)
    return _generalised_inverse(tuple(weights), data)


@jax.jit
def _generalised_inverse(weights: Weights, data: Moments) -> Array:
    def block(inputs: Array, errors: Array) -> Array:
        # block (i, j) inverts that of (j, i), which is the transpose of that of (i, j)
        return jnp.kron(jnp.linalg.inv(inputs).T, jnp.linalg.inv(errors).T) / len(weights) ** 2

    return _assemble(weights, data, block)


def _check_size(weights: Weights, data: Moments) -> None:
    check_weights(weights, data)
    size = sum(w.size for w in weights)
    check_fits(size, weights[0].dtype.itemsize, "the dense Fisher")


def _second_moments(
    before: list[Array], after: list[Array], data: Moments, i: int, j: int
) -> tuple[Array, Array]:
    """<x_{i-1}^T x_{j-1}> and <e_i^T e_j> under the model (Eqs. 14 and 15), layers from 0."""
    return before[i].T @ data.inputs @ before[j], after[i] @ data.precision @ after[j].T


def _assemble(weights: Weights, data: Moments, block: Callable[[Array, Array], Array]) -> Array:
    before, after, _ = chain(weights)
    layers = range(len(weights))
    rows = [
        jnp.concatenate(
            [block(*_second_moments(before, after, data, i, j)) for j in layers], axis=1
        )
        for i in layers
    ]
    return jnp.concatenate(rows)
