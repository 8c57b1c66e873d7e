"""Counts with a Poisson distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import gammaln

from natgrad_flax.losses.base import DiagonalLoss, IntegerTargets


@dataclass(frozen=True)
class Poisson(DiagonalLoss):
    """The sum over outputs of exp(f) - y f + log y!, for counts y: f is the log of their rate.

    It is the likelihood of y_c ~ Poisson(exp f_c): r = exp(f) - y and H = diag(exp f). Targets have
    the shape (N, C) of the outputs, of any dtype.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss, counts = ng.Poisson(), jnp.array([[0.0], [1.0], [4.0]])
      >>> rates = jnp.full((3, 1), 2.0)
      >>> loss.residual(jnp.log(rates), counts).round(3).tolist()
      [[2.0], [1.0], [-2.0]]
    """

    integer_targets: ClassVar[IntegerTargets] = "values"

    def values(self, outputs: Array, targets: Array) -> Array:
        """l of every sample, shape (N,)."""
        terms = jnp.exp(outputs) - targets * outputs + gammaln(targets + 1)
        return jnp.sum(terms, axis=1)

    def residual(self, outputs: Array, targets: Array) -> Array:
        """exp(f) - y, shape (N, C)."""
        return jnp.exp(outputs) - targets

    def curvature(self, outputs: Array) -> Array:
        """exp(f), shape (N, C)."""
        return jnp.exp(outputs)

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """exp(f) - y over sqrt(num_samples) with drawn counts y, shape (N, C, num_samples)."""
        # JAX draws counts by keys of this kind alone
        seed = jax.random.bits(key, (2,), jnp.uint32)
        own = jax.random.wrap_key_data(seed, impl="threefry2x32")
        rate = jnp.exp(outputs)[:, :, None]
        shape = (*outputs.shape, num_samples)
        drawn = jax.random.poisson(own, jnp.broadcast_to(rate, shape)).astype(outputs.dtype)
        return (rate - drawn) / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Raises ValueError on negative targets."""
        if targets.min() < 0:
            raise ValueError(
                f"targets of Poisson must be counts, 0 or more; found {targets.min():g}"
            )
