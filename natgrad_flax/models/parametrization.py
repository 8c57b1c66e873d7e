"""How weights are scaled: by a factor in front (NTK), or by what they are drawn from."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.scalars import as_number, shown
from natgrad_flax.models.sizes import check_choice

PARAMETRIZATIONS = ("ntk", "standard", "mup")
"""Of whole networks."""


def init_powers(parametrization: str, depth: int) -> tuple[float | None, ...]:
    """``init_power`` of each layer of a network.

    Args:
      parametrization: "ntk"; "standard", b = 1/2 everywhere; or "mup", b = 1 in the last layer
        (Ishikawa & Karakida 2024, b of K-FAC).
      depth: L.

    Raises:
      ValueError: an unknown word.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization == "ntk":
        return (None,) * depth
    return (0.5,) * (depth - 1) + ((1.0,) if parametrization == "mup" else (0.5,))


class ScaledLayer(nnx.Module):
    """What layers with scaled weights have in common.

    Attributes:
      weight_variance, bias_variance: sigma_w^2 and sigma_b^2.
      init_power: b where W is drawn from N(0, sigma_w^2 fan_in^{-2b}) and the bias from
        N(0, sigma_b^2), without factors; None in NTK parametrisation.
      kernel: W.
      bias: b, or None.
    """

    weight_variance: float
    bias_variance: float
    init_power: float | None
    kernel: nnx.Param[Array]
    bias: nnx.Param[Array] | None

    @property
    def fan_in(self) -> int:
        """The number of inputs of a unit."""
        raise NotImplementedError

    @property
    def weight_scale(self) -> float:
        """The factor in front of the weights: sigma_w / sqrt(fan_in), or 1."""
        if self.init_power is not None:
            return 1.0
        return math.sqrt(self.weight_variance / self.fan_in)

    @property
    def bias_scale(self) -> float | None:
        """The factor in front of the bias, sigma_b or 1; None without a bias."""
        if self.bias is None:
            return None
        return math.sqrt(self.bias_variance) if self.init_power is None else 1.0

    def _draw(self, shape: tuple[int, ...], init_power: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        """Makes the parameters, once the sizes and variances are known."""
        self.init_power = _checked(init_power)
        weights = jax.random.normal(rngs.params(), shape, dtype)
        if self.init_power is not None:
            deviation = math.sqrt(self.weight_variance) * self.fan_in**-self.init_power
            weights = weights * jnp.asarray(deviation, dtype)
        self.kernel = nnx.Param(weights)
        self.bias = nnx.data(None)
        if self.bias_variance > 0:
            bias = jax.random.normal(rngs.params(), shape[-1:], dtype)
            if self.init_power is not None:
                bias = bias * jnp.asarray(math.sqrt(self.bias_variance), dtype)
            self.bias = nnx.Param(bias)

    def _with_bias(self, u: Array) -> Array:
        scale = self.bias_scale
        if self.bias is None or scale is None:
            return u
        scaled = scale * self.bias[...]
        # with as many axes as u, which jax_numpy_rank_promotion may ask for
        return u + scaled.reshape((1,) * (u.ndim - 1) + scaled.shape)


def _checked(init_power: object) -> float | None:
    if init_power is None:
        return None
    found = as_number(init_power)
    if found is None or not math.isfinite(found):
        raise ValueError(f"init_power must be None or a number, got {shown(init_power)}")
    return float(found)
