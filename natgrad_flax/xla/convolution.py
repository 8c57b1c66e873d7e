"""Convolutions whose gradients are fast inside loops and branches of a program, too.

XLA's CPU compiler brings a convolution into the layout of its fast kernel only at the top level of
a program. The gradients that JAX derives are in other layouts, so inside ``lax.scan`` or
``lax.cond`` they run in plain loops, fifty times slower. Here the transposes around them are
written out, and all three convolutions stand in that layout from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, lax

Pads = tuple[tuple[int, int], ...]


class _Window(NamedTuple):
    """How a kernel moves, one entry a spatial dimension."""

    strides: tuple[int, ...]
    padding: Pads
    interior: tuple[int, ...]
    dilation: tuple[int, ...]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **further: Any,
) -> Array:
    """``jax.lax.conv_general_dilated`` with a gradient that is fast inside loops on CPUs.

    For ``nnx.Conv(..., conv_general_dilated=ng.conv_general_dilated)`` of a model that is trained
    inside ``lax.scan`` or ``lax.cond``. What natgrad itself runs of a model has it in any case.
    Channels last, one group and 1 to 3 spatial dimensions; everything else is left to JAX.
    Reverse-mode derivatives only: ``jax.jvp`` raises TypeError.

    Args:
      lhs: images, shape (N, *spatial, K).
      rhs: kernel, shape (*spatial, K, M).
      window_strides: as in ``jax.lax``, and so are all further arguments.
      padding: as in ``jax.lax``.
      lhs_dilation: as in ``jax.lax``.
      rhs_dilation: as in ``jax.lax``.
      dimension_numbers: as in ``jax.lax``.
      further: as in ``jax.lax``.

    Returns:
      Shape (N, *positions, M).

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> fast = {"conv_general_dilated": ng.conv_general_dilated, "rngs": nnx.Rngs(0)}
      >>> layer = nnx.Conv(1, 4, (3, 3), **fast)
      >>> layer(jnp.ones((2, 6, 6, 1))).shape
      (2, 6, 6, 4)
    """
    rank = lhs.ndim - 2
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = all(value is None or value == 1 for value in further.values())
    # JAX refuses names of paddings for dilated images
    plain = plain and not (isinstance(padding, str) and lhs_dilation and set(lhs_dilation) != {1})
    if not plain or numbers != _channels_last(lhs, rhs) or lhs.dtype != rhs.dtype:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            **further,
        )
    interior = tuple(lhs_dilation or (1,) * rank)
    dilation = tuple(rhs_dilation or (1,) * rank)
    if isinstance(padding, str):
        extents = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:-2], dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], extents, window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(lhs, rhs, _Window(tuple(window_strides), pads, interior, dilation))


def _channels_last(lhs: Array, rhs: Array) -> lax.ConvDimensionNumbers:
    axes = "HWD"[: lhs.ndim - 2]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_dimension_numbers(lhs.shape, rhs.shape, names)


def _plain(lhs: Array, rhs: Array, window: _Window) -> Array:
    return lax.conv_general_dilated(lhs, rhs, *window, _channels_last(lhs, rhs))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(lhs: Array, rhs: Array, window: _Window) -> Array:
    return _plain(lhs, rhs, window)


def _forward(lhs: Array, rhs: Array, window: _Window) -> tuple[Array, tuple[Array, Array]]:
    return _plain(lhs, rhs, window), (lhs, rhs)


def _backward(window: _Window, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    """The gradients of images and kernel, each by one convolution.

    The images': the slopes, spread by the strides, with the kernel turned round. The kernel's: the
    images with the slopes for a kernel, samples and channels in each other's places.
    """
    lhs, rhs = kept
    spatial = range(1, lhs.ndim - 1)
    around, along = [], []
    for axis in spatial:
        low = window.padding[axis - 1][0]
        extent = (rhs.shape[axis - 1] - 1) * window.dilation[axis - 1] + 1
        size = (lhs.shape[axis] - 1) * window.interior[axis - 1] + 1
        spread = (cotangent.shape[axis] - 1) * window.strides[axis - 1] + 1
        before = extent - low - 1
        around.append((before, size + extent - 1 - spread - before))
        along.append((low, spread + extent - 1 - size - low))
    turned = lax.rev(rhs, tuple(range(rhs.ndim - 2))).swapaxes(-1, -2)
    images = _plain(
        cotangent, turned, _Window(window.interior, tuple(around), window.strides, window.dilation)
    )
    channels_first = (lhs.ndim - 1, *spatial, 0)
    samples_inside = (*spatial, 0, lhs.ndim - 1)
    kernel = _plain(
        lhs.transpose(channels_first),
        cotangent.transpose(samples_inside),
        _Window(window.dilation, tuple(along), window.interior, window.strides),
    )
    return images, kernel.transpose(samples_inside)


_convolve.defvjp(_forward, _backward)
