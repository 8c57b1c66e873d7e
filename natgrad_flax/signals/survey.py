"""Where the parameters of a program act affinely, found in one walk over its equations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.extend.core import Literal

from natgrad_flax.signals.integers import Integers, Known, in_loop, starts_of
from natgrad_flax.signals.program import REMAT, Bias, Path, Place, Program, Uses, loop_inputs
from natgrad_flax.signals.views import Loop, View

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_SAME = ("copy", "copy_p", "name", "reshard", "sharding_constraint", "mesh_cast", "pvary", "pcast")
"""Primitives that leave every entry where it is, on another device at most."""
_SIDES = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}
"""By primitive which of its operands may be a parameter at a place."""


def survey(
    jaxpr: Any, consts: Sequence[Any], tags: Sequence[View | None]
) -> tuple[Program, dict[Path, Uses]]:
    """The places of a program, and what it does with its parameters.

    Args:
      jaxpr: the program.
      consts: its constants.
      tags: for each input the view that it is of a parameter, None for others.
    """
    walk = _Survey()
    program, found = walk.program(jaxpr, consts, tags, ())
    for view in found:
        if _is_parameter(view):
            walk.uses_of(view).others.append("return")
    return program, walk.uses


class _Site(NamedTuple):
    """An equation, and what is known where it stands.

    Attributes:
      program: that it is one of.
      number: its own in the program.
      equation: itself.
      seen: for each input the view that it is, None for others.
      integers: for each input what is known of it beforehand.
      loops: lengths of the loops around, the outermost first.
    """

    program: Program
    number: int
    equation: Any
    seen: Sequence[Any]
    integers: Sequence[Known | None]
    loops: tuple[int, ...]


class _Survey:
    """One walk over a program."""

    def __init__(self) -> None:
        self.uses: dict[Path, Uses] = {}
        self.places = self.equations = 0

    def uses_of(self, view: Any) -> Uses:
        uses = self.uses.setdefault(view.source, Uses(self.equations, view.steps))
        uses.steps.add(view.steps)
        return uses

    def program(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        tags: Sequence[View | None],
        loops: tuple[int, ...],
        given: Sequence[Known | None] = (),
    ) -> tuple[Program, list[View | None]]:
        """A program with its places, and of what its outputs are views."""
        program, known = Program(jaxpr, consts), dict[Any, View]()
        readers = [*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars]
        counts = Counter(v for v in readers if not isinstance(v, Literal))

        def of(variable: Any) -> View | None:
            return None if isinstance(variable, Literal) else known.get(variable)

        def learn(variables: Sequence[Any], views: Sequence[View | None]) -> None:
            for variable, view in zip(variables, views, strict=True):
                # of the results of places only those that go one way
                if view is not None and (_is_parameter(view) or counts[variable] == 1):
                    known[variable] = view

        learn(jaxpr.invars, tags)
        integers = Integers(jaxpr, consts, given)
        for number, equation in enumerate(jaxpr.eqns):
            self.equations += 1
            seen = [of(v) for v in equation.invars]
            if any(view is not None for view in seen):
                whole = integers.of(equation.invars)
                found = self._equation(_Site(program, number, equation, seen, whole, loops))
                learn(equation.outvars, found or [None] * len(equation.outvars))
            else:
                integers.follow(equation)
        return program, [of(v) for v in jaxpr.outvars]

    def _equation(self, site: _Site) -> list[View | None] | None:
        equation, seen = site.equation, site.seen
        name = equation.primitive.name
        inner = _called(equation)
        if inner is not None:
            return self._enter(site, inner)
        if name == "scan":
            self._scan(site)
            return None
        if name == "cond":
            self._branches(site)
            return None
        parameters = [view for view in seen if _is_parameter(view)]
        if len(parameters) == 1:
            side = seen.index(parameters[0])
            part = _part(site, side)
            if part is not None:
                return [part]
            if side in _SIDES.get(name, ()):
                return [self._place(site, side)]
        if sum(view is not None for view in seen) == 1:
            moved = _rearranged(equation, seen)
            if moved is not None:
                return [moved]
        elif name == "add" and len(parameters) == 1:
            (result,) = (view for view in seen if not _is_parameter(view))
            shape = equation.outvars[0].aval.shape
            if result.shape == shape:
                # of its shape, or one number
                spread = parameters[0].broadcast(shape, range(len(parameters[0].axes)))
                self.uses_of(spread).biases.append(Bias(spread, result))
                return None
        cast = name == "convert_element_type"
        said = f"a cast to {equation.params['new_dtype'].name}" if cast else name
        for view in parameters:
            self.uses_of(view).others.append(said)
        return None

    def _enter(self, site: _Site, inner: Any) -> list[View | None]:
        """Follows a program within the program."""
        called, found = self.program(
            inner.jaxpr, inner.consts, site.seen, site.loops, site.integers
        )
        if next(called.numbers(), None) is not None:
            site.program.inner[site.number] = (called,)
        return found

    def _branches(self, site: _Site) -> None:
        """Follows all branches, with what each sees of parameters."""
        tags = [view if _is_parameter(view) else None for view in site.seen[1:]]
        branches = []
        for inner in site.equation.params["branches"]:
            called, found = self.program(
                inner.jaxpr, inner.consts, tags, site.loops, site.integers[1:]
            )
            branches.append(called)
            for view in found:
                if _is_parameter(view):
                    self.uses_of(view).others.append("cond")
        if any(next(called.numbers(), None) is not None for called in branches):
            site.program.inner[site.number] = tuple(branches)

    def _scan(self, site: _Site) -> None:
        equation, loops = site.equation, site.loops
        consts, carried = loop_inputs(equation)
        tags: list[View | None] = []
        loop = Loop(len(loops), self.equations, equation.params["reverse"])
        for position, view in enumerate(site.seen):
            inside = None
            if _is_parameter(view):
                if position < consts:
                    inside = view
                elif position >= consts + carried:
                    part = view.part_at(0, loop)
                    inside = part and part.squeeze([0])
                if inside is None:
                    self.uses_of(view).others.append("scan")
            tags.append(inside)
        within = site._replace(
            seen=tags,
            integers=in_loop(equation, site.integers, loop),
            loops=(*loops, equation.params["length"]),
        )
        for view in self._enter(within, equation.params["jaxpr"]):
            if _is_parameter(view):
                self.uses_of(view).others.append("scan")

    def _place(self, site: _Site, side: int) -> View:
        equation, view = site.equation, site.seen[side]
        other, result = equation.invars[1 - side].aval, equation.outvars[0].aval
        place = Place(
            self.places,
            equation.primitive.name,
            view,
            side,
            equation.params,
            other.shape,
            jax.ShapeDtypeStruct(result.shape, result.dtype),
            site.loops,
        )
        self.places += 1
        self.uses_of(view).places.append(place)
        site.program.places[site.number] = place
        return View.of(place.number, result.shape)


def _is_parameter(view: Any) -> bool:
    return view is not None and isinstance(view.source, tuple)


def _part(site: _Site, side: int) -> View | None:
    """The part of a view that an equation takes by what counts the steps of loops.

    None for others, and for one row of a table, which stays one.
    """
    equation, view = site.equation, site.seen[side]
    name, sizes = equation.primitive.name, equation.params.get("slice_sizes", ())
    matrix = sum(size > 1 for size in sizes) > 1
    if side or name not in ("dynamic_slice", "gather") or (name == "gather" and not matrix):
        return None
    starts = starts_of(equation, site.integers)
    if starts is None:
        return None
    part: View | None = view
    for axis, (size, full) in enumerate(zip(sizes, view.shape, strict=True)):
        start = starts.get(axis)
        if size == full or part is None:
            continue
        if size != 1 or start is None or start.loop is None:
            return None
        part = part.part_at(axis, start.loop, tuple(map(int, start.values())))
    dropped = equation.params["dimension_numbers"].collapsed_slice_dims if name == "gather" else ()
    return part and part.squeeze(dropped)


def _called(equation: Any) -> Any:
    """The program that an equation calls once, None for other equations."""
    if equation.primitive.name not in (*_CALLS, *REMAT):
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return inner if hasattr(inner, "consts") else jax.extend.core.ClosedJaxpr(inner, ())


def _rearranged(equation: Any, seen: Sequence[Any]) -> View | None:
    """The view that an equation makes of its one view, None where its entries become others."""
    name, params = equation.primitive.name, equation.params
    (view,) = (one for one in seen if one is not None)
    if name in ("mul", "div") and len(seen) == 2:
        side = seen.index(view)
        other = equation.invars[1 - side]
        number = isinstance(other, Literal) and jnp.ndim(other.val) == 0
        if not number or (name == "div" and side == 1):
            return None
        value = float(other.val)
        return view.scaled(value if name == "mul" else 1 / value)
    if len(seen) != 1:
        return None
    if name == "reshape":
        return view.reshape(params["new_sizes"]) if params["dimensions"] is None else None
    if name == "transpose":
        return view.transpose(params["permutation"])
    if name == "squeeze":
        return view.squeeze(params["dimensions"])
    if name == "neg":
        return view.scaled(-1.0)
    if name in _SAME:
        return view
    if name == "convert_element_type":
        return view if jnp.issubdtype(params["new_dtype"], jnp.floating) else None
    if not _is_parameter(view):
        return None
    if name == "broadcast_in_dim":
        return view.broadcast(params["shape"], params["broadcast_dimensions"])
    if name == "slice":
        ones = (1,) * len(view.axes)
        strides = params["strides"] or ones
        return view.slice(params["start_indices"], params["limit_indices"], strides)
    return view.flip(params["dimensions"]) if name == "rev" else None
