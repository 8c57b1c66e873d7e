"""Where the costly parts of a program run: in place, or dealt out to the devices of a mesh.

The code of operators and structures says what can be dealt out; unless something else is put in
its place, as ``natgrad_flax.devices`` does, all of it runs where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import Array


class Executor:
    """Runs everything in place."""

    many_devices = False

    def cubic(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """See the function of this name."""
        return function(*arrays)

    def by_columns(
        self, function: Callable[..., Array], split: tuple[Array, ...], whole: tuple[Any, ...]
    ) -> Array:
        """See the function of this name."""
        return function(*split, *whole)

    def by_rows(self, array: Array) -> Array:
        """See the function of this name."""
        return array


_IN_PLACE = Executor()
_CURRENT: ContextVar[Executor] = ContextVar("executor", default=_IN_PLACE)


@contextmanager
def executed_by(executor: Executor = _IN_PLACE) -> Iterator[None]:
    """What is traced within it is run by this executor; also a decorator."""
    token = _CURRENT.set(executor)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def many_devices() -> bool:
    """Whether work that is split takes less time."""
    return _CURRENT.get().many_devices


def cubic(function: Callable[..., Any], *arrays: Any) -> Any:
    """A function of matrices whose cost grows as n^3: on a mesh one device does it for all.

    Args:
      function: from pytrees of arrays to one; it closes over no arrays.
      arrays: its arguments.
    """
    return _CURRENT.get().cubic(function, *arrays)


def by_columns(
    function: Callable[..., Array], split: tuple[Array, ...], whole: tuple[Any, ...] = ()
) -> Array:
    """A function that treats columns one by one: on a mesh each device has its share of them.

    Args:
      function: of all arrays in this order.
      split: arrays whose last axis counts the columns. The result has as many axes as the last of
        them, and its last one counts the columns, too.
      whole: arrays that every column needs, or None.
    """
    return _CURRENT.get().by_columns(function, split, whole)


def product(left: Array, right: Array) -> Array:
    """left @ right, by the columns of right."""
    return by_columns(lambda right, left: left @ right, (right,), (left,))


def by_rows(array: Array) -> Array:
    """An array (..., R, k) that devices compute together, each its share of the rows.

    To be said of Gram matrices between samples, of which each device has its share: else all
    devices would gather the rows that they are made of first, and do all of the product.
    """
    return _CURRENT.get().by_rows(array)
