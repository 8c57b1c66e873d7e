"""The compiled steps that the suites measure, and what XLA knows of them without running them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.problems import OPTIMIZERS, PERIOD, Entry, Line, Problem, make_problem
from natgrad_flax.optimizer.gradient import compute
from natgrad_flax.optimizer.trees import as_state
from natgrad_flax.signals.fisher import Batch, Fisher

LEARNING_RATE = 0.1
SGD_PER_ROUND = 3

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", re.MULTILINE)


@dataclass(frozen=True)
class Steps:
    """The two compiled steps of a benchmark, and the parameters that they start from.

    Attributes:
      state: the parameters.
      sgd: from no argument to the parameters after a gradient step.
      natural: the same for a natural-gradient step.
      natural_compiled: the executable of the natural-gradient step.
      compile_seconds: what tracing and compiling it took.
    """

    state: nnx.State
    sgd: Callable[[], nnx.State]
    natural: Callable[[], nnx.State]
    natural_compiled: jax.stages.Compiled
    compile_seconds: float


def sgd_step(line: Line, graphdef: Any) -> jax.stages.Wrapped:
    """The jitted step (parameters, x, y) -> (parameters, loss) of gradient descent."""
    loss = _loss(line, graphdef)

    @jax.jit
    def step(state: nnx.State, x: Array, y: Array) -> tuple[nnx.State, Array]:
        value, gradient = jax.value_and_grad(loss)(state, x, y)
        return _descend(state, gradient), value

    return step


def optimizer_step(
    line: Line, graphdef: Any, optimizer: optax.GradientTransformation
) -> jax.stages.Wrapped:
    """The jitted step (parameters, kept, x, y) -> (parameters, kept, loss) of an optimizer."""
    loss = _loss(line, graphdef)

    @jax.jit
    def step(
        state: nnx.State, kept: optax.OptState, x: Array, y: Array
    ) -> tuple[nnx.State, optax.OptState, Array]:
        value, gradient = jax.value_and_grad(loss)(state, x, y)
        updates, kept = optimizer.update(gradient, kept, state)
        return optax.apply_updates(state, updates), kept, value

    return step


def _loss(line: Line, graphdef: Any) -> Callable[[nnx.State, Array, Array], Array]:
    return lambda state, x, y: line.loss(nnx.merge(graphdef, state)(x), y)


def natural_step(line: Line, entry: Entry, graphdef: Any) -> jax.stages.Wrapped:
    """The jitted step (parameters, x, y, key) -> parameters of natural-gradient descent."""

    @jax.jit
    def step(state: nnx.State, x: Array, y: Array, key: Array) -> nnx.State:
        direction = ng.natural_gradient(
            nnx.merge(graphdef, state),
            x,
            y,
            structure=entry.structure,
            loss=line.loss,
            damping=damping(line, entry),
            fisher=line.fisher,
            key=key,
        )
        return _descend(state, direction)

    return step


def unchecked_step(line: Line, entry: Entry, graphdef: Any) -> jax.stages.Wrapped:
    """The same program without ``natural_gradient``'s look at the memory of this machine."""

    @jax.jit
    def step(state: nnx.State, x: Array, y: Array, key: Array) -> nnx.State:
        found = compute(
            nnx.merge(graphdef, state),
            Batch(x, y, key=key),
            damping(line, entry),
            structure=entry.structure,
            fisher=Fisher(line.loss, line.fisher),
        )
        return _descend(state, as_state(state, found.named()))

    return step


def _with_batch(line: Line, step: jax.stages.Wrapped, *batch: Array) -> jax.stages.Wrapped:
    """A jitted step, with its batch as constants of the program where the line asks for that."""
    if not line.closed:
        return step
    return jax.jit(lambda state, *_: step(state, *batch))


def damping(line: Line, entry: Entry) -> float | ng.RelativeDamping:
    """The damping at which a structure is measured on a line."""
    if line.undamped and entry.undamped:
        return 0.0
    return ng.RelativeDamping(entry.damping or line.damping)


def _descend(state: nnx.State, direction: nnx.State) -> nnx.State:
    return jax.tree.map(lambda leaf, slope: leaf - LEARNING_RATE * slope, state, direction)


def compile_natural(
    line: Line, entry: Entry, problem: Problem
) -> tuple[jax.stages.Compiled, float]:
    """The executable of the natural-gradient step, and the seconds of tracing and compiling."""
    graphdef, state = nnx.split(problem.model)
    start = time.perf_counter()
    step = natural_step(line, entry, graphdef)
    step = _with_batch(line, step, problem.x, problem.y, problem.key)
    compiled = step.lower(state, problem.x, problem.y, problem.key).compile()
    return compiled, time.perf_counter() - start


def prepare(line: Line, entry: Entry) -> Steps:
    """Compiles the natural-gradient step; the gradient step compiles at its first call."""
    problem = make_problem(line, entry)
    graphdef, state = nnx.split(problem.model)
    natural, seconds = compile_natural(line, entry, problem)
    sgd = _with_batch(line, sgd_step(line, graphdef), problem.x, problem.y)
    return Steps(
        state,
        lambda: sgd(state, problem.x, problem.y)[0],
        lambda: natural(state, problem.x, problem.y, problem.key),
        natural,
        seconds,
    )


def prepare_optimizer(line: Line, name: str) -> Steps:
    """Compiles the step of an optimizer; one call takes PERIOD steps, each from the one before."""
    problem, optimizer = make_problem(line), OPTIMIZERS[name]
    graphdef, state = nnx.split(problem.model)
    kept, batch = optimizer.init(state), (problem.x, problem.y)
    start = time.perf_counter()
    step = optimizer_step(line, graphdef, optimizer).lower(state, kept, *batch).compile()
    seconds = time.perf_counter() - start
    sgd = sgd_step(line, graphdef)

    def period() -> nnx.State:
        nonlocal kept
        params = state
        for _ in range(PERIOD):
            params, kept, _ = step(params, kept, *batch)
        return params

    return Steps(state, lambda: sgd(state, *batch)[0], period, step, seconds)


def alternate(steps: Steps, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of natural-gradient and of SGD steps, alternating so that both see the same machine.

    Args:
      steps: the compiled steps.
      repeats: timed natural-gradient steps; each has SGD_PER_ROUND SGD steps beside it.

    Raises:
      FloatingPointError: a step gives parameters that are not finite.
    """
    for step in (steps.sgd, steps.natural):
        check_finite(step())
    natural: list[float] = []
    sgd: list[float] = []
    for _ in range(repeats):
        sgd.extend(seconds_of(steps.sgd) for _ in range(SGD_PER_ROUND))
        natural.append(seconds_of(steps.natural))
    return natural, sgd


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of one call, waited for."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def check_finite(state: nnx.State) -> None:
    """Raises FloatingPointError where parameters are not finite."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state)):
        raise FloatingPointError("the step gives parameters that are not finite")


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """The temporary memory that XLA reserves for an executable."""
    return int(_memory(compiled).temp_size_in_bytes)


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and temporary memory of an executable by XLA's analysis."""
    memory = _memory(compiled)
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What the device had in use at most in this process, or the plan where it does not count.

    To be asked after the first step and before anything else has run.
    """
    found = jax.devices()[0].memory_stats() or {}
    return int(found.get("peak_bytes_in_use") or planned_bytes(compiled))


def flops(compiled: jax.stages.Compiled) -> float:
    """Floating-point operations by XLA's count; LAPACK calls and repeats of loops are not in it."""
    analysis = compiled.cost_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not report the work of an executable")
    return float(analysis["flops"])


def instructions(compiled: jax.stages.Compiled) -> int:
    """Instructions of the optimised HLO, those inside fusions and loops included."""
    return len(INSTRUCTION.findall(compiled.as_text() or ""))


def _memory(compiled: jax.stages.Compiled) -> Any:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not report the memory of an executable")
    return analysis
