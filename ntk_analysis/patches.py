"""Which positions of an image a convolution reads, and what it does to covariances of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.models.layers import Conv


class Patches(NamedTuple):
    """The patches of a convolution on images of one shape.

    Attributes:
      shape: spatial shape of the image.
      positions: spatial shape of the output, one patch each.
      kernel_size: positions of a patch in each dimension.
      strides: step from patch to patch.
      border: positions before and after the image.
      circular: whether the border is the other end of the image, not zeros.
    """

    shape: tuple[int, ...]
    positions: tuple[int, ...]
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    border: tuple[tuple[int, int], ...]
    circular: bool

    @classmethod
    def of(cls, layer: Conv, shape: Sequence[int]) -> Patches:
        """The patches that a layer reads of images of a spatial shape."""
        return cls(
            tuple(shape),
            layer.positions(shape),
            layer.kernel_size,
            layer.strides,
            layer.border(shape),
            layer.padding == "CIRCULAR",
        )

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in ("shape", "kernel_size", "strides")} | {
            "border": [list(pair) for pair in self.border],
            "circular": self.circular,
        }


def patch_means(values: Array, patches: Patches, axes: Sequence[tuple[int, ...]]) -> Array:
    """Means over the positions of each patch; positions beyond a border of zeros count as zero.

    With one axis a dimension, means of values at positions, such as variances. With two, means of
    values at pairs of positions that have the same place in their patches: the covariances between
    outputs of a convolution with random weights, over the variance of the weights, from those
    between its inputs.

    Args:
      values: what is averaged.
      patches: the patches.
      axes: for each spatial dimension, the axes of the values that run along it.

    Returns:
      An array with the positions of the output in these axes.
    """
    for dimension, along in enumerate(axes):
        values = _sum_along(values, patches, dimension, along)
    return values / math.prod(patches.kernel_size)


def spread_over_patches(values: Array, patches: Patches, axes: Sequence[tuple[int, ...]]) -> Array:
    """The transpose of ``patch_means``: from positions of the output to those of the image."""
    shape = list(values.shape)
    for size, along in zip(patches.shape, axes, strict=True):
        for axis in along:
            shape[axis] = size
    image = jax.ShapeDtypeStruct(tuple(shape), values.dtype)
    transpose = jax.linear_transpose(partial(patch_means, patches=patches, axes=axes), image)
    (result,) = transpose(values)
    return result


def _sum_along(values: Array, patches: Patches, dimension: int, along: tuple[int, ...]) -> Array:
    """Sums over the taps of a kernel in one dimension, the same tap in all axes."""
    border = [(0, 0)] * values.ndim
    for axis in along:
        border[axis] = patches.border[dimension]
    values = jnp.pad(values, border, mode="wrap" if patches.circular else "constant")
    count, stride = patches.positions[dimension], patches.strides[dimension]
    total: Array | None = None
    for tap in range(patches.kernel_size[dimension]):
        part = values
        for axis in along:
            part = jax.lax.slice_in_dim(part, tap, tap + (count - 1) * stride + 1, stride, axis)
        total = part if total is None else total + part
    assert total is not None
    return total
