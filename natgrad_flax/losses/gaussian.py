"""A normal distribution whose mean and variance are both predicted."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.losses.base import DiagonalLoss, drawn


@dataclass(frozen=True)
class GaussianNegativeLogLikelihood(DiagonalLoss):
    """The sum over targets of (log v + (y - m)^2 / v) / 2, for y ~ N(m, v).

    The 2 D outputs are the D means m, then the D logarithms s of the variances v = exp(s); targets
    have the shape (N, D). With z = (y - m) / sqrt(v): r = (-z / sqrt(v), (1 - z^2) / 2) and
    H = diag(1 / v, 1/2), the Fisher information of the normal distribution in (m, log v).

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss = ng.GaussianNegativeLogLikelihood()
      >>> means, variances = jnp.array([[0.0], [1.0]]), jnp.array([[4.0], [4.0]])
      >>> f = jnp.concatenate([means, jnp.log(variances)], axis=1)
      >>> y = jnp.array([[2.0], [3.0]])
      >>> bool(jnp.isclose(loss(f, y), (jnp.log(4.0) + 1) / 2))
      True
      >>> print(loss.fisher(f)[0].round(3))  # diag(1 / v, 1 / 2)
      [[0.25 0.  ]
       [0.   0.5 ]]
    """

    def values(self, outputs: Array, targets: Array) -> Array:
        """l of every sample without its constant, shape (N,)."""
        z, log_variance = _standardised(outputs, targets)
        return jnp.sum(log_variance + z**2, axis=1) / 2

    def residual(self, outputs: Array, targets: Array) -> Array:
        """(-z / sqrt(v), (1 - z^2) / 2), shape (N, 2 D)."""
        return _residual(*_standardised(outputs, targets))

    def curvature(self, outputs: Array) -> Array:
        """(1 / v, 1/2), shape (N, 2 D)."""
        _, log_variance = jnp.split(outputs, 2, axis=1)
        return jnp.concatenate([jnp.exp(-log_variance), jnp.full_like(log_variance, 0.5)], axis=1)

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Residuals of drawn targets over sqrt(num_samples), shape (N, 2 D, num_samples)."""
        _, log_variance = jnp.split(outputs, 2, axis=1)
        z = drawn(jax.random.normal, key, (*log_variance.shape, num_samples), outputs.dtype)
        return _residual(z, log_variance[:, :, None]) / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Any finite targets are fine."""

    def target_shape(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        """(N, ..., D) for outputs (N, ..., 2 D).

        Raises:
          ValueError: an odd number of outputs.
        """
        if outputs[-1] % 2:
            raise ValueError(
                "GaussianNegativeLogLikelihood needs an even number of outputs, the means and then "
                f"the logarithms of the variances; the model returns {outputs}"
            )
        return *outputs[:-1], outputs[-1] // 2


def _standardised(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """(y - m) / sqrt(v) and log v, both (N, D)."""
    mean, log_variance = jnp.split(outputs, 2, axis=1)
    return (targets - mean) * jnp.exp(-log_variance / 2), log_variance


def _residual(z: Array, log_variance: Array) -> Array:
    """The derivatives by the means, then by log v."""
    return jnp.concatenate([-z * jnp.exp(-log_variance / 2), (1 - z * z) / 2], axis=1)
