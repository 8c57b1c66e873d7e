"""How the layers of Flax and our own read as affine maps: u = a W with shared weights.

Each kind brings the inputs and derivatives that ``capture`` recorded into one arrangement,
(N, T, G, K) and (N, S, T, G, M/G): T positions that share the weights, G groups of units with
inputs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax.models.layers import Conv, Dense
from natgrad_flax.signals.base import ParameterForm
from natgrad_flax.xla.convolution import conv_general_dilated

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Affine:
    """One affine layer, as it was called.

    Attributes:
      inputs: from recorded inputs (N, *shape of the call) to (N, T, G, K), not yet scaled.
      derivatives: from (N, S, *shape of the outputs) to (N, S, T, G, M/G).
      kernel: layout of the kernel, whose matrix is (K, M).
      bias: layout of the bias, None where there is none.
      weight_scale: the factor that the layer puts in front of its weights.
      bias_scale: the factor in front of its bias.
    """

    inputs: Callable[[Array], Array]
    derivatives: Callable[[Array], Array]
    kernel: ParameterForm
    bias: ParameterForm | None
    weight_scale: float = 1.0
    bias_scale: float = 1.0


Reader = Callable[[Any, Shape, Shape], Affine | None]
"""From a layer and the shapes of one call, inputs and outputs, to its affine form, or None."""


def _last_axis(layer: Any, inputs: Shape, outputs: Shape) -> Affine:
    k, m = inputs[-1], outputs[-1]
    bias = None if layer.bias is None else ParameterForm.plain("bias", (m,))
    return Affine(
        lambda a: a.reshape(a.shape[0], -1, 1, k),
        lambda d: d.reshape(*d.shape[:2], -1, 1, m),
        ParameterForm.plain("kernel", (k, m)),
        bias,
        getattr(layer, "weight_scale", 1.0),
        1.0 if bias is None else getattr(layer, "bias_scale", 1.0),
    )


def _grouped_axes(
    inputs: Sequence[str],
    outputs: Sequence[str],
    kernel: Sequence[str],
    sizes: Mapping[str, int],
    bias: Shape | None,
) -> Affine | None:
    """An einsum of the inputs and the kernel, by names of axes.

    Args:
      inputs: names of the axes of the inputs.
      outputs: of the outputs.
      kernel: of the kernel.
      sizes: of every axis.
      bias: the shape of the bias, None without; its axes are those of the kernel in the outputs,
        in the order of the outputs.
    """
    names = [*inputs], [*outputs], [*kernel]
    if any(len(set(axes)) != len(axes) for axes in names):
        return None
    summed = [n for n in inputs if n not in outputs and n not in kernel]
    positions = [n for n in inputs if n in outputs and n not in kernel]
    groups = [n for n in kernel if n in inputs and n in outputs]
    contracted = [n for n in kernel if n in inputs and n not in outputs]
    units = [n for n in kernel if n not in inputs and n in outputs]
    if len(groups) + len(contracted) + len(units) != len(kernel):
        return None
    if set(outputs) != {*positions, *groups, *units}:
        return None

    def volume(axes: Sequence[str]) -> int:
        return math.prod(sizes[n] for n in axes)

    def arrange_inputs(a: Array) -> Array:
        a = jnp.sum(a, axis=tuple(1 + inputs.index(n) for n in summed))
        kept = [n for n in inputs if n not in summed]
        order = [1 + kept.index(n) for n in [*positions, *groups, *contracted]]
        shape = volume(positions), volume(groups), volume(contracted)
        return a.transpose(0, *order).reshape(a.shape[0], *shape)

    def arrange_derivatives(d: Array) -> Array:
        order = [2 + outputs.index(n) for n in [*positions, *groups, *units]]
        shape = volume(positions), volume(groups), volume(units)
        return d.transpose(0, 1, *order).reshape(*d.shape[:2], *shape)

    def form(name: str, shape: Shape, axes: Sequence[str], matrix: Sequence[str]) -> ParameterForm:
        split = tuple(sizes[n] for n in matrix)
        return ParameterForm(name, shape, split, tuple(matrix.index(n) for n in axes))

    shape = tuple(sizes[n] for n in kernel)
    biased = [n for n in outputs if n in groups or n in units]
    if bias is not None and math.prod(bias) != volume(biased):
        return None
    return Affine(
        arrange_inputs,
        arrange_derivatives,
        form("kernel", shape, kernel, [*contracted, *groups, *units]),
        None if bias is None else form("bias", bias, biased, [*groups, *units]),
    )


def _linear_general(layer: nnx.LinearGeneral, inputs: Shape, outputs: Shape) -> Affine | None:
    rank = len(inputs)
    # Flax contracts the axes in rising order, whatever order they are given in
    axis = sorted(a % rank for a in layer.axis)
    batch = sorted(a % rank for a in layer.batch_axis)
    names = [f"x{i}" for i in range(rank)]
    rest = [n for i, n in enumerate(names) if i not in axis and i not in batch]
    units = [f"u{i}" for i in range(len(layer.out_features))]
    groups = [names[i] for i in batch]
    sizes = dict(zip(names, inputs, strict=True)) | dict(
        zip(units, layer.out_features, strict=True)
    )
    return _grouped_axes(
        names,
        [*groups, *rest, *units],
        [*groups, *(names[i] for i in axis), *units],
        sizes,
        None if layer.bias is None else layer.bias.shape,
    )


def _einsum(layer: nnx.Einsum, inputs: Shape, outputs: Shape) -> Affine | None:
    text = layer.einsum_str.replace(" ", "")
    operands, result = text.split("->")
    left, right = operands.split(",")
    if "..." in right:
        return None
    free = [f"dots{i}" for i in range(len(inputs) - len(left.replace("...", "")))]

    def axes(part: str) -> list[str]:
        if "..." not in part:
            return [*part]
        before, after = part.split("...")
        return [*before, *free, *after]

    kernel = layer.kernel.shape
    sizes = dict(zip(axes(left), inputs, strict=True)) | dict(zip(right, kernel, strict=True))
    bias = None if layer.bias is None else layer.bias.shape
    return _grouped_axes(axes(left), axes(result), [*right], sizes, bias)


def _convolution(layer: Any, inputs: Shape, outputs: Shape) -> Affine | None:
    if getattr(layer, "mask", None) is not None:
        return None
    groups, taps = layer.feature_group_count, math.prod(layer.kernel_size)
    k, m = taps * layer.in_features // groups, layer.out_features // groups

    def arrange_inputs(a: Array) -> Array:
        found = patches(layer, a.reshape(-1, *inputs[-len(layer.kernel_size) - 1 :]))
        # (..., taps, G, channels of a group) to (..., G, taps, channels)
        found = found.reshape(a.shape[0], -1, taps, groups, layer.in_features // groups)
        return found.swapaxes(2, 3).reshape(a.shape[0], -1, groups, k)

    bias = None if layer.bias is None else ParameterForm.plain("bias", (layer.out_features,))
    return Affine(
        arrange_inputs,
        lambda d: d.reshape(*d.shape[:2], -1, groups, m),
        ParameterForm.plain("kernel", tuple(layer.kernel.shape)),
        bias,
        getattr(layer, "weight_scale", 1.0),
        1.0 if bias is None else getattr(layer, "bias_scale", 1.0),
    )


def patches(layer: Any, images: Array) -> Array:
    """What the kernel of a convolution sees at each position.

    Args:
      layer: an ``ng.Conv`` or an ``nnx.Conv``.
      images: shape (B, *spatial, C).

    Returns:
      Shape (B, *positions, taps of the kernel, C), taps in row-major order.
    """
    rank = len(layer.kernel_size)
    strides, dilation = _each(layer.strides, rank), _each(layer.kernel_dilation, rank)
    extent = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, dilation, strict=True)]
    images = _padded(layer, images, extent, strides)
    last = [size - length for size, length in zip(images.shape[1:-1], extent, strict=True)]
    found = []
    for tap in np.ndindex(*layer.kernel_size):
        start = [t * d for t, d in zip(tap, dilation, strict=True)]
        stop = [s + end + 1 for s, end in zip(start, last, strict=True)]
        found.append(
            jax.lax.slice(
                images,
                (0, *start, 0),
                (images.shape[0], *stop, images.shape[-1]),
                (1, *strides, 1),
            )
        )
    return jnp.stack(found, axis=-2)


def _padded(layer: Any, images: Array, extent: list[int], strides: Shape) -> Array:
    """The images with the border that the layer puts around them."""
    rank, padding = len(extent), layer.padding
    interior = _each(getattr(layer, "input_dilation", 1), rank)
    size = [(n - 1) * d + 1 for n, d in zip(images.shape[1:-1], interior, strict=True)]
    mode = padding if isinstance(padding, str) else ""
    if mode in ("CIRCULAR", "REFLECT"):
        if isinstance(layer, Conv):
            border = layer.border(images.shape[1:-1])
        else:
            border = tuple(((e - 1) // 2, e // 2) for e in extent)
        kinds = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
        images = jnp.pad(images, ((0, 0), *border, (0, 0)), mode=kinds[mode])
        border = ((0, 0),) * rank
    elif mode == "CAUSAL":
        border = ((extent[0] - 1, 0),)
    elif mode:
        border = tuple(jax.lax.padtype_to_pads(size, extent, strides, mode))
    elif isinstance(padding, int):
        border = ((padding, padding),) * rank
    else:
        border = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    config = [(int(low), int(high), d - 1) for (low, high), d in zip(border, interior, strict=True)]
    zero = jnp.zeros((), images.dtype)
    return jax.lax.pad(images, zero, ((0, 0, 0), *config, (0, 0, 0)))


def _each(value: int | Sequence[int] | None, rank: int) -> Shape:
    if value is None or isinstance(value, int):
        return (value or 1,) * rank
    return tuple(value)


def _embedding(layer: nnx.Embed, inputs: Shape, outputs: Shape) -> Affine | None:
    rows, m = layer.num_embeddings, layer.features
    if rows == 1:
        return None
    return Affine(
        lambda ids: _one_hot(ids.reshape(ids.shape[0], -1, 1), rows, layer.embedding.dtype),
        lambda d: d.reshape(*d.shape[:2], -1, 1, m),
        ParameterForm.plain("embedding", (rows, m)),
        None,
    )


def _one_hot(ids: Array, rows: int, dtype: Any) -> Array:
    # negative numbers count from the end, as in nnx.Embed
    return jax.nn.one_hot(jnp.where(ids < 0, ids + rows, ids), rows, dtype=dtype)


LAYER_KINDS: dict[type[nnx.Module], Reader] = {
    Dense: _last_axis,
    nnx.Linear: _last_axis,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    Conv: _convolution,
    nnx.Conv: _convolution,
    nnx.Embed: _embedding,
}
"""The layer types that are affine in their kernel and bias."""

NORM_KINDS: tuple[type[nnx.Module], ...] = (
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.BatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)
"""The layer types with a scale and a bias for every feature."""


def multiplies(layer: Any) -> bool:
    """Whether a layer uses the products of JAX, and none that a user put in their place."""
    products = ("dot_general", "dot_general_cls", "conv_general_dilated")
    known = (
        None,
        jax.lax.dot_general,
        jax.lax.conv_general_dilated,
        conv_general_dilated,
    )
    return all(getattr(layer, name, None) in known for name in products)


def by_features(layer: Any, rank: int) -> bool:
    """Whether a normalisation has its scale and bias along the last axis of its inputs alone.

    Args:
      layer: one of ``NORM_KINDS``.
      rank: of its inputs.
    """
    axes = getattr(layer, "axis", getattr(layer, "feature_axes", -1))
    return [axis % rank for axis in np.atleast_1d(axes)] == [rank - 1]
