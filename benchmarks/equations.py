"""Networks that solve linear partial differential equations by their residuals (PINNs)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


def tanh_network(sizes: Sequence[int], rngs: nnx.Rngs) -> nnx.Sequential:
    """Stock affine layers with tanh between, in the default precision.

    Args:
      sizes: inputs, hidden layers, outputs.
      rngs: draws the weights.
    """
    layers: list[Any] = []
    for fan_in, units in itertools.pairwise(sizes):
        kind: dict[str, Any] = {"param_dtype": jnp.result_type(float), "rngs": rngs}
        layers += [nnx.Linear(fan_in, units, **kind), jnp.tanh]
    return nnx.Sequential(*layers[:-1])


def derivatives(network: Any, x: Array) -> tuple[Array, Array]:
    """First and second derivatives of a network along each axis.

    They are forward-mode, so the layers of the network have a formula, with the directions as
    positions that share weights (``ng.describe`` shows them).

    Args:
      network: from (N, d) to (N, 1).
      x: points (N, d).

    Returns:
      du/dx_i and d^2u/dx_i^2, (d, N, 1) each.
    """

    def along(direction: Array) -> tuple[Array, Array]:
        directions = jnp.broadcast_to(direction, x.shape)

        def first(x: Array) -> Array:
            return jax.jvp(network, (x,), (directions,))[1]

        return jax.jvp(first, (x,), (directions,))

    found: tuple[Array, Array] = jax.vmap(along)(jnp.eye(x.shape[1], dtype=x.dtype))
    return found


INSIDE, BOUNDARY, VALUE = 0, 1, 2
"""What a row asks of a network: the equation, its weighted value, its value."""


class Residuals(nnx.Module):
    """What a network leaves of b . grad u - sum_i a_i d^2u/dx_i^2 inside, of values on a boundary.

    Args:
      sizes: of the network, from d to 1.
      first: b, d numbers.
      second: a, d numbers.
      boundary_weight: of a row on the boundary in the loss, that of one inside being 1.
      rngs: draws the weights.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        first: Sequence[float],
        second: Sequence[float],
        boundary_weight: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.network = tanh_network(sizes, rngs)
        self.first, self.second = tuple(first), tuple(second)
        self.factor = float(np.sqrt(boundary_weight))

    def __call__(self, rows: Array) -> Array:
        """Maps rows (N, d + 1), a point and what is asked of it, to (N, 1)."""
        x, kind = rows[:, :-1], rows[:, -1:]
        slopes, curvatures = derivatives(self.network, x)
        left = jnp.tensordot(jnp.asarray(self.first, x.dtype), slopes, 1)
        left -= jnp.tensordot(jnp.asarray(self.second, x.dtype), curvatures, 1)
        value = self.network(x)
        scaled = jnp.where(kind == BOUNDARY, self.factor * value, value)
        return jnp.where(kind == INSIDE, left, scaled)
