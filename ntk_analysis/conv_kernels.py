"""Infinite-width kernels of convolutional networks, layer by layer, for a block of samples.

Between two samples n and n', Theta_l = sum_{p,p'} B_l[p,p'] Q_l[p,p'] over pairs of positions:
Q_l are the covariances of the pre-activations of layer l, B_l those of the derivatives of an
output with respect to them (Karakida & Osawa 2020, Supplement E, for shared weights; Arora et al.
2019, arXiv:1904.11955). Q_l goes forward through patches (``patches.patch_means``), B_l comes back
through the transpose of that map. Where the readout sees every position, B_l is zero between
different ones, and so only p = p' is computed. Activations go through an engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ntk_analysis.empirical import Matrix
from ntk_analysis.engines import Activate
from ntk_analysis.infinite_width import ConvolutionalLimit
from ntk_analysis.patches import Patches, patch_means, spread_over_patches

_ENTRIES = 2**20  # of the largest array of a block, 8 MB
_MOST_ROWS = 256
# of the widest layer, while a block is worked out
_TEMPORARIES = 5
_SAME = 16 * 2.0**-52


def block_rows(limit: ConvolutionalLimit) -> int:
    """Samples of a block: as many as keep its arrays near the cache, one at least."""
    return max(1, min(_MOST_ROWS, math.isqrt(_ENTRIES // max(limit.covariances()))))


def block_bytes(limit: ConvolutionalLimit) -> int:
    """What a block needs while it is computed: Q_l and E[phi' phi'] of all layers, and a few."""
    sizes = limit.covariances()
    return 8 * block_rows(limit) ** 2 * (2 * sum(sizes[1:]) + _TEMPORARIES * max(sizes))


def convolutional_block(
    limit: ConvolutionalLimit, x1: Matrix, x2: Matrix, *, names: Sequence[str], diagonal: bool
) -> list[Array]:
    """The kernels of one block; on the diagonal of the whole kernel, with exact variances.

    Args:
      limit: the network.
      x1: images, shape (n1, H, W, C), float64.
      x2: images, shape (n2, H, W, C).
      names: of "tangent.1" to "tangent.L", "nngp" and "ntk".
      diagonal: whether x1 and x2 are the same.

    Returns:
      Arrays (n1, n2), as named.
    """
    weights = limit.description["weight_variances"]
    biases = limit.description["bias_variances"]
    pooled = limit.pooled
    covariance, first, second = _enter(x1, x2, pooled=pooled)
    inputs, slopes = [], []
    for patches, weight, bias in zip(limit.patches, weights, biases, strict=False):
        covariance, first, second = _convolve(
            covariance, first, second, weight, bias, diagonal, patches=patches, pooled=pooled
        )
        inputs.append(covariance)
        covariance, slope, first, second = _activate(
            covariance,
            first,
            second,
            activation=limit.activation,
            slope_of_same=limit.diagonal_derivative,
            pooled=pooled,
        )
        slopes.append(slope)
    readout = _read(covariance, weights[-1], biases[-1], pooled=pooled)
    values = {"nngp": readout, f"tangent.{limit.depth}": readout}
    total = readout
    positions = math.prod(limit.patches[-1].positions)
    derivative: Array | float = weights[-1] / positions ** (2 if pooled else 1)
    for layer in range(limit.depth - 1, 0, -1):
        derivative, tangent = _descend(
            derivative,
            slopes[layer - 1],
            inputs[layer - 1],
            weights[layer - 1],
            patches=limit.patches[layer - 1] if layer > 1 else None,
            pooled=pooled,
        )
        values[f"tangent.{layer}"] = tangent
        total = total + tangent
    values["ntk"] = total
    return [values[name] for name in names]


def _axes(pooled: bool) -> tuple[tuple[int, ...], ...]:
    """Where height and width are in covariances: (n1, H, W, n2, H, W) or (n1, n2, H, W)."""
    return ((1, 4), (2, 5)) if pooled else ((2,), (3,))


def _sum_positions(covariance: Array, pooled: bool) -> Array:
    return jnp.sum(covariance, tuple(axis for along in _axes(pooled) for axis in along))


def _outer(first: Array, second: Array, pooled: bool) -> tuple[Array, Array]:
    """Variances (n1, H, W) and (n2, H, W) in shapes that broadcast to that of covariances."""
    if pooled:
        return first[..., None, None, None], second[None, None, None]
    return first[:, None], second[None]


@partial(jax.jit, static_argnames=("pooled",))
def _enter(x1: Array, x2: Array, *, pooled: bool) -> tuple[Array, Array, Array]:
    """Covariances and variances of the pixels, means over their channels."""
    pattern = "ihwc,jyxc->ihwjyx" if pooled else "ihwc,jhwc->ijhw"
    covariance = jnp.einsum(pattern, x1, x2) / x1.shape[-1]
    return covariance, jnp.mean(x1**2, axis=-1), jnp.mean(x2**2, axis=-1)


@partial(jax.jit, static_argnames=("patches", "pooled"))
def _convolve(
    covariance: Array,
    first: Array,
    second: Array,
    weight: float,
    bias: float,
    diagonal: bool,
    *,
    patches: Patches,
    pooled: bool,
) -> tuple[Array, Array, Array]:
    """Q_l and its variances; on the diagonal of the whole kernel the first has the second."""

    def through(values: Array, axes: Sequence[tuple[int, ...]]) -> Array:
        return weight * patch_means(values, patches, axes) + bias

    covariance = through(covariance, _axes(pooled))
    first, second = (through(values, ((1,), (2,))) for values in (first, second))
    n1, n2 = len(first), len(second)
    if n1 == n2:
        variances, _ = _outer(first, second, pooled)
        if pooled:
            same = jnp.eye(first.size, dtype=bool).reshape(*first.shape, *second.shape)
        else:
            same = jnp.eye(n1, dtype=bool)[:, :, None, None]
        covariance = jnp.where(same & diagonal, variances, covariance)
    return covariance, first, second


@partial(jax.jit, static_argnames=("activation", "slope_of_same", "pooled"))
def _activate(
    covariance: Array,
    first: Array,
    second: Array,
    *,
    activation: Activate,
    slope_of_same: float | None,
    pooled: bool,
) -> tuple[Array, Array, Array, Array]:
    """Covariances behind the activation, E[phi' phi'], and both variances.

    A patch of zeros without bias has pre-activations of variance 0, for which closed forms divide
    by zero. All activations vanish at 0, so its covariances do, and no tangent passes it.
    """
    one, other = _outer(first, second, pooled)
    alive = (one > 0) & (other > 0)
    safe = [jnp.where(variance > 0, variance, 1.0) for variance in (first, second)]
    kernel = jnp.where(alive, covariance, 0.0)
    if pooled:
        # all pairs of positions count: each position is a sample of its own
        safe = [variance.reshape(-1) for variance in safe]
        kernel = kernel.reshape(len(safe[0]), len(safe[1]))
    values, slope, *variances = activation(kernel, *safe)
    values, slope = (
        jnp.where(alive, array.reshape(covariance.shape), 0.0) for array in (values, slope)
    )
    if slope_of_same is not None:
        # equal patches, such as those of a uniform background, are all on the diagonal
        product = one * other
        same = alive & (covariance > 0) & (product - covariance**2 <= _SAME * product)
        slope = jnp.where(same, slope_of_same, slope)
    after = [
        jnp.where(before > 0, variance.reshape(before.shape), 0.0)
        for before, variance in zip((first, second), variances, strict=True)
    ]
    return values, slope, after[0], after[1]


@partial(jax.jit, static_argnames=("pooled",))
def _read(covariance: Array, weight: float, bias: float, *, pooled: bool) -> Array:
    """Q_L, from what the readout sees."""
    pairs = covariance.size // (covariance.shape[0] * covariance.shape[3 if pooled else 1])
    return weight * _sum_positions(covariance, pooled) / pairs + bias


@partial(jax.jit, static_argnames=("patches", "pooled"))
def _descend(
    derivative: Array | float,
    slope: Array,
    inputs: Array,
    weight: float,
    *,
    patches: Patches | None,
    pooled: bool,
) -> tuple[Array, Array]:
    """Theta_l, and what layer l - 1 gets of B_l.

    Args:
      derivative: covariances of the derivatives with respect to what is behind the activation.
      slope: E[phi' phi'].
      inputs: Q_l.
      weight: sigma_w^2 of layer l.
      patches: of layer l; None for the first layer, below which there is nothing.
      pooled: the layout.
    """
    derivative = derivative * slope
    tangent = _sum_positions(derivative * inputs, pooled)
    if patches is None:
        return jnp.zeros(()), tangent
    return weight * spread_over_patches(derivative, patches, _axes(pooled)), tangent
