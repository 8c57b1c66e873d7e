"""The mean squared error."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.losses.base import Loss, drawn


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """The mean squared error 1/(2N) sum_n |y_n - f_n|^2 (Karakida & Osawa 2020, Eq. 3).

    It is the likelihood of y ~ N(f, I), so H = I.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss = ng.MeanSquaredError()
      >>> f, y = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.zeros((2, 2))
      >>> float(loss(f, y))  # (1 + 4) / (2 N)
      1.25
      >>> loss.residual(f, y).tolist()
      [[1.0, 2.0], [0.0, 0.0]]
    """

    def values(self, outputs: Array, targets: Array) -> Array:
        """|y - f|^2 / 2 of every sample, shape (N,)."""
        return jnp.sum((outputs - targets) ** 2, axis=1) / 2

    def mean(self, outputs: Array, targets: Array) -> Array:
        """The loss, a scalar."""
        return jnp.sum((outputs - targets) ** 2) / (2 * outputs.shape[0])

    def residual(self, outputs: Array, targets: Array) -> Array:
        """f - y, shape (N, C)."""
        return outputs - targets

    def fisher(self, outputs: Array) -> Array:
        """The identity for every sample, shape (N, C, C)."""
        n, c = outputs.shape
        return jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype), (n, c, c))

    def factor(self, outputs: Array) -> Array:
        """The identity for every sample, shape (N, C, C)."""
        return self.fisher(outputs)

    def fisher_product(self, outputs: Array, vectors: Array, targets: Array | None = None) -> Array:
        """The vectors themselves."""
        return vectors

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """f - y, shape (N, C)."""
        return self.residual(outputs, targets)

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Standard normal draws over sqrt(num_samples), shape (N, C, num_samples)."""
        noise = drawn(jax.random.normal, key, (*outputs.shape, num_samples), outputs.dtype)
        return noise / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Any finite targets are fine."""
