"""Sigmoid cross-entropy: one yes-or-no question, or several, a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.losses.base import DiagonalLoss, IntegerTargets, drawn


@dataclass(frozen=True)
class SigmoidCrossEntropy(DiagonalLoss):
    """The sum over outputs of log(1 + exp f) - y f, for y in [0, 1]: independent yes-or-no labels.

    It is the likelihood of y_c ~ Bernoulli(p_c), p = sigmoid(f): r = p - y and
    H = diag(p (1 - p)). Targets have the shape (N, C) of the outputs, of any dtype.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss, f = ng.SigmoidCrossEntropy(), jnp.zeros((2, 3))
      >>> y = jnp.array([[1, 0, 1], [0, 0, 1]])
      >>> bool(jnp.isclose(loss(f, y), 3 * jnp.log(2)))
      True
      >>> loss.residual(f, y).tolist()
      [[-0.5, 0.5, -0.5], [0.5, 0.5, -0.5]]
    """

    integer_targets: ClassVar[IntegerTargets] = "values"

    def values(self, outputs: Array, targets: Array) -> Array:
        """l of every sample, shape (N,)."""
        # (1 - y) softplus(f) + y softplus(-f) has no difference of near numbers
        yes, no = jax.nn.softplus(-outputs), jax.nn.softplus(outputs)
        return jnp.sum(targets * yes + (1 - targets) * no, axis=1)

    def residual(self, outputs: Array, targets: Array) -> Array:
        """p - y as (1 - y) p - y (1 - p), which does not cancel, shape (N, C)."""
        p, rest = jax.nn.sigmoid(outputs), jax.nn.sigmoid(-outputs)
        return (1 - targets) * p - targets * rest

    def curvature(self, outputs: Array) -> Array:
        """p (1 - p), shape (N, C)."""
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """p - y over sqrt(num_samples) with y drawn from p, shape (N, C, num_samples)."""
        shape = (*outputs.shape, num_samples)
        p = jax.nn.sigmoid(outputs)[:, :, None]
        targets = drawn(jax.random.uniform, key, shape, outputs.dtype) < p  # Bernoulli
        return self.residual(outputs[:, :, None], targets.astype(p.dtype)) / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Raises ValueError on targets outside of [0, 1]."""
        if targets.min() < 0 or targets.max() > 1:
            raise ValueError(
                "targets of sigmoid cross-entropy must lie between 0 and 1, one for each output; "
                f"found {targets.min():g} to {targets.max():g}"
            )
