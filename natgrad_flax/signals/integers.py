"""Integers of a traced program that are known before it runs: constants, and counters of loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.signals.program import bind, loop_inputs
from natgrad_flax.signals.views import Loop

_LARGEST = 4096
"""Entries of an array that is followed, at most: what counts steps and layers is small."""


class Known(NamedTuple):
    """Integers that do not depend on what a program is given.

    Attributes:
      values: computes them when they are asked for.
      loop: whose steps the first axis of the values stands for, in the order of what is scanned;
        None where they are the same at every step.
    """

    values: Callable[[], Any]
    loop: Loop | None = None


class Integers:
    """What is known of the integers of one program.

    Args:
      jaxpr: the program.
      consts: its constants.
      given: what is known of its inputs.
    """

    def __init__(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Known | None]) -> None:
        self._known: dict[Any, Known] = {}
        pairs = [*zip(jaxpr.constvars, map(_constant, consts), strict=True)]
        # of a program around it nothing may be known
        self._learn([*pairs, *zip(jaxpr.invars, given, strict=False)])

    def of(self, variables: Sequence[Any]) -> list[Known | None]:
        """What is known of each variable."""
        return [_literal(v) if isinstance(v, Literal) else self._known.get(v) for v in variables]

    def follow(self, equation: Any) -> None:
        """Learns the results of an equation, where they follow from what is known."""
        if not all(_is_small(v.aval) for v in equation.outvars) or equation.effects:
            return
        given = [known for known in self.of(equation.invars) if known is not None]
        loops = {known.loop for known in given} - {None}
        counts = bool(given) or equation.primitive.name == "iota"
        if not counts or len(given) < len(equation.invars) or len(loops) > 1:
            return
        loop = next(iter(loops), None)
        axes = [None if known.loop is None else 0 for known in given]

        @cache
        def results() -> list[Array]:
            with jax.ensure_compile_time_eval():
                arrays = [known.values() for known in given]
                call = partial(_bound, equation)
                return call(*arrays) if loop is None else jax.vmap(call, axes)(*arrays)

        self._learn(
            (variable, Known(partial(_one_of, results, i), loop))
            for i, variable in enumerate(equation.outvars)
        )

    def _learn(self, pairs: Any) -> None:
        self._known.update((variable, known) for variable, known in pairs if known is not None)


def _one_of(results: Callable[[], list[Any]], index: int) -> Any:
    return results()[index]


def _bound(equation: Any, *given: Any) -> list[Any]:
    return bind(equation, list(given))


def _is_small(array: Any) -> bool:
    dtype = getattr(array, "dtype", None)
    whole = dtype is not None and (jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_)
    return bool(whole) and math.prod(array.shape) <= _LARGEST


def _literal(literal: Any) -> Known | None:
    return _constant(np.asarray(literal.val, literal.aval.dtype))


def _constant(value: Any) -> Known | None:
    if not is_concrete(value) or not getattr(value, "is_fully_addressable", True):
        return None
    return Known(lambda: value) if _is_small(value) else None


def in_loop(equation: Any, given: Sequence[Known | None], loop: Loop) -> list[Known | None]:
    """What is known of the inputs of the body of a scan.

    Args:
      equation: the scan.
      given: what is known of its inputs.
      loop: what it is among others.
    """
    consts, carried = loop_inputs(equation)
    body, length = equation.params["jaxpr"].jaxpr, equation.params["length"]
    rounds = np.arange(length)[::-1] if loop.backwards else np.arange(length)
    found: list[Known | None] = list(given[:consts])
    for start, before, after in zip(
        given[consts : consts + carried], body.invars[consts:], body.outvars, strict=False
    ):
        by = _increment(body, before, after)
        if start is None or start.loop is not None or by is None:
            found.append(None)
        else:
            found.append(Known(partial(_counted, start, by * rounds), loop))
    for scanned in given[consts + carried :]:
        alone = scanned is not None and scanned.loop is None
        found.append(scanned._replace(loop=loop) if scanned is not None and alone else None)
    return found


def _counted(start: Known, added: Any) -> Array:
    with jax.ensure_compile_time_eval():
        first = jnp.asarray(start.values())
        return first + jnp.asarray(added, first.dtype)


def _increment(body: Any, before: Any, after: Any) -> int | None:
    """What is added to a number from one step to the next, None where it is not a constant."""
    if before.aval.shape or not _is_small(before.aval):
        return None
    if after is before:
        return 0
    made = next((e for e in body.eqns if after in e.outvars), None)
    if made is None or made.primitive.name not in ("add", "sub"):
        return None
    left, right = made.invars
    if isinstance(left, Literal) and made.primitive.name == "add":
        left, right = right, left
    if left is not before or not isinstance(right, Literal):
        return None
    return int(right.val) if made.primitive.name == "add" else -int(right.val)


def starts_of(equation: Any, given: Sequence[Known | None]) -> dict[int, Known] | None:
    """Where the one part begins that ``dynamic_slice`` or ``gather`` takes, by axis.

    None where that is not known, or where ``gather`` takes several parts or none for some numbers.
    """
    shape, params = equation.invars[0].aval.shape, equation.params
    sizes = params["slice_sizes"]
    last = [n - size for n, size in zip(shape, sizes, strict=True)]
    if equation.primitive.name == "dynamic_slice":
        clipped = {axis: known for axis, known in enumerate(given[1:]) if known and last[axis]}
        return {
            a: known._replace(values=partial(_clipped, known, last[a]))
            for a, known in clipped.items()
        }
    numbers, index = params["dimension_numbers"], given[1]
    rank = len(equation.outvars[0].aval.shape)
    if index is None or numbers.operand_batching_dims or len(numbers.offset_dims) != rank:
        return None
    found = {}
    for column, axis in enumerate(numbers.start_index_map):
        known = index._replace(values=partial(_column, index, column))
        values = np.asarray(known.values())
        if values.min() < 0 or values.max() > last[axis]:
            return None
        found[axis] = known
    return found


def _clipped(known: Known, last: int) -> Any:
    return np.clip(np.asarray(known.values()), 0, last)


def _column(known: Known, column: int) -> Any:
    return np.asarray(known.values())[..., column]
