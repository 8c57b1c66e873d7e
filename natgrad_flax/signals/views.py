"""Arrays of a traced program that are a parameter rearranged: which entry of it stands where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from natgrad_flax.signals.base import ParameterForm

Factors = tuple[tuple[int, int], ...]
"""Sizes and strides of the digits of an index, the slowest first; a stride of 0 repeats."""


class Loop(NamedTuple):
    """A loop of a program.

    Attributes:
      depth: how many loops stand around it.
      number: of the equation that it is, among all.
      backwards: whether it begins with the last entry of what it scans.
    """

    depth: int
    number: int
    backwards: bool


class Step(NamedTuple):
    """How a loop takes another part of an array at each step.

    Attributes:
      loop: the loop.
      parts: how many the array has.
      stride: from one part to the next.
      order: which part each step takes, in the order of what is scanned; () where it takes all of
        them, one after the other.
    """

    loop: Loop
    parts: int
    stride: int
    order: tuple[int, ...] = ()

    @property
    def backwards(self) -> bool:
        """Whether parts are taken from the last to the first."""
        if all(left <= right for left, right in pairwise(self.order)):
            return self.loop.backwards
        # parts in no order stand in their own
        falls = all(left >= right for left, right in pairwise(self.order))
        return falls and not self.loop.backwards

    @property
    def counts(self) -> Any:
        """How often each part is taken, (parts,)."""
        return np.bincount(self.order or range(self.parts), minlength=self.parts)

    @property
    def rounds(self) -> Any:
        """Which steps take each part, (parts, times); the number of all steps where none does."""
        counts = self.counts
        found = np.full((self.parts, counts.max()), len(self.order))
        found[counts > 0] = np.argsort(self.order, kind="stable").reshape(-1, counts.max())
        return found


Steps = tuple[Step, ...]
"""Of loops that take another part of an array at each step, the outermost first."""


class View(NamedTuple):
    """An array whose entries are entries of a source, times a number.

    Entry (i_1, i_2, ...) is scale * source[offset + sum of digits times strides], with the source
    raveled and the digits of each i_k those of ``axes[k]``.

    Attributes:
      source: what it is a view of.
      axes: for each axis the factors of its size.
      offset: of the first entry.
      scale: the number.
      steps: the loops that take another part of the source at each step.
    """

    source: Any
    axes: tuple[Factors, ...]
    offset: int = 0
    scale: float = 1.0
    steps: Steps = ()

    @classmethod
    def of(cls, source: Any, shape: Sequence[int]) -> View:
        """A source itself."""
        return cls(source, _axes(shape, _row_major(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(math.prod(n for n, _ in axis) for axis in self.axes)

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The view in another shape; None where its entries do not lie so."""
        factors = [factor for axis in self.axes for factor in axis]
        axes = []
        for size in shape:
            axis: list[tuple[int, int]] = []
            left = size
            while left > 1:
                if not factors:
                    return None
                n, stride = factors.pop(0)
                if left % n == 0:
                    axis.append((n, stride))
                    left //= n
                elif n % left == 0:
                    axis.append((left, stride * (n // left)))
                    factors.insert(0, (n // left, stride))
                    left = 1
                elif factors and stride == factors[0][0] * factors[0][1]:
                    # together one run of the source
                    inner, step = factors.pop(0)
                    factors.insert(0, (n * inner, step))
                else:
                    return None
            axes.append(tuple(axis))
        return None if factors else self._replace(axes=tuple(axes))

    def transpose(self, order: Sequence[int]) -> View:
        """With its axes in another order."""
        return self._replace(axes=tuple(self.axes[axis] for axis in order))

    def broadcast(self, shape: Sequence[int], places: Sequence[int]) -> View:
        """Repeated to a shape, its own axes at given places of it."""
        axes: list[Factors] = [((n, 0),) if n > 1 else () for n in shape]
        for own, place in zip(self.axes, places, strict=True):
            if own:
                axes[place] = own
        return self._replace(axes=tuple(axes))

    def squeeze(self, dropped: Sequence[int]) -> View:
        """Without some axes of size 1."""
        return self._replace(axes=tuple(a for i, a in enumerate(self.axes) if i not in dropped))

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> View | None:
        """A part of every axis; None where an axis that is cut has several factors."""
        axes, offset = [], self.offset
        for axis, size, start, limit, jump in zip(
            self.axes, self.shape, starts, limits, strides, strict=True
        ):
            count = -(-(limit - start) // jump)
            if count == size:
                axes.append(axis)
                continue
            if len(axis) != 1:
                return None
            stride = axis[0][1]
            offset += start * stride
            axes.append(((count, jump * stride),) if count > 1 else ())
        return self._replace(axes=tuple(axes), offset=offset)

    def flip(self, dimensions: Sequence[int]) -> View | None:
        """With some axes reversed; None where one of them has several factors."""
        axes, offset = list(self.axes), self.offset
        for dimension in dimensions:
            if len(axes[dimension]) > 1:
                return None
            for n, stride in axes[dimension]:
                offset += (n - 1) * stride
                axes[dimension] = ((n, -stride),)
        return self._replace(axes=tuple(axes), offset=offset)

    def scaled(self, by: float) -> View:
        """Times a number."""
        return self._replace(scale=self.scale * by)

    def part_at(self, axis: int, loop: Loop, order: tuple[int, ...] = ()) -> View | None:
        """The one entry along an axis that a step of a loop takes.

        None where this is no plain axis, where the loop takes parts already, or where others take
        them the other way round: layers stand in the order of their parts, or in the opposite one.

        Args:
          axis: the axis, which is left with a size of 1.
          loop: the loop.
          order: as in ``Step``.
        """
        factors = self.axes[axis] or ((1, math.prod(self.shape[axis + 1 :])),)
        length, (_, stride) = math.prod(n for n, _ in factors), factors[-1]
        if any(left[1] != n * inner for left, (n, inner) in pairwise(factors)):
            return None
        plain = order == tuple(range(length))
        step = Step(loop, length, stride, () if plain else order)
        if any(own.loop == loop or own.backwards != step.backwards for own in self.steps):
            return None
        axes = (*self.axes[:axis], (), *self.axes[axis + 1 :])
        return self._replace(axes=axes, steps=tuple(sorted((*self.steps, step))))

    def form(self, name: Any, shape: tuple[int, ...], order: Sequence[int]) -> ParameterForm | None:
        """The layout of a parameter whose matrix has the axes of this view in an order.

        None where the view does not show every entry of it once.

        Args:
          name: of the parameter.
          shape: of the parameter; its first axes are left to the steps of loops.
          order: axes of the view.
        """
        first = first_axes(self.steps, shape)
        if first is None:
            return None
        lead, shape = shape[:first], shape[first:]
        factors = [factor for axis in order for factor in self.axes[axis]]
        places = sorted(range(len(factors)), key=lambda i: -factors[i][1])
        expected = math.prod(shape)
        if self.offset:
            return None
        for place in places:
            n, stride = factors[place]
            if stride * n != expected:
                return None
            expected = stride
        if expected != 1:
            return None
        return ParameterForm(name, shape, tuple(n for n, _ in factors), tuple(places), lead=lead)


def first_axes(steps: Steps, shape: Sequence[int]) -> int | None:
    """How many first axes of a shape some loops together go through, in order.

    None where they go through no whole axes, or not in order.
    """
    if not steps:
        return 0
    if any(left.stride != right.parts * right.stride for left, right in pairwise(steps)):
        return None
    count = math.prod(step.parts for step in steps)
    for first in range(1, len(shape) + 1):
        if math.prod(shape[first:]) == steps[-1].stride:
            return first if math.prod(shape[:first]) == count else None
    return None


def common_factors(views: Sequence[View]) -> list[list[tuple[int, tuple[int, ...]]]] | None:
    """For each axis of views of one shape the factors that serve all: size, and their strides.

    None where the factors of one cut across those of another.
    """
    axes = []
    for together in zip(*(view.axes for view in views), strict=True):
        left = [list(axis) for axis in together]
        found = []
        while any(left):
            if not all(left):
                return None
            # from the fastest on
            size = min(axis[-1][0] for axis in left)
            strides = []
            for axis in left:
                n, stride = axis.pop()
                if n % size:
                    return None
                if n > size:
                    axis.append((n // size, stride * size))
                strides.append(stride)
            found.append((size, tuple(strides)))
        axes.append(found[::-1])
    return axes


def _row_major(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _axes(shape: Sequence[int], strides: Sequence[int]) -> tuple[Factors, ...]:
    return tuple(((n, stride),) if n > 1 else () for n, stride in zip(shape, strides, strict=True))
