"""What a traced program costs: flops and memory, equation by equation; nothing runs or compiles."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

from natgrad_flax.arguments.arrays import own_promotion

Shape = tuple[int, ...]
Rule = Callable[[list[Shape], list[Shape], dict[str, Any]], float]

_MOVES = frozenset(
    """broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice
    expand_dims gather iota optimization_barrier pad pvary rev reshape scatter select_n slice split
    squeeze stack stop_gradient transpose""".split()  # noqa: SIM905
)
"""What brings numbers to another place or form."""


class Cost(NamedTuple):
    """What a program costs.

    Attributes:
      flops: see ``cost_of``.
      held: bytes of the products and factorisations that are there at once, beside what goes in
        and comes out. What compilers fuse (entry by entry, sums, moves) is not counted, but keeps
        what it is made of.
    """

    flops: float
    held: int


def cost_of(function: Callable[..., Any], *shapes: Any) -> Cost:
    """Flops and memory of a function of arrays.

    An addition and a multiplication are two flops; every other function of a real number is one,
    and comparisons, selections and moves are none. A product (m, k) (k, n) has 2 m k n; a Cholesky
    factorisation n^3 / 3, LU 2 n^3 / 3, a triangular system with k right-hand sides n^2 k, an
    eigendecomposition 9 n^3, both factors of a reduced QR of (m, n) 4 m n^2 - 4 n^3 / 3 (Golub &
    Van Loan 2013). A loop counts as often as it runs, a program on a mesh once for every device.
    As in a compiled program, what no output needs is not there, and what is computed twice from
    the same arrays is there once.

    Of a branch the cost is that of the case where its predicate holds. The library writes each of
    its own so that this is the regular one: a matrix of full rank, a solution that is finite. Where
    the program depends on the platform, flops are those of the default way and memory is that of
    the default device.

    Args:
      function: what ``jax.make_jaxpr`` traces.
      shapes: its arguments, arrays or ``jax.ShapeDtypeStruct`` or trees of them.

    Raises:
      ValueError: it has a loop whose length only its values tell, or a factorisation without a
        formula here.
    """
    with own_promotion():
        found = _cost(jax.make_jaxpr(function)(*shapes).jaxpr)
    if math.isnan(found.flops):
        raise ValueError(
            "the flops of a while loop depend on its values: give it a fixed length, with "
            "lax.scan, lax.map or the bounds of lax.fori_loop as Python numbers"
        )
    return found


class _Step(NamedTuple):
    """One equation: the values that it reads and makes, by number, and what it costs.

    ``sizes`` are the bytes of what it makes, () where that is fused.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    flops: float
    inside: int
    sizes: tuple[int, ...]


def _cost(jaxpr: Any) -> Cost:
    flat = _Flat()
    ins = [flat.new() for _ in jaxpr.invars]
    outs = flat.run(jaxpr, jaxpr.constvars, ins)
    needed, steps = set(outs), list[_Step]()
    for step in reversed(flat.steps.values()):
        if needed.intersection(step.makes):
            needed.update(step.reads)
            steps.append(step)
    return Cost(sum(step.flops for step in steps), _peak(steps[::-1], {*ins, *outs}))


def _peak(steps: list[_Step], given: set[int]) -> int:
    """The most bytes at once, values ``given`` from outside left out."""
    until: dict[int, int] = {}
    for place, step in reversed(list(enumerate(steps))):
        # what is fused into later steps keeps what it reads until then
        last = max(until.get(v, place) for v in step.makes) if not step.sizes else place
        until.update({v: max(last, until.get(v, 0)) for v in step.reads})
    ends: dict[int, int] = {}
    live = most = 0
    for place, step in enumerate(steps):
        for value, size in zip(step.makes, step.sizes, strict=False):
            if value not in given:
                live += size
                end = until.get(value, place)
                ends[end] = ends.get(end, 0) + size
        most = max(most, live + step.inside)
        live -= ends.pop(place, 0)
    return most


class _Flat:
    """A program with its calls inlined, each value once however often it is computed."""

    def __init__(self) -> None:
        self.steps: dict[Any, _Step] = {}
        self.new = itertools.count().__next__
        self._consts = defaultdict[Any, int](self.new)

    def run(self, jaxpr: Any, consts: Any, ins: list[int]) -> list[int]:
        """The numbers of what a program makes of values."""
        values = dict(zip(jaxpr.invars, ins, strict=True))
        values |= {v: self._consts[id(c)] for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(v: Any) -> int:
            if isinstance(v, Literal):
                return self._consts[str(v.aval), str(v.val)]
            return values[v]

        for equation in jaxpr.eqns:
            made = self._equation(equation, [read(v) for v in equation.invars])
            values.update(zip(equation.outvars, made, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, reads: list[int]) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if name == "custom_linear_solve":
            lengths, solve = params["const_lengths"], params["jaxprs"].solve
            first = lengths.matvec + lengths.vecmat
            ins = reads[first : first + lengths.solve] + reads[sum(lengths) :]
            return self.run(solve.jaxpr, solve.consts, ins)
        for call in () if name in _KEPT else ("jaxpr", "call_jaxpr", "call"):
            inner = getattr(params.get(call), "jaxpr", params.get(call))
            if inner is not None and len(inner.invars) == len(reads):
                return self.run(inner, getattr(params[call], "consts", inner.constvars), reads)
        key: Any = (equation.primitive, *reads, *params.items())
        try:
            hash(key)
        except TypeError:
            key = id(equation)
        if key not in self.steps:
            avals = [v.aval for v in equation.outvars]
            self.steps[key] = _Step(
                tuple(reads),
                tuple(self.new() for _ in avals),
                *_step_cost(equation),
                tuple(math.prod(a.shape) * a.dtype.itemsize for a in avals if name in _KEPT),
            )
        return list(self.steps[key].makes)


def _step_cost(equation: Any) -> Cost:
    """Flops of an equation, and the bytes that are held inside of it."""
    name, params = equation.primitive.name, equation.params
    ins = [getattr(v.aval, "shape", ()) for v in equation.invars]
    outs = [getattr(v.aval, "shape", ()) for v in equation.outvars]
    if name in _RULES:
        return Cost(float(_RULES[name](ins, outs, params)), 0)
    inner = list(jaxprs_in_params(params))
    if name == "while":
        return Cost(math.nan, _cost(params["body_jaxpr"].jaxpr).held)
    if params.get("branches_platforms"):
        return Cost(_cost(inner[-1]).flops, _cost(inner[_here(params)]).held)
    if inner:
        times = params["mesh"].size if name == "shard_map" else params.get("length", 1)
        found = _cost(inner[-1])
        return Cost(times * found.flops, found.held)
    real = bool(outs) and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact)
    if name in _MOVES or not real:
        return Cost(0.0, 0)
    if hasattr(jax.lax.linalg, name):
        raise ValueError(f"the flops of {name} are not known here; use another factorisation")
    entries = math.prod(outs[0])
    if name.startswith("reduce_"):
        entries = math.prod(ins[0]) - entries
    return Cost(float(entries), 0)


def _here(params: dict[str, Any]) -> int:
    """Which branch of ``lax.platform_dependent`` the default device runs."""
    device = jax.default_backend()
    named = enumerate(params["branches_platforms"])
    return next(place for place, names in named if names is None or device in names)


def _product(ins: list[Shape], outs: list[Shape], params: dict[str, Any]) -> float:
    (contracted, _), _ = params["dimension_numbers"]
    return 2.0 * math.prod(outs[0]) * math.prod(ins[0][axis] for axis in contracted)


def _convolution(ins: list[Shape], outs: list[Shape], params: dict[str, Any]) -> float:
    units = ins[1][params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(outs[0]) * math.prod(ins[1]) / units


def _qr(ins: list[Shape], outs: list[Shape], params: dict[str, Any]) -> float:
    """The reflectors, and the columns of Q made of them."""
    *batch, rows, columns = ins[0]
    small, made = min(rows, columns), outs[0][-1]
    factor = 2 * small**2 * (max(rows, columns) - small / 3)
    span = 4 * rows * made * small - 2 * (rows + made) * small**2 + 4 * small**3 / 3
    return math.prod(batch) * (factor + span)


def _power(ins: list[Shape], outs: list[Shape], params: dict[str, Any]) -> float:
    """By squaring."""
    y = abs(params["y"])
    return math.prod(outs[0]) * max(1, y.bit_length() + y.bit_count() - 2)


def _cubic(share: float) -> Rule:
    """share n^3 for square matrices."""
    return lambda ins, outs, params: share * math.prod(ins[0]) * ins[0][-1]


_RULES: dict[str, Rule] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "cholesky": _cubic(1 / 3),
    "lu": _cubic(2 / 3),
    "eigh": _cubic(9),
    "qr": _qr,
    "triangular_solve": lambda ins, outs, params: math.prod(ins[1]) * ins[0][-1],
    "integer_pow": _power,
}

_KEPT = frozenset(_RULES) - {"integer_pow"} | {"scan", "cond", "shard_map"}
"""Whose results lie in memory: products, factors, and what loops and branches return."""
