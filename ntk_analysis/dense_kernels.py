"""Infinite-width kernels of fully connected networks, layer by layer, for a block of samples.

Theta_l = B_l Q_l entry by entry (Karakida & Osawa 2020, Section 2 and Supplement E): Q_l is the
limit of the Gram matrix of the scaled inputs a_{l-1}, B_l that of the derivatives D_l. One pass
through the network gives all of them: each activation is run with a tangent kernel of ones, which
comes out as E[phi' phi'], and B_l is a running product of those from the last layer down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ntk_analysis.empirical import Matrix
from ntk_analysis.twin import InfiniteWidthTwin


def dense_block(
    twin: InfiniteWidthTwin, x1: Matrix, x2: Matrix, *, names: Sequence[str], diagonal: bool
) -> list[Array]:
    """The kernels of one block; on the diagonal of the whole kernel, with exact variances.

    Args:
      twin: the network.
      x1: inputs, shape (n1, M_0), float64.
      x2: inputs, shape (n2, M_0).
      names: of "tangent.l", "inputs.l" and "derivatives.l" with l = 1..L, "nngp" and "ntk".
      diagonal: whether x1 and x2 are the same.

    Returns:
      Arrays (n1, n2), as named.

    One compiled program a step, and not one for all layers: in that one XLA would work out every
    layer anew for each array that is returned, so the cost would grow with the depth squared.
    """
    kernel = _enter(x1, x2, affine=twin.affine[0], diagonal=diagonal)
    inputs, slopes = [kernel.nngp], []
    for activation, affine in zip(twin.activations, twin.affine[1:], strict=True):
        kernel, slope = _through(
            kernel,
            activation=activation,
            affine=affine,
            slope_on_diagonal=twin.diagonal_derivative,
            diagonal=diagonal,
        )
        slopes.append(slope)
        inputs.append(kernel.nngp)
    values = {"nngp": inputs[-1]}
    values.update({f"inputs.{layer}": array for layer, array in enumerate(inputs, 1)})
    variances = twin.description["weight_variances"]
    derivative, total = jnp.ones_like(inputs[-1]), jnp.zeros_like(inputs[-1])
    for layer in range(twin.depth, 0, -1):
        values[f"derivatives.{layer}"] = derivative
        if f"tangent.{layer}" in names:
            values[f"tangent.{layer}"] = _product(inputs[layer - 1], derivative, 1.0)
        if "ntk" in names:
            total = _add_product(total, inputs[layer - 1], derivative)
        if layer > 1:
            derivative = _product(slopes[layer - 2], derivative, variances[layer - 1])
    values["ntk"] = total
    return [values[name] for name in names]


@partial(jax.jit, static_argnames=("affine", "diagonal"))
def _enter(x1: Array, x2: Array, *, affine: Any, diagonal: bool) -> Any:
    """The kernel behind the first affine layer."""
    kernel = affine(x1, x2, None)
    if diagonal:
        kernel = kernel.replace(nngp=_on_diagonal(kernel.nngp, kernel.cov1))
    return kernel.replace(ntk=None)


@partial(jax.jit, static_argnames=("activation", "affine", "slope_on_diagonal", "diagonal"))
def _through(
    kernel: Any, *, activation: Any, affine: Any, slope_on_diagonal: float | None, diagonal: bool
) -> tuple[Any, Array]:
    """The kernel behind an activation and the affine layer after it, and E[phi' phi']."""
    kernel = activation(kernel.replace(ntk=jnp.ones_like(kernel.nngp)))
    slope = kernel.ntk
    kernel = affine(kernel.replace(ntk=None))
    if diagonal:
        kernel = kernel.replace(nngp=_on_diagonal(kernel.nngp, kernel.cov1))
        if slope_on_diagonal is not None:
            slope = _on_diagonal(slope, slope_on_diagonal)
    return kernel, slope


def _on_diagonal(values: Array, diagonal: Array | float) -> Array:
    return jnp.where(jnp.eye(len(values), dtype=bool), diagonal, values)


@jax.jit
def _product(first: Array, second: Array, factor: float) -> Array:
    return factor * first * second


@jax.jit
def _add_product(total: Array, first: Array, second: Array) -> Array:
    return total + first * second
