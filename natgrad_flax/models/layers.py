"""Layers in NTK parametrisation, or with weights drawn to scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.models.parametrization import ScaledLayer
from natgrad_flax.models.sizes import (
    PADDINGS,
    check_choice,
    check_sizes,
    check_variances,
    size_each,
    size_tuple,
)


class Dense(ScaledLayer):
    """An affine layer in NTK parametrisation (Karakida & Osawa 2020, Eq. 1).

    u = sqrt(weight_variance / in_features) x W + sqrt(bias_variance) b, with every entry of W and
    b drawn from N(0, 1). A zero ``bias_variance`` means that there is no bias parameter.
    With ``init_power=b`` it is u = x W + b instead, W drawn from
    N(0, weight_variance in_features^{-2b}) and the bias from N(0, bias_variance).

    Attributes:
      kernel: W, shape (in_features, out_features).
      bias: b, shape (out_features,), or None.

    Args:
      in_features: number of inputs, M_{l-1}.
      out_features: number of units, M_l.
      weight_variance: sigma_w^2 > 0.
      bias_variance: sigma_b^2 >= 0.
      init_power: None for NTK parametrisation; 1/2 is the standard one.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the stream ``params`` is used.

    Raises:
      ValueError: a size or a variance is out of range.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> layer = ng.Dense(
      ...     3, 8, weight_variance=2.0, bias_variance=0.1, rngs=nnx.Rngs(0)
      ... )
      >>> x = jnp.ones((5, 3))
      >>> u = (2.0 / 3) ** 0.5 * x @ layer.kernel + 0.1**0.5 * layer.bias
      >>> bool(jnp.allclose(layer(x), u))
      True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_variance: float = 1.0,
        bias_variance: float = 0.0,
        init_power: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"a layer needs sizes of at least 1, got {in_features} -> {out_features}"
            )
        check_variances(weight_variance, bias_variance)
        self.in_features = int(in_features)
        self.out_features = int(out_features)
        self.weight_variance = float(weight_variance)
        self.bias_variance = float(bias_variance)
        self._draw((in_features, out_features), init_power, param_dtype, rngs)

    @property
    def fan_in(self) -> int:
        """The number of inputs of a unit, M_{l-1}."""
        return self.in_features

    def __call__(self, x: Array) -> Array:
        """Maps inputs of shape (..., in_features) to pre-activations (..., out_features)."""
        return self._with_bias((self.weight_scale * x) @ self.kernel[...])


class Conv(ScaledLayer):
    """A convolution in NTK parametrisation, channels last, in 1 to 3 spatial dimensions.

    u = sqrt(weight_variance / fan_in) conv(x, W) + sqrt(bias_variance) b with
    fan_in = prod(kernel_size) in_features / feature_group_count and every entry of W and b drawn
    from N(0, 1) (Karakida & Osawa 2020, Eq. 1, for shared weights; Novak et al. 2020,
    arXiv:1912.02803, ``stax.Conv`` with parameterization="ntk"). A zero ``bias_variance`` means
    that there is no bias parameter. ``init_power`` is that of ``Dense``.

    "SAME" and "CIRCULAR" give ceil(size / stride) positions in each dimension, "VALID" those at
    which the kernel lies inside the image. "CIRCULAR" pads as much as "SAME" does, with the other
    end of the image for zeros; with a stride that is another alignment than that of ``nnx.Conv``,
    which pads by the size of the kernel alone.

    Attributes:
      kernel: W, shape (*kernel_size, in_features // feature_group_count, out_features).
      bias: b, shape (out_features,), or None.
      kernel_size, strides, kernel_dilation: tuples, one entry a spatial dimension.

    Args:
      in_features: number of input channels.
      out_features: number of output channels.
      kernel_size: extent of the kernel in each spatial dimension; its length is their number.
      strides: step between positions, one number or one a dimension.
      padding: "SAME", "VALID" or "CIRCULAR".
      kernel_dilation: step between the taps of the kernel, one number or one a dimension.
      feature_group_count: number of groups G; output channels of a group see its inputs only.
      weight_variance: sigma_w^2 > 0.
      bias_variance: sigma_b^2 >= 0.
      init_power: None for NTK parametrisation; 1/2 is the standard one.
      conv_general_dilated: JAX's, or ``ng.conv_general_dilated`` for training inside of loops.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the stream ``params`` is used.

    Raises:
      ValueError: a size or a variance is out of range, groups that do not divide the channels, an
        unknown padding, or other than 1 to 3 spatial dimensions.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> layer = ng.Conv(1, 4, (3, 3), strides=2, padding="CIRCULAR", rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer(jnp.ones((5, 6, 6, 1))).shape
      ((3, 3, 1, 4), (5, 3, 3, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        weight_variance: float = 1.0,
        bias_variance: float = 0.0,
        init_power: float | None = None,
        conv_general_dilated: Callable[..., Array] = jax.lax.conv_general_dilated,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(
            in_features=in_features,
            out_features=out_features,
            feature_group_count=feature_group_count,
        )
        self.kernel_size = size_tuple(
            "kernel_size",
            kernel_size,
            "a tuple of 1 to 3 positive integers, one a spatial dimension",
            maximum=3,
        )
        dimensions = len(self.kernel_size)
        self.strides = size_each("strides", strides, dimensions, "spatial dimension")
        self.kernel_dilation = size_each(
            "kernel_dilation", kernel_dilation, dimensions, "spatial dimension"
        )
        check_choice("padding", padding, PADDINGS)
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"feature_group_count = {feature_group_count} must divide in_features = "
                f"{in_features} and out_features = {out_features}"
            )
        check_variances(weight_variance, bias_variance)
        self.in_features = int(in_features)
        self.out_features = int(out_features)
        self.padding = padding
        self.feature_group_count = int(feature_group_count)
        self.weight_variance = float(weight_variance)
        self.bias_variance = float(bias_variance)
        self.conv_general_dilated = conv_general_dilated
        shape = (*self.kernel_size, in_features // feature_group_count, out_features)
        self._draw(shape, init_power, param_dtype, rngs)

    @property
    def fan_in(self) -> int:
        """The number of inputs of a unit: prod(kernel_size) in_features / feature_group_count."""
        return math.prod(self.kernel_size) * self.in_features // self.feature_group_count

    def border(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Positions that are put before and after the image in each spatial dimension.

        Args:
          shape: spatial shape of the image.
        """
        rule = "VALID" if self.padding == "VALID" else "SAME"
        pads = jax.lax.padtype_to_pads(tuple(shape), self._extent, self.strides, rule)
        return tuple((int(low), int(high)) for low, high in pads)

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The spatial shape of the outputs.

        Args:
          shape: spatial shape of the image.

        Raises:
          ValueError: the kernel has no position in an image of this size.
        """
        found = tuple(
            (size + sum(pads) - extent) // stride + 1
            for size, pads, extent, stride in zip(
                shape, self.border(shape), self._extent, self.strides, strict=True
            )
        )
        if min(found) < 1:
            raise ValueError(
                f"a kernel that covers {self._extent} positions does not fit into an image of "
                f'{tuple(shape)} with padding={self.padding!r}; use "SAME" or larger images'
            )
        return found

    def __call__(self, x: Array) -> Array:
        """Maps images (N, *spatial, in_features) to pre-activations (N, *positions, out_features).

        Raises:
          ValueError: x has another shape, or images smaller than the kernel with "VALID".
        """
        dimensions = len(self.kernel_size)
        if x.ndim != dimensions + 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"this Conv takes x of shape (N, {dimensions} spatial dimensions, "
                f"{self.in_features}), got {x.shape}"
            )
        self.positions(x.shape[1:-1])
        border = self.border(x.shape[1:-1])
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, ((0, 0), *border, (0, 0)), mode="wrap")
            border = ((0, 0),) * dimensions
        dtype = jnp.result_type(x, self.kernel[...])
        axes = "HWD"[:dimensions]
        u = self.conv_general_dilated(
            x.astype(dtype),
            # the kernel is the smaller factor
            (self.weight_scale * self.kernel[...]).astype(dtype),
            self.strides,
            border,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=self.feature_group_count,
        )
        return self._with_bias(u)

    @property
    def _extent(self) -> tuple[int, ...]:
        """Positions from the first to the last tap of the kernel, in each dimension."""
        return tuple(
            (size - 1) * dilation + 1
            for size, dilation in zip(self.kernel_size, self.kernel_dilation, strict=True)
        )
