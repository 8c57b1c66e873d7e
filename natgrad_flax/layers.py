"""Layers in NTK parametrisation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Dense(nnx.Module):
    """An affine layer in NTK parametrisation (Karakida & Osawa 2020, Eq. 1).

    u = sqrt(weight_variance / in_features) x W + sqrt(bias_variance) b, with every entry of W and
    b drawn from N(0, 1). A zero ``bias_variance`` means that there is no bias parameter.

    Attributes:
      kernel: W, shape (in_features, out_features).
      bias: b, shape (out_features,), or None.

    Args:
      in_features: number of inputs, M_{l-1}.
      out_features: number of units, M_l.
      weight_variance: sigma_w^2 > 0.
      bias_variance: sigma_b^2 >= 0.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the stream ``params`` is used.

    Raises:
      ValueError: a size or a variance is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_variance: float = 1.0,
        bias_variance: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"a layer needs sizes of at least 1, got {in_features} -> {out_features}"
            )
        if not (math.isfinite(weight_variance) and weight_variance > 0):
            raise ValueError(f"weight_variance must be positive and finite, got {weight_variance}")
        if not (math.isfinite(bias_variance) and bias_variance >= 0):
            raise ValueError(f"bias_variance must be 0 or positive and finite, got {bias_variance}")
        self.in_features = in_features
        self.out_features = out_features
        self.weight_variance = float(weight_variance)
        self.bias_variance = float(bias_variance)
        key = rngs.params()
        self.kernel = nnx.Param(jax.random.normal(key, (in_features, out_features), param_dtype))
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if bias_variance > 0:
            key = rngs.params()
            self.bias = nnx.Param(jax.random.normal(key, (out_features,), param_dtype))

    @property
    def weight_scale(self) -> float:
        """The factor sigma_w / sqrt(M_{l-1}) in front of the weights."""
        return math.sqrt(self.weight_variance / self.in_features)

    @property
    def bias_scale(self) -> float | None:
        """The factor sigma_b in front of the bias, None without a bias."""
        return None if self.bias is None else math.sqrt(self.bias_variance)

    def __call__(self, x: Array) -> Array:
        """Maps inputs of shape (..., in_features) to pre-activations (..., out_features)."""
        u = (self.weight_scale * x) @ self.kernel[...]
        if self.bias is not None:
            u = u + math.sqrt(self.bias_variance) * self.bias[...]
        return u
