"""The traced program of a model: where its parameters act affinely, and running it with a tape.

A place is an equation that is linear in a parameter, or in a rearranged part of it: a product
(``dot_general``), a convolution, the rows of a table (``gather``). The program is run anew with
something added to the results of places and with their other operand recorded; the derivative with
respect to what was added is D, what was recorded is a. Programs within the program are followed:
those of ``jit`` and ``checkpoint``, and loops (``scan``), where both get an axis of steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

from natgrad_flax.signals.views import View
from natgrad_flax.xla.convolution import conv_general_dilated

Path = tuple[Any, ...]
"""Where a parameter stands in a model: names of attributes and numbers in lists."""

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMAT = ("checkpoint", "remat", "remat2")
_SAME = ("copy", "copy_p", "reshard", "sharding_constraint", "mesh_cast", "pvary", "pcast")
"""Primitives that leave every entry where it is, on another device at most."""
_SIDES = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}
"""By primitive which of its operands may be a parameter at a place."""


@dataclass(frozen=True)
class Place:
    """An equation that is linear in a parameter.

    Attributes:
      number: in the order of the program.
      kind: the primitive.
      view: of the parameter, by its path.
      side: which operand is the view.
      params: of the equation.
      inputs: shape of the other operand.
      outputs: shape and dtype of the result.
      loops: lengths of the loops around it, the outermost first.
    """

    number: int
    kind: str
    view: View
    side: int
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: jax.ShapeDtypeStruct
    loops: tuple[int, ...]


class Bias(NamedTuple):
    """A parameter that is added to the result of a place, which goes nowhere else.

    Attributes:
      view: of the parameter, in the shape of the sum; its strides are 0 where it repeats.
      result: view of the result, by the number of its place.
    """

    view: View
    result: View


@dataclass
class Uses:
    """What a program does with one parameter.

    Attributes:
      first: number of the equation that uses it first.
      places: where it acts as weights.
      biases: where it is added to the results of places.
      others: names of the primitives that use it in any other way.
    """

    first: int
    places: list[Place] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass
class Program:
    """A program with its places.

    Attributes:
      jaxpr: its equations.
      consts: its constants.
      places: by the number of the equation.
      inner: programs within it that hold places, by the number of the equation.
    """

    jaxpr: Any
    consts: Sequence[Any]
    places: dict[int, Place] = field(default_factory=dict)
    inner: dict[int, Program] = field(default_factory=dict)

    def numbers(self) -> Iterator[int]:
        """Of all places, also those of the programs within."""
        for place in self.places.values():
            yield place.number
        for program in self.inner.values():
            yield from program.numbers()


def survey(jaxpr: Any, tags: Sequence[View | None]) -> tuple[Program, dict[Path, Uses]]:
    """The places of a program, and what it does with its parameters.

    Args:
      jaxpr: without constants.
      tags: for each input the view that it is of a parameter, None for others.
    """
    walk = _Survey()
    program, found = walk.program(jaxpr, (), tags, ())
    for view in found:
        if _is_parameter(view):
            walk.uses_of(view).others.append("return")
    return program, walk.uses


class _Survey:
    """One walk over a program."""

    def __init__(self) -> None:
        self.uses: dict[Path, Uses] = {}
        self.places = self.equations = 0

    def uses_of(self, view: Any) -> Uses:
        return self.uses.setdefault(view.source, Uses(self.equations))

    def program(
        self, jaxpr: Any, consts: Sequence[Any], tags: Sequence[View | None], loops: tuple[int, ...]
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
        for number, equation in enumerate(jaxpr.eqns):
            self.equations += 1
            seen = [of(v) for v in equation.invars]
            if any(view is not None for view in seen):
                found = self._equation(program, number, equation, seen, loops)
                learn(equation.outvars, found or [None] * len(equation.outvars))
        return program, [of(v) for v in jaxpr.outvars]

    def _equation(
        self, program: Program, number: int, equation: Any, seen: list[Any], loops: tuple[int, ...]
    ) -> list[View | None] | None:
        name = equation.primitive.name
        inner = _called(equation)
        if inner is not None:
            return self._enter(program, number, inner, seen, loops)
        if name == "scan":
            self._scan(program, number, equation, seen, loops)
            return None
        parameters = [view for view in seen if _is_parameter(view)]
        if len(parameters) == 1:
            side = seen.index(parameters[0])
            if side in _SIDES.get(name, ()):
                return [self._place(program, number, equation, side, loops, parameters[0])]
        if sum(view is not None for view in seen) == 1:
            moved = _rearranged(equation, seen)
            if moved is not None:
                return [moved]
        elif name == "add" and len(parameters) == 1:
            (result,) = (view for view in seen if not _is_parameter(view))
            shape = equation.outvars[0].aval.shape
            if result.shape == shape:
                spread = parameters[0].broadcast(shape, range(len(shape)))
                self.uses_of(spread).biases.append(Bias(spread, result))
                return None
        cast = name == "convert_element_type"
        said = f"a cast to {equation.params['new_dtype'].name}" if cast else name
        for view in parameters:
            self.uses_of(view).others.append(said)
        return None

    def _enter(
        self, program: Program, number: int, inner: Any, seen: list[Any], loops: tuple[int, ...]
    ) -> list[View | None]:
        """Follows a program within the program."""
        called, found = self.program(inner.jaxpr, inner.consts, seen, loops)
        if next(called.numbers(), None) is not None:
            program.inner[number] = called
        return found

    def _scan(
        self, program: Program, number: int, equation: Any, seen: list[Any], loops: tuple[int, ...]
    ) -> None:
        consts, carried = _loop_inputs(equation)
        tags: list[View | None] = []
        for position, view in enumerate(seen):
            inside = None
            if _is_parameter(view):
                if position < consts:
                    inside = view
                elif position >= consts + carried:
                    inside = view.first_of_steps(len(loops))
                if inside is None:
                    self.uses_of(view).others.append("scan")
            tags.append(inside)
        inner, around = equation.params["jaxpr"], (*loops, equation.params["length"])
        for view in self._enter(program, number, inner, tags, around):
            if _is_parameter(view):
                self.uses_of(view).others.append("scan")

    def _place(
        self,
        program: Program,
        number: int,
        equation: Any,
        side: int,
        loops: tuple[int, ...],
        view: View,
    ) -> View:
        other, result = equation.invars[1 - side].aval, equation.outvars[0].aval
        place = Place(
            self.places,
            equation.primitive.name,
            view,
            side,
            equation.params,
            other.shape,
            jax.ShapeDtypeStruct(result.shape, result.dtype),
            loops,
        )
        self.places += 1
        self.uses_of(view).places.append(place)
        program.places[number] = place
        return View.of(place.number, result.shape)


def _is_parameter(view: Any) -> bool:
    return view is not None and isinstance(view.source, tuple)


def _called(equation: Any) -> Any:
    """The program that an equation calls once, None for other equations."""
    if equation.primitive.name not in (*_CALLS, *_REMAT):
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return inner if hasattr(inner, "consts") else jax.extend.core.ClosedJaxpr(inner, ())


def _loop_inputs(equation: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried from step to step.

    Told by shapes, as the names of its parameters are those of one version of JAX.
    """
    body = equation.params["jaxpr"].jaxpr
    pairs = zip(equation.outvars, body.outvars, strict=True)
    carried = sum(outer.aval.shape == inner.aval.shape for outer, inner in pairs)
    pairs = zip(equation.invars, body.invars, strict=True)
    scanned = sum(outer.aval.shape != inner.aval.shape for outer, inner in pairs)
    return len(equation.invars) - carried - scanned, carried


def _rearranged(equation: Any, seen: list[Any]) -> View | None:
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


Tape = dict[int, Array]
"""Arrays by the numbers of places."""


def run(
    program: Program, arguments: Sequence[Any], perturbations: Mapping[int, Array]
) -> tuple[list[Any], Tape]:
    """The outputs of a program with something added to the results of its places.

    Args:
      program: of ``survey``.
      arguments: its inputs.
      perturbations: what is added, by the numbers of places; those around which there are loops
        with their axes first. Other places are left as they are.

    Returns:
      The outputs, and the other operand of each of these places, with the axes of loops first.
    """
    jaxpr, tape = program.jaxpr, Tape()
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for number, equation in enumerate(jaxpr.eqns):
        given = [read(v) for v in equation.invars]
        with equation.ctx.manager:
            if number in program.inner:
                own = {
                    n: perturbations[n]
                    for n in program.inner[number].numbers()
                    if n in perturbations
                }
                follow = _scanned if equation.primitive.name == "scan" else _entered
                found, more = follow(equation, program.inner[number], given, own)
                tape.update(more)
            else:
                found = _bind(equation, given)
        place = program.places.get(number)
        if place is not None and place.number in perturbations:
            tape[place.number] = given[1 - place.side]
            found = [found[0] + perturbations[place.number]]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars], tape


def _bind(equation: Any, given: list[Any]) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    if primitive.name == "conv_general_dilated":
        return [conv_general_dilated(*given, **params)]
    found = primitive.bind(*given, **primitive.get_bind_params(params))
    return list(found) if primitive.multiple_results else [found]


def _entered(
    equation: Any, program: Program, given: list[Any], perturbations: Tape
) -> tuple[list[Any], Tape]:
    def call(given: list[Any], perturbations: Tape) -> tuple[list[Any], Tape]:
        return run(program, given, perturbations)

    if equation.primitive.name in _REMAT:
        params = equation.params
        call = jax.checkpoint(
            call, policy=params.get("policy"), prevent_cse=params.get("prevent_cse", True)
        )
    return call(given, perturbations)


def _scanned(
    equation: Any, program: Program, given: list[Any], perturbations: Tape
) -> tuple[list[Any], Tape]:
    """A loop whose body is run with what is added at each step."""
    params = equation.params
    consts, carry = _loop_inputs(equation)

    def step(carried: list[Any], parts: tuple[list[Any], Tape]) -> tuple[list[Any], Any]:
        scanned, added = parts
        found, tape = run(program, [*given[:consts], *carried, *scanned], added)
        return found[:carry], (found[carry:], tape)

    start, scanned = given[consts : consts + carry], given[consts + carry :]
    last, (stacked, tape) = jax.lax.scan(
        step,
        start,
        (scanned, perturbations),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*last, *stacked], tape
