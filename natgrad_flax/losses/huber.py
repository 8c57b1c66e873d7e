"""A robust regression loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.scalars import check_number, keep_plain
from natgrad_flax.losses.base import DiagonalLoss, drawn


@dataclass(frozen=True)
class Huber(DiagonalLoss):
    """The sum over outputs of e^2 / 2 for |e| <= delta, else delta |e| - delta^2 / 2, e = f - y.

    It is the likelihood of Huber's least favourable distribution (Huber 1964), which is normal in
    the middle and exponential in its tails: r = e, clipped to [-delta, delta]. The Fisher
    information of its place is the same for all outputs, H = kappa I with kappa the probability of
    |e| <= delta, which is also the mean of the Hessian. So a far target changes neither the Fisher
    nor the step of another sample, and H is never singular.

    Args:
      delta: where the quadratic becomes linear, positive.

    Raises:
      ValueError: delta is not positive and finite.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss, f = ng.Huber(delta=1.0), jnp.array([[0.5], [100.0]])
      >>> loss.values(f, jnp.zeros((2, 1))).tolist()
      [0.125, 99.5]
      >>> loss.residual(f, jnp.zeros((2, 1))).tolist()
      [[0.5], [1.0]]
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, positive=True)
        keep_plain(self)

    @property
    def information(self) -> float:
        """kappa."""
        middle = math.sqrt(2 * math.pi) * math.erf(self.delta / math.sqrt(2))
        return middle / (middle + 2 * math.exp(-(self.delta**2) / 2) / self.delta)

    def values(self, outputs: Array, targets: Array) -> Array:
        """l of every sample, shape (N,)."""
        size = jnp.abs(outputs - targets)
        inner = jnp.minimum(size, self.delta)
        return jnp.sum(inner * (size - inner / 2), axis=1)

    def residual(self, outputs: Array, targets: Array) -> Array:
        """f - y, clipped, shape (N, C)."""
        return jnp.clip(outputs - targets, -self.delta, self.delta)

    def curvature(self, outputs: Array) -> Array:
        """kappa for every output, shape (N, C)."""
        return jnp.full_like(outputs, self.information)

    def columns_in_range(self, outputs: Array) -> Array | None:
        """All."""
        return None

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Clipped draws of e over sqrt(num_samples), shape (N, C, num_samples)."""
        shape = (*outputs.shape, num_samples)
        where, inside, side = jax.random.split(key, 3)
        between = partial(jax.random.truncated_normal, lower=-self.delta, upper=self.delta)
        normal = drawn(lambda k, n: between(k, shape=n, dtype=outputs.dtype), inside, shape)
        tail = self.delta * drawn(jax.random.rademacher, side, shape, outputs.dtype)
        middle = drawn(jax.random.uniform, where, shape) < self.information
        return jnp.where(middle, normal, tail) / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Any finite targets are fine."""
