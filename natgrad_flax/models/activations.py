"""Activation functions by name, with the constant that unit-wise theory needs."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Activation(NamedTuple):
    """An element-wise activation.

    Attributes:
      function: phi, applied to every entry.
      active_fraction: gamma = P(phi'(u) != 0) for a centred Gaussian u; it sets the isotropy
        constant of the unit-wise Fisher (Karakida & Osawa 2020, Theorem 5.1).
    """

    function: Callable[[Array], Array]
    active_fraction: float


def _exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _identity(x: Array) -> Array:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(jax.nn.relu, 0.5),
    "tanh": Activation(jnp.tanh, 1.0),
    "erf": Activation(jax.scipy.special.erf, 1.0),
    "gelu": Activation(_exact_gelu, 1.0),
    "leaky_relu": Activation(jax.nn.leaky_relu, 1.0),
    "identity": Activation(_identity, 1.0),
}


def active_fraction(model: object) -> float | None:
    """gamma of a model that names its activation as these functions are named, None of others."""
    name = getattr(model, "activation", None)
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name].active_fraction
    return None


def get_activation(name: str) -> Activation:
    """Looks an activation up by name.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}.{hint}")
    return ACTIVATIONS[name]
