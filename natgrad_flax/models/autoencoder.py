"""Autoencoders of layers in NTK parametrisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.models.activations import get_activation
from natgrad_flax.models.mlp import MLP
from natgrad_flax.models.sizes import size_tuple


class Autoencoder(nnx.Module):
    """A deep symmetric autoencoder in NTK parametrisation: two ``MLP`` around a code.

    The activation follows every layer but the code and the output, as in Hinton & Salakhutdinov
    (2006); with ``linear_code=False`` it follows the code, too. The default widths are those of
    Bernacchia et al. (2018), Fig. 1D, whose code is not linear.

    Attributes:
      widths: (M_0, ..., M_L).
      encoder, decoder: ``MLP``, from M_0 to the code and from the code to M_L.
      activation, linear_code: as given.

    Args:
      widths: (M_0, ..., M_L) with M_l = M_{L-l}; an odd number of entries, three at least, the
        middle one the size of the code.
      activation: "relu", "tanh", "erf", "gelu", "leaky_relu" or "identity".
      linear_code: whether the code is without an activation.
      weight_variance: sigma_w^2.
      bias_variance: sigma_b^2; 0 means no bias parameters.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the same seed gives the same parameters.

    Raises:
      ValueError: widths that are not symmetric around a code or not positive, an unknown
        activation or a variance out of range.
      TypeError: ``linear_code`` is not a bool.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.Autoencoder((8, 4, 2, 4, 8), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((5, 8))
      >>> model.encoder(x).shape, model(x).shape
      ((5, 2), (5, 8))
    """

    def __init__(
        self,
        widths: Sequence[int] = (784, 400, 200, 100, 50, 100, 200, 400, 784),
        *,
        activation: str = "tanh",
        linear_code: bool = True,
        weight_variance: float = 1.0,
        bias_variance: float = 0.1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        what = "positive integers, symmetric around the code: an odd number of them, three at least"
        self.widths = size_tuple("widths", widths, what, minimum=3)
        if len(self.widths) % 2 == 0 or self.widths[::-1] != self.widths:
            raise ValueError(f"widths must be {what}, got {self.widths}")
        if not isinstance(linear_code, bool):
            raise TypeError(f"linear_code must be True or False, got {linear_code!r}")
        self.activation = activation
        self.linear_code = linear_code
        middle = len(self.widths) // 2
        self.encoder, self.decoder = (
            MLP(
                half,
                activation=activation,
                weight_variance=weight_variance,
                bias_variance=bias_variance,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for half in (self.widths[: middle + 1], self.widths[middle:])
        )

    def encode(self, x: Array) -> Array:
        """Maps inputs of shape (..., M_0) to codes (..., M_{L/2})."""
        code = self.encoder(x)
        return code if self.linear_code else get_activation(self.activation).function(code)

    def decode(self, code: Array) -> Array:
        """Maps codes of shape (..., M_{L/2}) to reconstructions (..., M_L)."""
        return self.decoder(code)

    def __call__(self, x: Array) -> Array:
        """Maps inputs of shape (..., M_0) to reconstructions (..., M_L)."""
        return self.decode(self.encode(x))
