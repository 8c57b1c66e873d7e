"""Diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.operators.base import OfLayer
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, ravel
from natgrad_flax.signals.gradient import Gradient


@dataclass(frozen=True)
class Entries(OfLayer):
    """A diagonal of one layer.

    Attributes:
      layer: the signals.
      entries: the diagonal, in the shapes of the parameters.
    """

    layer: LayerSignals
    entries: LayerUpdate

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """The gradient over the diagonal; 0 where an entry of the undamped diagonal is 0."""
        (g,) = gradient.vector((self.layer,))
        return (jax.tree.map(lambda a, entry: divide(a, entry + damping), g, self.entries),)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        return (jax.tree.map(jnp.multiply, vector[0], self.entries),)

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """The entries."""
        return (self.entries,)

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(self.eigenvalues())

    def eigenvalues(self) -> Array:
        """The entries."""
        return ravel((self.entries,))

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.sample``."""
        flat = self.eigenvalues()
        draw = jnp.sqrt(flat + damping) * jax.random.normal(key, flat.shape, flat.dtype)
        return (self.layer.unravel(draw),)

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """See ``Operator.to_dense``."""
        return jnp.diag(self.eigenvalues() + damping)


def divide(value: Array, by: Array) -> Array:
    """value / by, and 0 where by is 0: the pseudo-inverse of a diagonal."""
    return jnp.where(by != 0, value / jnp.where(by != 0, by, 1), 0)
