"""Infinite-width kernels of fully connected networks, layer by layer, for a block of samples.

Theta_l = B_l Q_l entry by entry (Karakida & Osawa 2020, Section 2 and Supplement E): Q_l is the
limit of the Gram matrix of the scaled inputs a_{l-1}, B_l that of the derivatives D_l. One pass
through the network gives all of them: Q_l and E[phi' phi'] layer by layer, and B_l is a running
product of those from the last layer down. Activations that are linear on both sides of 0 go in
angles (``angle_kernels``), others in covariances, through an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ntk_analysis.angle_kernels import angles_of_inputs, through_activation
from ntk_analysis.empirical import Matrix
from ntk_analysis.engines import Activate
from ntk_analysis.infinite_width import InfiniteWidthLimit


def dense_block(
    limit: InfiniteWidthLimit, x1: Matrix, x2: Matrix, *, names: Sequence[str], diagonal: bool
) -> list[Array]:
    """The kernels of one block; on the diagonal of the whole kernel, with exact variances.

    Args:
      limit: the network.
      x1: inputs, shape (n1, M_0), float64.
      x2: inputs, shape (n2, M_0).
      names: of "tangent.l", "inputs.l" and "derivatives.l" with l = 1..L, "nngp" and "ntk".
      diagonal: whether x1 and x2 are the same.

    Returns:
      Arrays (n1, n2), as named.

    One compiled program a step, and not one for all layers: in that one XLA would work out every
    layer anew for each array that is returned, so the cost would grow with the depth squared.
    """
    inputs, slopes = _passes(limit, x1, x2, diagonal)
    values = {"nngp": inputs[-1]}
    values.update({f"inputs.{layer}": array for layer, array in enumerate(inputs, 1)})
    variances = limit.description["weight_variances"]
    derivative, total = jnp.ones_like(inputs[-1]), jnp.zeros_like(inputs[-1])
    for layer in range(limit.depth, 0, -1):
        values[f"derivatives.{layer}"] = derivative
        if f"tangent.{layer}" in names:
            values[f"tangent.{layer}"] = _product(inputs[layer - 1], derivative, 1.0)
        if "ntk" in names:
            total = _add_product(total, inputs[layer - 1], derivative)
        if layer > 1:
            derivative = _product(slopes[layer - 2], derivative, variances[layer - 1])
    values["ntk"] = total
    return [values[name] for name in names]


def _passes(
    limit: InfiniteWidthLimit, x1: Matrix, x2: Matrix, diagonal: bool
) -> tuple[list[Array], list[Array]]:
    """Q_l of the L layers, and E[phi' phi'] of the L - 1 activations."""
    state: Any
    inputs, slopes = [], []
    (weight, bias), *behind = zip(
        limit.description["weight_variances"], limit.description["bias_variances"], strict=True
    )
    if limit.negative_slope is None:
        state, covariance = _enter(x1, x2, weight, bias, diagonal=diagonal)
        for weight, bias in behind:
            inputs.append(covariance)
            state, covariance, slope = _through(
                state, weight, bias, activation=limit.activation, diagonal=diagonal
            )
            slopes.append(slope)
    else:
        state, covariance = angles_of_inputs(x1, x2, weight, bias, diagonal=diagonal)
        for weight, bias in behind:
            inputs.append(covariance)
            state, covariance, slope = through_activation(
                state, weight, bias, negative_slope=limit.negative_slope
            )
            slopes.append(slope)
    return [*inputs, covariance], slopes


class Covariances(NamedTuple):
    """Covariances (n1, n2) of pre-activations, and variances (n1,) and (n2,)."""

    covariance: Array
    first: Array
    second: Array

    def behind_affine(self, weight: float, bias: float, diagonal: bool) -> Covariances:
        """Behind an affine layer; on the diagonal with the exact variances."""
        covariance, first, second = (weight * values + bias for values in self)
        if diagonal:
            same = jnp.eye(len(covariance), dtype=bool)
            covariance = jnp.where(same, first[:, None], covariance)
        return Covariances(covariance, first, second)


@partial(jax.jit, static_argnames=("diagonal",))
def _enter(
    x1: Array, x2: Array, weight: float, bias: float, *, diagonal: bool
) -> tuple[Covariances, Array]:
    """Behind the first affine layer, with the covariance."""
    means = (x1 @ x2.T / x1.shape[1], jnp.mean(x1**2, axis=1), jnp.mean(x2**2, axis=1))
    state = Covariances(*means).behind_affine(weight, bias, diagonal)
    return state, state.covariance


@partial(jax.jit, static_argnames=("activation", "diagonal"))
def _through(
    state: Covariances, weight: float, bias: float, *, activation: Activate, diagonal: bool
) -> tuple[Covariances, Array, Array]:
    """Behind an activation and the affine layer after it, with the covariance and E[phi' phi']."""
    covariance, slope, first, second = activation(*state)
    state = Covariances(covariance, first, second).behind_affine(weight, bias, diagonal)
    return state, state.covariance, slope


@jax.jit
def _product(first: Array, second: Array, factor: float) -> Array:
    return factor * first * second


@jax.jit
def _add_product(total: Array, first: Array, second: Array) -> Array:
    return total + first * second
