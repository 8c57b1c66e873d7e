"""Fully connected networks of layers in NTK parametrisation, or another one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.models.activations import get_activation
from natgrad_flax.models.layers import Dense
from natgrad_flax.models.parametrization import init_powers
from natgrad_flax.models.sizes import check_variances, size_tuple


class MLP(nnx.Module):
    """A fully connected network in NTK parametrisation (Karakida & Osawa 2020, Eq. 1).

    The activation is applied after every layer but the last: f = u_L.

    Args:
      widths: (M_0, ..., M_L): inputs, hidden layers, outputs; two entries at least.
      activation: "relu", "tanh", "erf", "gelu", "leaky_relu" or "identity".
      weight_variance: sigma_w^2.
      bias_variance: sigma_b^2; 0 means no bias parameters.
      parametrization: "ntk"; "standard", weights drawn from N(0, sigma_w^2 / fan_in) and no factor
        in front; or "mup", in which the last are drawn from N(0, sigma_w^2 / fan_in^2) (Ishikawa &
        Karakida 2024); rates that go with it are those of ``ng.scale_by_width``.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the same seed gives the same parameters.

    Raises:
      ValueError: fewer than two widths, a width below 1, an unknown activation or
        parametrisation, or a variance out of range.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP(
      ...     (4, 8, 8, 1), activation="tanh", bias_variance=0.1, rngs=nnx.Rngs(0)
      ... )
      >>> model(jnp.ones((5, 4))).shape
      (5, 1)
      >>> [layer.kernel.shape for layer in model.layers]
      [(4, 8), (8, 8), (8, 1)]
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: str = "relu",
        weight_variance: float = 2.0,
        bias_variance: float = 0.0,
        parametrization: str = "ntk",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        what = "at least two positive integers (inputs, hidden layers, outputs)"
        self.widths = size_tuple("widths", tuple(widths), what, minimum=2)
        get_activation(activation)
        check_variances(weight_variance, bias_variance)
        self.activation = activation
        self.weight_variance = float(weight_variance)
        self.bias_variance = float(bias_variance)
        self.parametrization = parametrization
        sizes = list(itertools.pairwise(self.widths))
        self.layers = nnx.List(
            Dense(
                fan_in,
                fan_out,
                weight_variance=weight_variance,
                bias_variance=bias_variance,
                init_power=power,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for (fan_in, fan_out), power in zip(
                sizes, init_powers(parametrization, len(sizes)), strict=True
            )
        )

    @property
    def depth(self) -> int:
        """The number of layers L."""
        return len(self.layers)

    def __call__(self, x: Array) -> Array:
        """Maps inputs of shape (..., M_0) to outputs (..., M_L)."""
        return self.pre_activations(x)[-1]

    def pre_activations(self, x: Array) -> list[Array]:
        """u_1, ..., u_L of inputs (..., M_0), each of shape (..., M_l)."""
        phi = get_activation(self.activation).function
        found = [self.layers[0](x)]
        for layer in self.layers[1:]:
            found.append(layer(phi(found[-1])))
        return found
