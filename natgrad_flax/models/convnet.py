"""Convolutional networks of layers in NTK parametrisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.models.activations import get_activation
from natgrad_flax.models.layers import Conv, Dense
from natgrad_flax.models.parametrization import init_powers
from natgrad_flax.models.sizes import (
    PADDINGS,
    check_choice,
    check_images,
    check_sizes,
    check_variances,
    image_shape,
    size_each,
    size_tuple,
)

POOLINGS = ("flatten", "average")
"""What the last layer reads: every position, or the mean over them."""


class ConvNet(nnx.Module):
    """A convolutional network in NTK parametrisation, whose width may go to infinity.

    The activation follows every convolution; then all positions ("flatten") or their mean
    ("average": global average pooling) go to a ``Dense`` readout f, without an activation. The
    limits of infinitely many channels are those of Novak et al. 2019 (arXiv:1810.05148) and Arora
    et al. 2019 (arXiv:1904.11955).

    Attributes:
      convolutions: the ``Conv`` layers, an nnx.List.
      readout: the ``Dense`` layer.
      kernel_size: (height, width).
      strides: a tuple, one entry a convolution.
      The other arguments stand as attributes of the same name, except ``param_dtype`` and
      ``rngs``.

    Args:
      input_shape: (H, W, C) of an image.
      channels: output channels of each convolution, one entry at least.
      outputs: number of outputs.
      kernel_size: extent of every kernel, one number or (height, width).
      strides: step of the convolutions in both dimensions, one number or one a convolution.
      padding: "SAME", "VALID" or "CIRCULAR", as in ``Conv``.
      pooling: "flatten" or "average".
      activation: "relu", "tanh", "erf", "gelu", "leaky_relu" or "identity".
      weight_variance: sigma_w^2 of all layers.
      bias_variance: sigma_b^2; 0 means no bias parameters.
      parametrization: "ntk", "standard" or "mup", as in ``MLP``.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the same seed gives the same parameters.

    Raises:
      ValueError: a size or a variance is out of range, an unknown padding, pooling or activation,
        as many strides as there are not convolutions, or images that a kernel does not fit into.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> options = {"strides": (1, 2), "pooling": "average"}
      >>> model = ng.ConvNet((6, 6, 1), (4, 4), 2, **options, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((5, 6, 6, 1))).shape
      (5, 2)
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (32, 32, 3),
        channels: Sequence[int] = (32, 64, 128, 128),
        outputs: int = 10,
        *,
        kernel_size: int | Sequence[int] = 3,
        strides: int | Sequence[int] = (1, 2, 2, 1),
        padding: str = "SAME",
        pooling: str = "flatten",
        activation: str = "relu",
        weight_variance: float = 2.0,
        bias_variance: float = 0.0,
        parametrization: str = "ntk",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.input_shape = image_shape(input_shape)
        self.channels = size_tuple("channels", channels, "positive integers, one a convolution")
        check_sizes(outputs=outputs)
        self.outputs = int(outputs)
        self.kernel_size = size_each("kernel_size", kernel_size, 2, "spatial dimension")
        self.strides = size_each("strides", strides, len(self.channels), "convolution")
        check_choice("padding", padding, PADDINGS)
        check_choice("pooling", pooling, POOLINGS)
        get_activation(activation)
        check_variances(weight_variance, bias_variance)
        self.padding = padding
        self.pooling = pooling
        self.activation = activation
        self.weight_variance = float(weight_variance)
        self.bias_variance = float(bias_variance)
        shape: Sequence[int] = self.input_shape[:2]
        features = self.input_shape[2]
        self.parametrization = parametrization
        *powers, last = init_powers(parametrization, len(self.channels) + 1)
        layers = []
        for width, stride, power in zip(self.channels, self.strides, powers, strict=True):
            layer = Conv(
                features,
                width,
                self.kernel_size,
                strides=stride,
                padding=padding,
                weight_variance=weight_variance,
                bias_variance=bias_variance,
                init_power=power,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            features, shape = width, layer.positions(shape)
            layers.append(layer)
        self.convolutions = nnx.List(layers)
        if pooling == "flatten":
            features *= math.prod(shape)
        self.readout = Dense(
            features,
            outputs,
            weight_variance=weight_variance,
            bias_variance=bias_variance,
            init_power=last,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """Maps images of shape (N, H, W, C) to outputs (N, outputs).

        Raises:
          ValueError: x has another shape.
        """
        return self.pre_activations(x)[-1]

    def pre_activations(self, x: Array) -> list[Array]:
        """What the convolutions give for images (N, H, W, C), and the outputs.

        Raises:
          ValueError: x has another shape.
        """
        check_images(x, self.input_shape)
        phi = get_activation(self.activation).function
        found = []
        for layer in self.convolutions:
            found.append(layer(x))
            x = phi(found[-1])
        x = x.reshape(len(x), -1) if self.pooling == "flatten" else x.mean((1, 2))
        return [*found, self.readout(x)]
