"""What a deep linear network needs to know of the data, and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import as_array, check_real, is_concrete
from natgrad_flax.linalg.dense import solve_psd
from natgrad_flax.optimizer.checks import check_array

Weights = Sequence[Array]


class Moments(NamedTuple):
    """What a linear network needs to know of the data, and of its output noise.

    Attributes:
      inputs: Sigma = <x^T x>, shape (n_0, n_0).
      cross: <x^T y>, shape (n_0, n_L).
      precision: S^{-1}, the inverse covariance of the model's Gaussian outputs, shape (n_L, n_L).
    """

    inputs: Array
    cross: Array
    precision: Array


def moments(x: Array, y: Array, output_covariance: Array | None = None) -> Moments:
    """The moments of a batch, with the 1/N of a mean.

    Args:
      x: inputs, shape (N, n_0).
      y: targets, shape (N, n_L).
      output_covariance: S, symmetric positive definite, shape (n_L, n_L); None means I, and the
        loss is then the mean squared error 1/(2N) sum |y - f|^2.

    Raises:
      ValueError: shapes that do not fit, an empty batch, NaN or infinity, a covariance that is not
        symmetric positive definite.
      TypeError: x or y is not floating.
    """
    x, y = check_array(x), check_array(y, "y")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"x must be (N, inputs) and y (N, outputs) with one N, got {x.shape} and {y.shape}"
        )
    outputs = y.shape[1]
    if output_covariance is None:
        covariance = jnp.eye(outputs, dtype=x.dtype)
    else:
        covariance = as_array(output_covariance, "output_covariance")
        check_real(covariance, "output_covariance")
        covariance = covariance.astype(x.dtype)
        if covariance.shape != (outputs, outputs):
            raise ValueError(
                f"output_covariance must be {outputs} x {outputs}, got shape {covariance.shape}"
            )
        check_positive_definite(covariance, "output_covariance")
    return _moments(x, y, covariance)


@jax.jit
def _moments(x: Array, y: Array, covariance: Array) -> Moments:
    eye = jnp.eye(y.shape[1], dtype=x.dtype)
    precision = solve_psd(covariance, eye, shifted=True)
    return Moments(x.T @ x / len(x), x.T @ y / len(x), precision)


def check_positive_definite(matrix: Array, name: str) -> None:
    """Raises ValueError on a concrete matrix that is not symmetric positive definite."""
    if not is_concrete(matrix):
        return
    values = np.asarray(matrix)
    if not np.isfinite(values).all() or not np.allclose(values, values.T):
        raise ValueError(f"{name} must be finite and symmetric")
    smallest = np.linalg.eigvalsh(values)[0]
    if smallest <= 0:
        raise ValueError(f"{name} must be positive definite, its least eigenvalue is {smallest:g}")


def check_weights(weights: Weights, data: Moments) -> None:
    """Raises ValueError unless the factors chain and fit the moments."""
    if len(weights) == 0:
        raise ValueError("a network needs one weight matrix at least, got none")
    for number, factor in enumerate(weights, 1):
        if jnp.ndim(factor) != 2:
            raise ValueError(f"W_{number} must be a matrix, got shape {jnp.shape(factor)}")
        if number > 1 and factor.shape[0] != weights[number - 2].shape[1]:
            raise ValueError(
                f"W_{number} takes {factor.shape[0]} inputs but W_{number - 1} gives "
                f"{weights[number - 2].shape[1]}; factors have the shape (n_(i-1), n_i)"
            )
        check_real(factor, f"W_{number}")
        if is_concrete(factor) and not np.isfinite(np.asarray(factor)).all():
            raise ValueError(f"W_{number} has NaN or infinite entries")
    first, last = weights[0].shape[0], weights[-1].shape[1]
    wanted = Moments((first, first), (first, last), (last, last))  # type: ignore[arg-type]
    for name, array, shape in zip(Moments._fields, data, wanted, strict=True):
        if jnp.shape(array) != shape:
            raise ValueError(
                f"the moments do not fit a network from {first} inputs to {last} outputs: "
                f"{name} must be of shape {shape}, got {jnp.shape(array)}"
            )


def check_invertible(weights: Weights, data: Moments) -> None:
    """Raises ValueError where a concrete square network or its inputs have no full rank."""
    if is_concrete(data.inputs):
        rank, size = matrix_rank(data.inputs), data.inputs.shape[0]
        if rank < size:
            raise ValueError(
                f"the inputs span {rank} of {size} dimensions, so <x^T x> has no inverse; use "
                'method="pseudo-inverse" or a positive damping'
            )
    check_factors(weights)


def check_factors(weights: Weights) -> None:
    """Raises ValueError on a concrete square factor that is singular."""
    for number, factor in enumerate(weights, 1):
        if is_concrete(factor) and matrix_rank(factor) < len(factor):
            raise ValueError(
                f"W_{number} is singular (rank {matrix_rank(factor)} of {len(factor)}), so the "
                "product of the factors has no inverse; use a positive damping, or "
                'method="pseudo-inverse" of natural_gradient'
            )


def matrix_rank(matrix: Array | np.ndarray) -> int:
    """The numerical rank of a concrete matrix in its own precision."""
    return int(np.linalg.matrix_rank(np.asarray(matrix)))


def is_square(weights: Weights) -> bool:
    """Whether all layers have the same width."""
    return len({n for factor in weights for n in factor.shape}) == 1


@jax.jit
def optimum(data: Moments) -> Array:
    """W* = Sigma^+ <x^T y>, the least-squares map of least norm, shape (n_0, n_L)."""
    return solve_psd(data.inputs, data.cross, shifted=False)


@jax.jit
def excess_loss(product: Array, data: Moments) -> Array:
    """L(W) - L_min = 1/2 tr(S^{-1} (W - W*)^T Sigma (W - W*)) for a product W (n_0, n_L)."""
    error = product - optimum(data)
    return jnp.sum((error @ data.precision) * (data.inputs @ error)) / 2
