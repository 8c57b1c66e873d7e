"""Random maps, metrics and objectives for the theorems, and the one case that is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax import geometry
from natgrad_flax.geometry import Map, Metric, Objective, Representation

DRAWS = 8
"""Random instances of each claim; the worst of them counts."""


@dataclass(frozen=True)
class Case:
    """A parametrisation with a curved image and curved fibres, a metric and an objective.

    Attributes:
      phi: from d parameters to D numbers, of rank r around xi.
      metric: of the ambient space, different at every point.
      objective: of points.
      change: a diffeomorphism of the parameters.
      xi: parameters (d,).
      free: a random (d, d) matrix.
    """

    phi: Map
    metric: Metric
    objective: Objective
    change: Map
    xi: Array
    free: Array

    def psi(self, theta: Array) -> Array:
        """phi o f."""
        return self.phi(self.change(theta))

    @property
    def natural(self) -> Representation:
        """The natural parameter gradient with the Moore-Penrose inverse."""
        return lambda phi, xi: geometry.natural_parameter_gradient(
            phi, self.objective, xi, self.metric
        )

    @property
    def ambient(self) -> Array:
        """The gradient of the ambient space at phi(xi)."""
        return geometry.ambient_gradient(self.objective, self.phi(self.xi), self.metric)


def draw(seed: int, params: int, ambient: int, rank: int, flat: bool = False) -> Case:
    """A random case; all functions are smooth and of order one, and fibres curved or flat."""
    rng = np.random.default_rng(seed)
    first = jnp.asarray(rng.standard_normal((rank, params)) / 2)
    second = jnp.asarray(rng.standard_normal((ambient, rank)))
    root = jnp.asarray(rng.standard_normal((ambient, ambient)))
    weight = jnp.asarray(rng.standard_normal(ambient))
    mix = jnp.asarray(rng.standard_normal((params, params)) + 3 * np.eye(params))
    xi, free = rng.standard_normal(params) / 4, rng.standard_normal((params, params))
    bend = jnp.asarray(rng.standard_normal((rank, params))) * (not flat)
    return Case(
        phi=lambda xi: second @ jnp.sin(first @ xi + jnp.cos(bend @ xi) / 4),
        metric=lambda z: root @ root.T + (1 + z @ z) * jnp.eye(ambient),
        objective=lambda z: weight @ z + jnp.sum(jnp.cos(z)),
        change=lambda theta: mix @ theta + jnp.tanh(theta) / 5,
        xi=jnp.asarray(xi),
        free=jnp.asarray(free),
    )


def worst(measure: Callable[[Case], float], params: int, ambient: int, rank: int) -> float:
    """The largest value of a measure over the draws."""
    return max(measure(draw(seed, params, ambient, rank)) for seed in range(DRAWS))


def smallest(measure: Callable[[Case], float], params: int, ambient: int, rank: int) -> float:
    """The smallest value of a measure over the draws."""
    return min(measure(draw(seed, params, ambient, rank)) for seed in range(DRAWS))


def drawn() -> Case:
    """Two parameters and a curve in the plane, for Figures 1, 2 and 6."""

    def phi(xi: Array) -> Array:
        along = xi[0] + xi[1] ** 2 / 3
        return jnp.stack([along, jnp.sin(1.5 * along) / 1.5])

    return Case(
        phi=phi,
        metric=geometry.euclidean,
        objective=lambda z: jnp.sum((z - jnp.asarray([-0.2, -1.2])) ** 2) / 2,
        change=lambda theta: jnp.stack([theta[0] + jnp.sin(theta[1]) / 2, theta[1] + theta[0] / 2]),
        xi=jnp.asarray([-0.1, 0.7]),
        free=jnp.eye(2),
    )


def picture() -> dict[str, Any]:
    """The spaces of ``drawn``: where every parameter goes on the curve, and all the gradients."""
    case = drawn()
    theta, xi = case.xi, case.change(case.xi)
    marks, along = jnp.linspace(-2, 2, 33), jnp.linspace(-2, 2, 121)
    mesh = jnp.stack(jnp.meshgrid(marks, marks), axis=-1).reshape(-1, 2)
    here, there = case.natural(case.phi, xi), case.natural(case.psi, theta)

    def places(points: Array) -> Any:
        return np.asarray(points).round(3).reshape(33, 33)

    return {
        "reach": 2.0,
        "theta": {
            "place": places(jax.vmap(case.psi)(mesh)[:, 0]),
            "point": theta,
            "vectors": {"y_Theta": there},
        },
        "xi": {
            "place": places(jax.vmap(case.phi)(mesh)[:, 0]),
            "point": xi,
            "vectors": {
                "y_Xi": here, "df y_Theta": geometry.push_forward(case.change, theta, there),
            },
        },
        "model": {
            "curve": np.asarray(jax.vmap(case.phi)(jnp.stack([along, 0 * along], 1))).round(4),
            "objective": places(jax.vmap(case.objective)(mesh)),
            "point": case.phi(xi),
            "vectors": {
                "gradient": geometry.ambient_gradient(case.objective, case.phi(xi)),
                "natural": geometry.push_forward(case.phi, xi, here),
            },
        },
    }  # fmt: skip
