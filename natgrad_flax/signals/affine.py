"""Products, convolutions and tables as affine maps u = a W with shared weights.

The inputs and derivatives of a place are brought into one arrangement, (N, T, G, K) and
(N, S, T, G, M/G): T positions that share the weights, G groups of units with inputs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.signals.lookup import OneHot
from natgrad_flax.signals.program import Place
from natgrad_flax.signals.views import View

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Affine:
    """A place as an affine map.

    Attributes:
      inputs: from the recorded operand (N, *loops, *shape) to (N, T, G, K), not yet scaled; of a
        table to which rows are taken.
      derivatives: from (N, S, *loops, *shape of the result) to (N, S, T, G, M/G).
      view: of the weights.
      matrix: axes of the view in the order of a matrix: inputs, groups, units.
      units: axes of the result in the order of groups and units.
      sizes: (G, K, M/G).
      turned: whether it is read as a map by the transpose of what ``matrix`` gives, from M to K.
    """

    inputs: Callable[[Array], Array | OneHot]
    derivatives: Callable[[Array], Array]
    view: View
    matrix: tuple[int, ...]
    units: tuple[int, ...]
    sizes: tuple[int, int, int]
    turned: bool = False

    def transposed(self) -> Affine:
        """The same map of one group, with the weights read the other way round."""
        behind = len(self.matrix) - len(self.units)
        matrix = (*self.matrix[behind:], *self.matrix[:behind])
        groups, fan_in, units = self.sizes
        return replace(self, matrix=matrix, sizes=(groups, units, fan_in), turned=True)


def affine_map(place: Place) -> Affine | None:
    """A place as an affine map; None where it is none of one sort for all units.

    Loops that take another part of the weights at each step have no axis in what it arranges.
    """
    return _KINDS[place.kind](place)


def _product(place: Place) -> Affine | None:
    contracted, batch = place.params["dimension_numbers"]
    own, other = place.side, 1 - place.side
    view = place.view
    ranks = len(view.axes), len(place.inputs)
    used = [(*contracted[side], *batch[side]) for side in (own, other)]
    free, rest = (
        [axis for axis in range(rank) if axis not in axes]
        for rank, axes in zip(ranks, used, strict=True)
    )
    # in the result: batch, then what is left of the first operand, then of the second
    first = len(batch[0])
    behind = first + len(free if own == 0 else rest)
    units_at = [(first if own == 0 else behind) + i for i in range(len(free))]
    rest_at = [(behind if own == 0 else first) + i for i in range(len(rest))]
    grouped = [i for i, axis in enumerate(batch[own]) if not _repeats(view, axis)]
    shared = [i for i in range(first) if i not in grouped]
    summed = [i for i, axis in enumerate(contracted[own]) if _repeats(view, axis)]
    kept = [i for i in range(len(contracted[own])) if i not in summed]
    flipped = [i for i in kept if _is_reversed(view, contracted[own][i])]
    turned = view.flip([contracted[own][i] for i in flipped])
    if turned is None:
        return None

    groups = [batch[own][i] for i in grouped]
    inner = [contracted[own][i] for i in kept]
    sums = [contracted[other][i] for i in summed]
    order = [
        [*(batch[other][i] for i in shared), *rest],
        [batch[other][i] for i in grouped],
        [contracted[other][i] for i in kept],
    ]
    flips = [contracted[other][i] for i in flipped]
    out = [[*shared, *rest_at], grouped, units_at]

    def inputs(a: Array) -> Array:
        lead = a.ndim - len(place.inputs)
        a = jnp.flip(a, [lead + axis for axis in flips]) if flips else a
        return _arranged(a, order, lead, 1, sums)

    return Affine(
        inputs,
        lambda d: _arranged(d, out, d.ndim - len(place.outputs.shape), 2),
        turned,
        (*inner, *groups, *free),
        (*grouped, *units_at),
        (_volume(view, groups), _volume(view, inner), _volume(view, free)),
    )


def _arranged(
    array: Array, order: Sequence[Sequence[int]], lead: int, kept: int, sums: Sequence[int] = ()
) -> Array:
    """An array with its axes in three sets, the axes of loops before the first.

    Args:
      array: with axes of samples, of output directions, of loops, and those of the place.
      order: axes of the place.
      lead: how many others there are.
      kept: how many of these are none of loops.
      sums: axes of the place to sum over.
    """
    sizes = [math.prod(array.shape[lead + axis] for axis in axes) for axes in order]
    sizes[0] *= math.prod(array.shape[kept:lead])
    total = sorted(lead + axis for axis in sums)
    if total:
        array = jnp.sum(array, axis=tuple(total))
    moved = [lead + axis - sum(t < lead + axis for t in total) for axes in order for axis in axes]
    return array.transpose(*range(lead), *moved).reshape(*array.shape[:kept], *sizes)


def _repeats(view: View, axis: int) -> bool:
    """Whether all along an axis there is the same."""
    return bool(view.axes[axis]) and all(stride == 0 for _, stride in view.axes[axis])


def _is_reversed(view: View, axis: int) -> bool:
    return any(stride < 0 for _, stride in view.axes[axis])


def _volume(view: View, axes: Sequence[int]) -> int:
    return math.prod(view.shape[axis] for axis in axes)


def _convolution(place: Place) -> Affine | None:
    params = place.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    units, channels, *spatial = numbers.rhs_spec
    flipped = [axis for axis in spatial if _is_reversed(place.view, axis)]
    view = place.view.flip(flipped)
    if view is None:
        return None
    shape = view.shape
    taps = [shape[axis] for axis in spatial]
    fan, width = math.prod(taps) * shape[channels], shape[units] // groups
    behind = [spatial.index(axis) for axis in flipped]

    def inputs(a: Array) -> Array:
        lead = a.ndim - len(place.inputs)
        batch, features, *space = (lead + axis for axis in numbers.lhs_spec)
        a = a.transpose(*range(lead), batch, *space, features)
        seen = patches(a.reshape(-1, *a.shape[lead + 1 :]), taps, params)
        if behind:
            # (B, *positions, *taps, C)
            seen = jnp.flip(seen, [1 + len(taps) + axis for axis in behind])
        seen = seen.reshape(a.shape[0], -1, math.prod(taps), groups, shape[channels])
        return seen.swapaxes(2, 3).reshape(a.shape[0], -1, groups, fan)

    def derivatives(d: Array) -> Array:
        lead = d.ndim - len(place.outputs.shape)
        batch, features, *space = (lead + axis for axis in numbers.out_spec)
        d = d.transpose(*range(lead), batch, *space, features)
        return d.reshape(*d.shape[:2], -1, groups, width)

    return Affine(
        inputs,
        derivatives,
        view,
        (*spatial, channels, units),
        (numbers.out_spec[1],),
        (groups, fan, width),
    )


def patches(images: Array, taps: Sequence[int], params: Any) -> Array:
    """What the kernel of a convolution sees at each position.

    Args:
      images: shape (B, *spatial, C).
      taps: extent of the kernel in each spatial dimension.
      params: of ``conv_general_dilated``: window_strides, padding, lhs_dilation, rhs_dilation.

    Returns:
      Shape (B, *positions, *taps, C).
    """
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    border = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(int(low), int(high), int(d) - 1) for (low, high), d in border]
    zero = jnp.zeros((), images.dtype)
    images = jax.lax.pad(images, zero, ((0, 0, 0), *config, (0, 0, 0)))
    extent = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
    last = [size - length for size, length in zip(images.shape[1:-1], extent, strict=True)]
    found = []
    for tap in np.ndindex(*taps):
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
    stacked = jnp.stack(found, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], *taps, images.shape[-1])


def _table(place: Place) -> Affine | None:
    """Rows of a table, as the product of one-hot inputs and the table."""
    numbers, sizes = place.params["dimension_numbers"], place.params["slice_sizes"]
    view, shape = place.view, place.view.shape
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    rest = [i for i in range(len(shape)) if i != axis]
    if numbers.collapsed_slice_dims != (axis,) or any(sizes[i] != shape[i] for i in rest):
        return None
    rows, clip = shape[axis], place.params["mode"] == jax.lax.GatherScatterMode.CLIP
    units = list(numbers.offset_dims)
    positions = [i for i in range(len(place.outputs.shape)) if i not in units]

    def inputs(ids: Array) -> OneHot:
        ids = ids.reshape(ids.shape[0], -1)
        inside = jnp.clip(ids, 0, rows - 1)
        return OneHot(inside if clip else jnp.where(ids == inside, ids, rows), rows)

    return Affine(
        inputs,
        lambda d: _arranged(d, [positions, [], units], d.ndim - len(place.outputs.shape), 2),
        view,
        (axis, *rest),
        tuple(units),
        (1, rows, _volume(view, rest)),
    )


_KINDS: dict[str, Callable[[Place], Affine | None]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _table,
}
