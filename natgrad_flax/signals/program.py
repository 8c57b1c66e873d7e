"""The traced program of a model: where its parameters act affinely, and running it with a tape.

A place is an equation that is linear in a parameter, or in a rearranged part of it: a product
(``dot_general``), a convolution, the rows of a table (``gather``). The program is run anew with
something added to the results of places and with their other operand recorded; the derivative with
respect to what was added is D, what was recorded is a. Programs within the program are followed:
those of ``jit`` and ``checkpoint``, loops (``scan``), where both get an axis of steps, and branches
(``cond``), where both are zero in those that are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal

from natgrad_flax.signals.views import Steps, View, first_axes
from natgrad_flax.xla.convolution import conv_general_dilated

Path = tuple[Any, ...]
"""Where a parameter stands in a model: names of attributes and numbers in lists."""

REMAT = ("checkpoint", "remat", "remat2")
"""Primitives of programs that are run again for their derivatives."""


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
      loops: those that take another part of it at each step, the outermost first.
      places: where it acts as weights.
      biases: where it is added to the results of places.
      others: names of the primitives that use it in any other way.
      steps: what each use says of these loops.
    """

    first: int
    loops: Steps = ()
    places: list[Place] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    steps: set[Steps] = field(default_factory=set)

    @property
    def equally_often(self) -> bool:
        """Whether each use takes the same parts, and each of them as often as the others."""
        counts = [_together(steps) for steps in self.steps]
        taken = {() if own.all() else tuple(own > 0) for own in counts}
        return len(taken) < 2 and all(len({*own} - {0}) == 1 for own in counts)

    def lead(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The first axes of a shape that the loops around each use go through, () without any."""
        counts = {first_axes(steps, shape) for steps in self.steps}
        return shape[: counts.pop() or 0] if len(counts) == 1 else ()

    def parts(self, shape: tuple[int, ...]) -> list[int | None]:
        """The steps of these loops together; [None] without any."""
        lead = self.lead(shape)
        return list(range(math.prod(lead))) if lead else [None]


def _together(steps: Steps) -> Any:
    """How often loops within each other take each part, (parts,)."""
    counts = np.ones(1, int)
    for step in steps:
        counts = np.kron(counts, step.counts)
    return counts


@dataclass
class Program:
    """A program with its places.

    Attributes:
      jaxpr: its equations.
      consts: its constants.
      places: by the number of the equation.
      inner: programs within it that hold places, by the number of the equation: the one that it
        calls, or all branches.
    """

    jaxpr: Any
    consts: Sequence[Any]
    places: dict[int, Place] = field(default_factory=dict)
    inner: dict[int, tuple[Program, ...]] = field(default_factory=dict)

    def all_places(self) -> Iterator[Place]:
        """Also those of the programs within."""
        yield from self.places.values()
        for programs in self.inner.values():
            for program in programs:
                yield from program.all_places()

    def numbers(self) -> Iterator[int]:
        """Of all places."""
        return (place.number for place in self.all_places())


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
                inner = program.inner[number]
                numbers = (n for within in inner for n in within.numbers())
                own = {n: perturbations[n] for n in numbers if n in perturbations}
                follow = _INSIDE.get(equation.primitive.name, _entered)
                found, more = follow(equation, inner, given, own)
                tape.update(more)
            else:
                found = bind(equation, given)
        place = program.places.get(number)
        if place is not None and place.number in perturbations:
            tape[place.number] = given[1 - place.side]
            found = [found[0] + perturbations[place.number]]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars], tape


def bind(equation: Any, given: list[Any]) -> list[Any]:
    """The results of an equation."""
    primitive, params = equation.primitive, equation.params
    if primitive.name == "conv_general_dilated":
        return [conv_general_dilated(*given, **params)]
    found = primitive.bind(*given, **primitive.get_bind_params(params))
    return list(found) if primitive.multiple_results else [found]


def _entered(
    equation: Any, programs: tuple[Program, ...], given: list[Any], perturbations: Tape
) -> tuple[list[Any], Tape]:
    (program,) = programs

    def call(given: list[Any], perturbations: Tape) -> tuple[list[Any], Tape]:
        return run(program, given, perturbations)

    if equation.primitive.name in REMAT:
        params = equation.params
        call = jax.checkpoint(
            call, policy=params.get("policy"), prevent_cse=params.get("prevent_cse", True)
        )
    return call(given, perturbations)


def _branched(
    equation: Any, branches: tuple[Program, ...], given: list[Any], perturbations: Tape
) -> tuple[list[Any], Tape]:
    """The branch that is taken; what the others would have recorded is zero."""
    del equation
    index, *operands = given

    def taken(branch: Program) -> Any:
        def call(operands: list[Any], perturbations: Tape) -> tuple[list[Any], Tape]:
            numbers = [n for n in branch.numbers() if n in perturbations]
            return run(branch, operands, {n: perturbations[n] for n in numbers})

        return call

    calls = [taken(branch) for branch in branches]
    tapes = [jax.eval_shape(call, operands, perturbations)[1] for call in calls]
    shapes = {number: shape for tape in tapes for number, shape in tape.items()}

    def filled(call: Any) -> Any:
        def with_all(operands: list[Any], perturbations: Tape) -> tuple[list[Any], Tape]:
            found, tape = call(operands, perturbations)
            rest = {n: jnp.zeros(s.shape, s.dtype) for n, s in shapes.items() if n not in tape}
            return found, tape | rest

        return with_all

    return jax.lax.switch(index, [filled(call) for call in calls], operands, perturbations)


def _scanned(
    equation: Any, programs: tuple[Program, ...], given: list[Any], perturbations: Tape
) -> tuple[list[Any], Tape]:
    """A loop whose body is run with what is added at each step."""
    (program,) = programs
    params = equation.params
    consts, carry = loop_inputs(equation)

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


_INSIDE = {"scan": _scanned, "cond": _branched}


def loop_inputs(equation: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried from step to step.

    Told by shapes, as the names of its parameters are those of one version of JAX.
    """
    body = equation.params["jaxpr"].jaxpr
    pairs = zip(equation.outvars, body.outvars, strict=True)
    carried = sum(outer.aval.shape == inner.aval.shape for outer, inner in pairs)
    pairs = zip(equation.invars, body.invars, strict=True)
    scanned = sum(outer.aval.shape != inner.aval.shape for outer, inner in pairs)
    return len(equation.invars) - carried - scanned, carried
