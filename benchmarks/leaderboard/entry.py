"""Entries of others: the contract that a contestant has to keep, tried on a smoke workload.

The rules of an entry, as far as a program cannot see them for itself: it learns from the training
samples of the workload alone, and its settings are the same for all workloads (``unsuitable`` says
where it does not take part). What a program can see is tried here. The harness decides when a trial
ends and judges the parameters itself, off the clock and on samples that the contestant is not
given; so there is nothing to win by an early return, and no held-out loss to stop by.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.leaderboard.contestant import Contestant, Program
from benchmarks.leaderboard.program import Evaluation, OptaxProgram
from benchmarks.leaderboard.trial import batches
from benchmarks.leaderboard.workload import Workload, find_workload

SMOKE = ("digits-classes", "digits-fit", "matrix-completion")
"""Workloads of seconds; an entry is tried on the first that it takes part in."""

STEPS = 10
_CALLBACK = re.compile(r'custom_call_target="[^"]*callback')


def check_entry(contestant: Contestant) -> Iterator[str]:
    """Tries a contestant, and says what it found, a sentence each, as it goes.

    Args:
      contestant: that ``enlist`` has given.

    Raises:
      ValueError: it breaks a rule; says which, and what to do.
    """
    what = contestant.name
    if contestant.optimizer is None and contestant.program is None:
        raise ValueError(f"{what} has neither optimizer= nor program=: nothing trains")
    for name, text in contestant.facts().items():
        if not isinstance(text, str):
            raise ValueError(f"{what}: its {name} must be a text, got {text!r}")
    workload = _smoke(contestant)
    rate, at = 1e-3, ""
    if contestant.rate_rule == "tuned":
        rate = contestant.space(workload)[0]
        at = f" at its smallest learning rate, {rate:g}"
    if contestant.rate_rule == "theoretical" and contestant.structure is None:
        raise ValueError(
            f"{what} has no structure=, and theory no rate for it: take another rate_rule"
        )
    program = _made(contestant, workload)
    yield f"{what} compiles on {workload.name} in {program.compile_seconds:.1f} s"
    first = _run(program, workload, rate)
    # made anew, as in a process of its own
    again = _run(_made(contestant, workload), workload, rate)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    if not all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
        raise ValueError(
            f"{what} is not deterministic: two runs of {STEPS} steps from seed 0 differ; take "
            "every random number from the seed that it is given"
        )
    yield f"two runs of {STEPS} steps from one seed are equal, number by number"
    wanted = jax.eval_shape(lambda: nnx.state(workload.model(0)))
    _same_shapes(what, "parameters", jax.tree.map(np.asarray, first), wanted)
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(first)):
        raise ValueError(
            f"{what} has parameters that are not finite after {STEPS} steps{at}: let its rates "
            "begin lower, or a Fisher have more damping"
        )
    loss = Evaluation(workload)(first)[0]
    yield f"after {STEPS} steps{at} the training loss is {loss:.3g}"


def _smoke(contestant: Contestant) -> Workload:
    reasons = []
    for name in SMOKE:
        workload = find_workload(name)
        reason = workload.missing() or contestant.unsuitable(workload)
        if not reason:
            return workload.training_only()
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"{contestant.name} takes part in no smoke workload; {'; '.join(reasons)}")


def _made(contestant: Contestant, workload: Workload) -> Program:
    """Its program; that of an optax transformation has no calls to Python in it."""
    if contestant.program:
        return contestant.program(contestant, workload)
    try:
        with warnings.catch_warnings():
            # of a state that changes its shape, for which there is a sentence below
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            program = OptaxProgram(contestant, workload)
    except Exception as error:
        raise ValueError(
            f"{contestant.name} does not compile on {workload.name}, "
            f"{type(error).__name__}: {error}"
        ) from error
    state = program.start(0, 1.0)
    _same_shapes(
        contestant.name, "state", program.shapes_after(state), jax.eval_shape(lambda: state)
    )
    if _CALLBACK.search(program.code):
        raise ValueError(
            f"{contestant.name} calls Python in its step (a callback or a debug print): a step is "
            "one compiled program; take the call out"
        )
    return program


def _run(program: Program, workload: Workload, rate: float) -> nnx.State:
    state, order = program.start(0, rate), batches(workload, 0)
    for _ in range(STEPS):
        state = program.step(state, next(order))
    program.wait(state)
    return jax.tree.map(np.asarray, program.parameters(state))


def _same_shapes(what: str, part: str, found: Any, wanted: Any) -> None:
    """Raises ValueError unless two trees have the same structure, shapes and dtypes."""
    leaves, wanted_leaves = jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(wanted)
    if [path for path, _ in leaves] != [path for path, _ in wanted_leaves]:
        raise ValueError(f"{what}: its {part} is another tree after a step than before")
    for (path, after), (_, before) in zip(leaves, wanted_leaves, strict=True):
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"{what}: its {part}{jax.tree_util.keystr(path)} is {after.dtype}{after.shape} "
                f"after a step and {before.dtype}{before.shape} before"
            )
