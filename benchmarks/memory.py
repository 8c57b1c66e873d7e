"""How large a batch or a network fits: XLA's plans of steps that are compiled and never run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.common import Suite, by_profile, unit
from benchmarks.compile import SGD
from benchmarks.problems import STRUCTURES, Case, make_model
from benchmarks.programs import planned_bytes, sgd_step, unchecked_step
from natgrad_flax.arguments.memory import available_memory

BUDGET = by_profile(smoke=2**26, fast=2**30, regular=2**32, large=2**36)
"""Bytes for arguments, results and temporary memory of a step: 64 MiB, 1, 4 and 64 GiB."""

GRID = 2 ** (1 / 8)
"""Ratio of neighbouring sizes: what is found is at most 9 % below the largest that fits."""

JUMP = 24
"""Points of the grid: a factor of 8."""

BASE = Case(width=1024, depth=3, samples=128, outputs=10)
START = {"samples": 64, "width": 256}
CHOSEN = by_profile(
    smoke=([SGD, "exact"], ["samples"]),
    fast=([SGD, *STRUCTURES], ["samples"]),
    regular=([SGD, *STRUCTURES], ["samples", "width"]),
    large=([SGD, *STRUCTURES], ["samples", "width"]),
)
SLOW: dict[str, str] = by_profile(
    smoke={},
    fast=dict.fromkeys(
        ("tri-diag", "unit-wise"), "each of the programs of its search takes seconds to compile"
    ),
    regular={},
    large={},
)
"""Structures that are left out, with the reason."""


class Memory(Suite):
    """The largest batch, and the widest network, whose step fits a fixed budget.

    A 784-1024-1024-10 network and 128 samples, of which one number grows; cross-entropy with its
    exact Fisher. The budget is 1 GiB in the fast profile (smoke 64 MiB, regular 4 GiB, large
    64 GiB) for parameters, batch, result and temporary memory as XLA plans them for this device.
    Nothing runs and nothing is timed, so a change is a change of the program or of XLA: down means
    that training that fitted no longer does.
    """

    params: ClassVar = CHOSEN
    param_names: ClassVar = ["structure", "what"]
    version = "1"

    def skipped(self, structure: str, what: str) -> str | None:
        if structure in SLOW:
            return SLOW[structure]
        if available_memory() < BUDGET:
            return f"the device has less memory than the budget of {BUDGET / 2**30:g} GiB"
        return None

    def measure(self, structure: str, what: str) -> dict[str, float]:
        size, found, compiled = largest(partial(step_bytes, structure, what), START[what], BUDGET)
        return {"size": size, "bytes": found, "compiled": compiled}

    @unit("samples or units")
    def track_largest(self, *case: Any) -> float:
        """The largest N (or width) of the grid that fits: down means less fits."""
        return self.figures["size"]

    @unit("bytes")
    def track_bytes_at_largest(self, *case: Any) -> float:
        """What is planned at that size; beside the budget it shows how near the next size is."""
        return self.figures["bytes"]


def step_bytes(structure: str, what: str, size: int) -> int:
    """Bytes that XLA plans for one step.

    Args:
      structure: key of STRUCTURES, or "SGD".
      what: "samples" or "width".
      size: of it; the rest is as in BASE.

    Raises:
      ArithmeticError: less is planned than parameters, batch and result take.
    """
    case = Case(**(vars(BASE) | {what: size}))
    line, entry = case.line(), STRUCTURES.get(structure, STRUCTURES["exact"])
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make_model(line, entry)))
    x = jax.ShapeDtypeStruct((case.samples, line.widths[0]), jnp.float32)
    y = jax.ShapeDtypeStruct((case.samples, case.outputs), jnp.float32)
    if structure == SGD:
        lowered = sgd_step(line, graphdef).lower(state, x, y)
    else:
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = unchecked_step(line, entry, graphdef).lower(state, x, y, key)
    planned = planned_bytes(lowered.compile())
    floor = 4 * (2 * sum(leaf.size for leaf in jax.tree.leaves(state)) + x.size + y.size)
    if planned < floor:
        raise ArithmeticError(
            f"XLA plans {planned} bytes for a step of {structure} with {what} {size}, but its "
            f"arguments and results take {floor}"
        )
    return planned


def largest(bytes_of: Callable[[int], int], start: int, budget: int) -> tuple[int, int, int]:
    """The largest size of a geometric grid whose bytes fit, with few calls.

    Outwards from the start by at most JUMP points of the grid at a time; then between a size that
    fits and one that does not, by turns at the crossing of a power law through both and halfway.

    Args:
      bytes_of: bytes at a size, growing with it.
      start: the first size to ask for.
      budget: bytes.

    Returns:
      The size, its bytes, and how many sizes were asked for.

    Raises:
      ValueError: not even size 1 fits.
    """
    known: dict[int, int] = {}

    def over(step: int) -> float:
        """Points of the grid by which the bytes are over the budget, were they linear."""
        known[step] = known.get(step) or bytes_of(round(GRID**step))
        return math.log(known[step] / budget, GRID)

    fits = fails = step = round(math.log(start, GRID))
    while over(fits) > 0:
        if fits == 0:
            raise ValueError(f"nothing fits {budget} bytes: size 1 needs {known[0]}")
        fails, fits = fits, max(0, fits - min(JUMP, 1 + round(over(fits))))
    jump, power = 1, 2.0
    while fails == fits or over(fails) <= 0:
        # bytes that hardly grow say nothing about how far it is
        jump = 2 * jump if power < 0.1 else max(1, round(-over(fails) / power))
        fits, fails = fails, fails + min(jump, JUMP)
        power = (over(fails) - over(fits)) / (fails - fits)
    halfway = False
    while fails - fits > 1:
        share = 0.5 if halfway else over(fits) / (over(fits) - over(fails))
        step = min(max(fits + round(share * (fails - fits)), fits + 1), fails - 1)
        fits, fails = (step, fails) if over(step) <= 0 else (fits, step)
        halfway = not halfway
    return round(GRID**fits), known[fits], len(known)
