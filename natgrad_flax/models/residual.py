"""A small residual network of stock Flax layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import solve_dtype
from natgrad_flax.models.sizes import (
    check_choice,
    check_images,
    check_sizes,
    image_shape,
    size_tuple,
)

NORMALISATIONS = ("group", "batch", "none")
"""What stands before each activation: nnx.GroupNorm, nnx.BatchNorm or nothing."""


class ResidualBlock(nnx.Module):
    """y = shortcut(x) + conv(a(conv(a(x)))), with a(x) = relu(norm(x)).

    He et al. 2016 (arXiv:1603.05027), Fig. 1b. The shortcut is the identity, or where the stride or
    the channels change a convolution of one position on the activated input.

    Args:
      in_features: input channels.
      out_features: output channels.
      stride: step of the first convolution and of the shortcut, in both dimensions.
      convolution: makes an nnx.Conv of (in_features, out_features, kernel_size, strides=).
      normalisation: makes the normalisation of a number of channels, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        convolution: Any,
        normalisation: Any,
    ) -> None:
        self.first_norm = normalisation(in_features)
        self.first = convolution(in_features, out_features, (3, 3), strides=stride)
        self.second_norm = normalisation(out_features)
        self.second = convolution(out_features, out_features, (3, 3))
        self.shortcut = (
            convolution(in_features, out_features, (1, 1), strides=stride)
            if stride != 1 or in_features != out_features
            else None
        )

    def __call__(self, x: Array) -> Array:
        """Maps (N, H, W, in_features) to (N, ceil(H / stride), ceil(W / stride), out_features)."""
        active = _activate(self.first_norm, x)
        through = x if self.shortcut is None else self.shortcut(active)
        return through + self.second(_activate(self.second_norm, self.first(active)))


def _activate(norm: Any, x: Array) -> Array:
    return jax.nn.relu(x if norm is None else norm(x))


class ResidualNet(nnx.Module):
    """A small pre-activation residual network (He et al. 2016, arXiv:1603.05027).

    A 3 x 3 convolution; a stage of ``blocks`` residual blocks for each entry of ``channels``, of
    which every stage but the first halves height and width; normalisation, relu, the mean over
    all positions and a linear readout. Standard parametrisation, stock layers: nnx.Conv,
    nnx.GroupNorm or nnx.BatchNorm, nnx.Linear. The convolutions have a bias only without
    normalisation.

    With "batch", ``model.train()`` and ``model.eval()`` choose between the statistics of the
    batch, so that the outputs of a sample depend on the others, and the running averages.

    Attributes:
      stem: the first convolution.
      residual_blocks: nnx.List of all ``ResidualBlock``, ``blocks`` a stage.
      norm: the last normalisation, or None.
      readout: the nnx.Linear.
      The other arguments stand as attributes of the same name, except ``param_dtype`` and
      ``rngs``.

    Args:
      input_shape: (H, W, C) of an image.
      channels: channels of each stage.
      blocks: residual blocks a stage.
      outputs: number of outputs.
      normalisation: "group", "batch" or "none".
      groups: groups of channels that "group" normalises together; divides all channels.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the same seed gives the same parameters.

    Raises:
      ValueError: a size out of range, an unknown normalisation, groups that do not divide the
        channels.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> sizes = {"channels": (4, 4), "blocks": 1, "outputs": 2, "groups": 2}
      >>> model = ng.ResidualNet((6, 6, 1), **sizes, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((5, 6, 6, 1))).shape
      (5, 2)
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (32, 32, 3),
        channels: Sequence[int] = (16, 32, 64),
        blocks: int = 1,
        outputs: int = 10,
        *,
        normalisation: str = "group",
        groups: int = 8,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.input_shape = image_shape(input_shape)
        self.channels = size_tuple("channels", channels, "positive integers, one a stage")
        check_sizes(blocks=blocks, outputs=outputs, groups=groups)
        blocks, outputs, groups = int(blocks), int(outputs), int(groups)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        if normalisation == "group" and any(width % groups for width in self.channels):
            raise ValueError(f"groups = {groups} must divide all channels, got {self.channels}")
        self.blocks = blocks
        self.outputs = outputs
        self.normalisation = normalisation
        self.groups = groups
        convolution = partial(
            nnx.Conv, use_bias=normalisation == "none", param_dtype=param_dtype, rngs=rngs
        )

        def make_norm(features: int) -> nnx.Module | None:
            if normalisation == "group":
                return nnx.GroupNorm(
                    features, num_groups=groups, param_dtype=param_dtype, rngs=rngs
                )
            if normalisation == "batch":
                norm = nnx.BatchNorm(features, param_dtype=param_dtype, rngs=rngs)
                # Flax's own are float32, and a float64 network could not be trained
                dtype = solve_dtype(param_dtype)
                norm.mean = nnx.BatchStat(jnp.zeros(features, dtype))
                norm.var = nnx.BatchStat(jnp.ones(features, dtype))
                return norm
            return None

        features = self.channels[0]
        self.stem = convolution(self.input_shape[-1], features, (3, 3))
        found = []
        for stage, width in enumerate(self.channels):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                found.append(
                    ResidualBlock(
                        features, width, stride, convolution=convolution, normalisation=make_norm
                    )
                )
                features = width
        self.residual_blocks = nnx.List(found)
        self.norm = make_norm(features)
        self.readout = nnx.Linear(features, outputs, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps images of shape (N, H, W, C) to outputs (N, outputs).

        Raises:
          ValueError: x has another shape.
        """
        check_images(x, self.input_shape)
        x = self.stem(x)
        for block in self.residual_blocks:
            x = block(x)
        return self.readout(_activate(self.norm, x).mean((1, 2)))
