"""What it costs to begin: tracing, compiling and running a step for the first time."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.answers import check_step
from benchmarks.common import Suite, by_profile, unit
from benchmarks.problems import OPTIMIZERS, STRUCTURES, Case, Line, Problem, make_problem
from benchmarks.programs import (
    check_finite,
    instructions,
    natural_step,
    optimizer_step,
    sgd_step,
)

SGD = "SGD"
FIRST_ORDER = [SGD, "Adam"]

DEPTHS = by_profile(smoke=[3], fast=[3], regular=[3, 6, 12], large=[3, 6, 12])
WIDTH = by_profile(smoke=32, fast=512, regular=512, large=4096)
SAMPLES = by_profile(smoke=8, fast=128, regular=128, large=512)
REPEATS = by_profile(smoke=1, fast=1, regular=3, large=3)

CHOSEN = by_profile(
    smoke=[*FIRST_ORDER, "exact"],
    fast=[*FIRST_ORDER, *STRUCTURES],
    regular=[*FIRST_ORDER, *STRUCTURES],
    large=[*FIRST_ORDER, *STRUCTURES],
)

STAGES = ("trace", "compile", "first_run")


class Compile(Suite):
    """Time to the first step of a fresh process, by structure and depth, beside SGD and Adam.

    A change here is what a user waits before training starts, and for every new shape again. Times
    move with JAX, XLA and the machine; ``track_instructions`` moves with our program alone.
    The network has ten outputs, with the cross-entropy and its exact Fisher.
    """

    params: ClassVar = (CHOSEN, DEPTHS)
    param_names: ClassVar = ["structure", "depth"]
    version = "1"

    def measure(self, structure: str, depth: int) -> dict[str, float]:
        line = Case(WIDTH, depth, SAMPLES, 10).line()
        problem = make_problem(line, STRUCTURES.get(structure, STRUCTURES["exact"]))
        jax.block_until_ready((nnx.state(problem.model), problem.x, problem.y))
        # a cache of an earlier process would be measured instead
        jax.config.update("jax_enable_compilation_cache", False)
        # JAX settles on it at the first compilation of a process
        compilation_cache.reset_cache()
        rounds = []
        for _ in range(REPEATS):
            jax.clear_caches()
            compiled, seconds = _begin(structure, line, problem)
            rounds.append(seconds)
        found = {name: statistics.median(row[name] for row in rounds) for name in STAGES}
        return {**found, "total": sum(found.values()), "instructions": instructions(compiled)}

    @unit("seconds")
    def track_time_to_first_step(self, *case: Any) -> float:
        """Tracing, compiling and the first run together: what a user waits."""
        return self.figures["total"]

    @unit("seconds")
    def track_trace(self, *case: Any) -> float:
        """Python's part, from functions to StableHLO: up means more or slower Python of ours."""
        return self.figures["trace"]

    @unit("seconds")
    def track_compile(self, *case: Any) -> float:
        """XLA's part: up means a larger program (see the instructions) or a slower compiler."""
        return self.figures["compile"]

    @unit("seconds")
    def track_first_run(self, *case: Any) -> float:
        """The first execution, waited for: up means a slower step or more memory touched."""
        return self.figures["first_run"]

    @unit("instructions")
    def track_instructions(self, *case: Any) -> float:
        """Instructions of the optimised HLO: the same at every run, so any change is a change."""
        return self.figures["instructions"]


def _begin(
    structure: str, line: Line, problem: Problem
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The executable, and the seconds of each stage.

    Raises:
      FloatingPointError, ArithmeticError: the first step is wrong.
    """
    graphdef, state = nnx.split(problem.model)
    args: tuple[Any, ...] = (state, problem.x, problem.y)
    if structure == SGD:
        step = sgd_step(line, graphdef)
    elif structure in FIRST_ORDER:
        optimizer = OPTIMIZERS[structure]
        step = optimizer_step(line, graphdef, optimizer)
        args = (state, optimizer.init(state), *args[1:])
    else:
        step, args = natural_step(line, STRUCTURES[structure], graphdef), (*args, problem.key)
    marks = [time.perf_counter()]
    lowered = step.lower(*args)
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())
    after = jax.block_until_ready(compiled(*args))
    marks.append(time.perf_counter())
    if structure in FIRST_ORDER:
        check_finite(after[0])
    else:
        check_step(line, STRUCTURES[structure], problem, after)
    seconds = [end - begin for begin, end in itertools.pairwise(marks)]
    return compiled, dict(zip(STAGES, seconds, strict=True))
