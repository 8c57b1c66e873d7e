"""Infinite-width kernels of activations that are linear on both sides of 0, in angles.

A covariance of pre-activations is r r' cos t with the standard deviations r, r' and the angle t.
phi(u) = u for u > 0, a u below, with s = (1 + a^2) / 2 and b = (1 - a)^2 / (pi (1 + a^2)) has

    E[phi phi'] = s r r' (cos t + b (sin t - t cos t)),    E[phi' phi'] = s (1 - b t)

(Cho & Saul 2009). The slope is as sure as t, which a cosine near 1 gives to half of the digits
only. So what goes from layer to layer is the complement 1 - cos t, which is exactly 0 between equal
and between parallel inputs, and is off by eps t elsewhere.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_NEAR = 1e-3
"""A complement below which the difference of unit vectors is taken, not their product.

The product is off by a few eps, and t then by a few eps / t: below 1e-14.
"""


class Angles(NamedTuple):
    """Covariances of pre-activations between two sets of samples.

    Attributes:
      first: standard deviations, shape (n1,).
      second: shape (n2,).
      complement: 1 - cos t, shape (n1, n2).
    """

    first: Array
    second: Array
    complement: Array

    @property
    def covariance(self) -> Array:
        """r r' cos t, shape (n1, n2)."""
        return self.first[:, None] * self.second * (1 - self.complement)


@partial(jax.jit, static_argnames=("diagonal",))
def angles_of_inputs(
    x1: Array, x2: Array, weight: float, bias: float, *, diagonal: bool
) -> tuple[Angles, Array]:
    """Behind the first affine layer, with the covariance.

    Args:
      x1: inputs, shape (n1, M_0).
      x2: inputs, shape (n2, M_0).
      weight: sigma_w^2 of the layer.
      bias: sigma_b^2.
      diagonal: whether x1 and x2 are the same.
    """

    def split(x: Array) -> tuple[Array, Array]:
        rows = jnp.pad(
            x * jnp.sqrt(weight / x.shape[1]), ((0, 0), (0, 1)), constant_values=jnp.sqrt(bias)
        )
        norms = jnp.linalg.norm(rows, axis=1)
        return norms, rows / norms[:, None]

    (first, units), (second, others) = split(x1), split(x2)
    rough = 1 - units @ others.T
    own = jnp.eye(len(units), len(others), dtype=bool) & diagonal

    def refined(unit: Array, row: Array, near: Array) -> Array:
        return jnp.where(near, jnp.sum((unit - others) ** 2, axis=1) / 2, row)

    def refine(at: tuple[Array, Array, Array]) -> Array:
        return jax.lax.cond(jnp.any(at[2]), refined, lambda _, row, __: row, *at)

    complement = jax.lax.map(refine, (units, rough, (rough < _NEAR) & ~own))
    angles = Angles(first, second, jnp.where(own, 0.0, complement))
    return angles, angles.covariance


@partial(jax.jit, static_argnames=("negative_slope",))
def through_activation(
    angles: Angles, weight: float, bias: float, *, negative_slope: float
) -> tuple[Angles, Array, Array]:
    """Behind an activation and the affine layer after it, with the covariance and E[phi' phi'].

    Args:
      angles: before the activation.
      weight: sigma_w^2 of the affine layer.
      bias: sigma_b^2.
      negative_slope: a.
    """
    half = (1 + negative_slope**2) / 2
    complement, slope = bent(angles.complement, negative_slope)
    v1, v2 = (jnp.sqrt(weight * half) * r for r in (angles.first, angles.second))
    first, second = (jnp.sqrt(v**2 + bias) for v in (v1, v2))
    left, right = v1[:, None], v2[None]
    product, scale = left * right, first[:, None] * second
    # what differs in the norms turns against the biases: r r' - (v v' + bias), without cancellation
    turned = bias * (left - right) ** 2 / (scale + product + bias)
    after = Angles(first, second, (product * complement + turned) / scale)
    return after, after.covariance, slope


def bent(complement: Array, negative_slope: float) -> tuple[Array, Array]:
    """Of an activation that is linear on both sides of 0, by the angle between pre-activations.

    Args:
      complement: 1 - cos t.
      negative_slope: a.

    Returns:
      1 - E[phi phi'] / (s r r'), the complement behind the activation, and E[phi' phi'].
    """
    half = (1 + negative_slope**2) / 2
    bend = (1 - negative_slope) ** 2 / (2 * half * math.pi)
    complement = jnp.clip(complement, 0, 2)
    low, high = jnp.sqrt(complement), jnp.sqrt(2 - complement)
    angle = 2 * jnp.atan2(low, high)
    slope = half * (1 - bend * angle)
    return complement - bend * (low * high - angle * (1 - complement)), slope
