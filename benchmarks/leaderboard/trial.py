"""One trial: a configuration in, what happened out."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.contestant import Contestant, Program, find_contestant
from benchmarks.leaderboard.identity import code_version, identity, packages, provenance, sources
from benchmarks.leaderboard.program import Evaluation, OptaxProgram
from benchmarks.leaderboard.rates import TheoreticalRate
from benchmarks.leaderboard.spectra import structure_outcome
from benchmarks.leaderboard.studies import is_tuning
from benchmarks.leaderboard.targets import reason_of
from benchmarks.leaderboard.workload import METRICS, Workload, find_workload
from natgrad_flax.arguments.scalars import check_number, check_seed
from ntk_analysis.results import plain

Config = dict[str, Any]
Outcome = dict[str, Any]

# a loss this many times the initial one does not come back within a budget
DIVERGED = 1e3
# every step at first, then every twentieth part of the steps so far
DENSE_STEPS = 20


_EXPECTED = {True: "curvature", False: "first-order", None: ""}


def execute(config: Config, submitter: str = "") -> dict[str, Any]:
    """Runs a trial.

    Args:
      config: as ``configuration`` makes it.
      submitter: who enters the contestant, for the reader.

    Returns:
      "facts" of the contestant and the workload, the "outcome", and the "command" that repeats it.

    Raises:
      ValueError: the configuration is of other code, of another workload version, or names what
        does not exist.
    """
    workload = find_workload(config["workload"])
    contestant = find_contestant(config["contestant"])
    _check(config, workload, contestant)
    with jax.enable_x64(workload.double):
        outcome = _outcome(config, contestant, workload)
    facts = {
        **contestant.facts(),
        **provenance(),
        "submitter": submitter,
        "workload_title": workload.title,
        "question": workload.question,
        "expectation": workload.expectation,
        "expected": _EXPECTED[workload.curvature_wins],
        "metric": METRICS[workload.metric].title,
        "why_target": reason_of(workload) if config["target"] is not None else "",
    }
    return {"facts": facts, "outcome": plain(outcome), "command": command(config)}


def _outcome(config: Config, contestant: Contestant, workload: Workload) -> Outcome:
    if reason := workload.missing() or contestant.unsuitable(workload):
        return {"status": "skipped", "reason": reason}
    if config["kind"] == "structure":
        return structure_outcome(contestant, workload)
    return _train(config, contestant, workload)


def configuration(
    workload: Workload,
    contestant: str,
    seed: int,
    *,
    target: float | None,
    role: str,
    learning_rate: float | None = None,
    kind: str = "timed",
    machine: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of a trial; its hash is the trial's key.

    Args:
      workload: what is trained.
      contestant: its name.
      seed: of initial parameters, batches and Monte-Carlo targets.
      target: held-out metric to reach; None runs to the end of the budget.
      role: "tuning", "evaluation", "freezing" or "structure".
      learning_rate: None leaves it to the contestant's rule.
      kind: "timed", or "structure" for isotropy and cost.
      machine: the ``identity`` of the process that will run it, if that is another one.

    Raises:
      ValueError: a seed or a learning rate out of range, or a learning rate that is not used.
    """
    entry = find_contestant(contestant)
    if learning_rate is not None:
        learning_rate = check_number("learning_rate", learning_rate, positive=True)
        rule = entry.rate_rule
        if rule != "tuned":
            raise ValueError(
                f"{contestant} has its learning rate by a rule ({rule}): leave learning_rate out, "
                "or name a tuned contestant"
            )
    return {
        "rules": RULES,
        "kind": kind,
        "role": role,
        "workload": workload.name,
        "workload_version": workload.version,
        "workload_digest": workload.digest,
        "target": target,
        "contestant": contestant,
        "learning_rate": learning_rate,
        "seed": check_seed(seed),
        "sources": sources(entry),
        **packages(entry),
        **(machine or identity()),
    }


def command(config: Config) -> str:
    """The command that repeats a trial."""
    words = ["python", "-m", "benchmarks.leaderboard", "trial", config["workload"]]
    words += [config["contestant"], "--seed", str(config["seed"])]
    if (entry := find_contestant(config["contestant"])).is_entry:
        # as seen from here; a place outside is the submitter's own affair
        file, here = entry.source.resolve(), Path.cwd()
        named = file.relative_to(here) if file.is_relative_to(here) else file.name
        words += ["--entry", str(named)]
    if config["kind"] == "structure":
        words.append("--structure")
    if config["learning_rate"] is not None:
        words += ["--learning-rate", repr(config["learning_rate"])]
    if config["kind"] == "timed" and config["target"] is None:
        words.append("--no-target")
    return shlex.join(words)


def _check(config: Config, workload: Workload, contestant: Contestant) -> None:
    for name, words, here in (
        ("rules", "other rules", RULES),
        ("workload_version", "another version of the workload", workload.version),
        ("workload_digest", "other settings of the workload", workload.digest),
        ("code", "another harness", code_version()),
        ("sources", "other sources of its contestant", sources(contestant)),
    ):
        if config[name] != here:
            raise ValueError(
                f"the trial is of {words}, {str(config[name])[:12]}, than this program, "
                f"{str(here)[:12]}: run it with the code that planned it"
            )
    tuned = contestant.rate_rule == "tuned" and config["kind"] == "timed"
    if tuned and config["learning_rate"] is None:
        raise ValueError(f"{contestant.name} is tuned: its trials need a learning rate")


@lru_cache(maxsize=2)
def _program(contestant: str, workload: str) -> Program:
    """Compiled once for all seeds and learning rates."""
    entry = find_contestant(contestant)
    where = entry.budgeted(find_workload(workload)).training_only()
    return entry.program(entry, where) if entry.program else OptaxProgram(entry, where)


@lru_cache(maxsize=2)
def _rate(contestant: str, workload: str) -> TheoreticalRate:
    """Compiled once for all seeds, as the program is."""
    program = _program(contestant, workload)
    assert isinstance(program, OptaxProgram)
    return TheoreticalRate(
        find_contestant(contestant), find_workload(workload).training_only(), program
    )


@lru_cache(maxsize=1)
def _evaluation(workload: str, validation: bool) -> Evaluation:
    evaluation = Evaluation(find_workload(workload), validation=validation)
    # compiled now: the first trial is not to pay for it
    evaluation(nnx.state(find_workload(workload).model(0)))
    return evaluation


def _train(config: Config, contestant: Contestant, workload: Workload) -> Outcome:
    seed = config["seed"]
    try:
        program = _program(contestant.name, workload.name)
    except ValueError as error:
        # what a structure refuses by shapes when it is traced: a result, as sizes are elsewhere
        return {"status": "skipped", "reason": str(error)}
    evaluate, compile_seconds = (
        _evaluation(workload.name, is_tuning(seed)),
        program.compile_seconds,
    )
    if config["role"] == "freezing":
        # a target is what a baseline reaches in its steps, on whatever machine
        workload = replace(workload, max_seconds=math.inf)
    else:
        workload = contestant.budgeted(workload)
    preparation = 0.0
    if config["learning_rate"] is not None:
        rate, note = config["learning_rate"], "tuned"
    elif contestant.rate_rule == "theoretical":
        rule = _rate(contestant.name, workload.name)
        compile_seconds += rule.compile_seconds
        started = time.perf_counter()
        rate, note = rule(seed), rule.note
        preparation = time.perf_counter() - started
    else:
        rate, note = 1.0, contestant.rate_rule

    entered = time.perf_counter()
    state = program.start(seed, rate)
    program.wait(state)
    order = batches(workload, seed)
    clock = evaluation_clock = 0.0
    step, status, reason = 0, "", ""
    curve: dict[str, list[float]] = {"steps": [], "seconds": [], "train": [], "held_out": []}
    while True:
        started = time.perf_counter()
        train, held_out = evaluate(program.parameters(state))
        evaluation_clock += time.perf_counter() - started
        for name, value in zip(curve, (step, clock, train, held_out), strict=True):
            curve[name].append(value)
        status, reason = _verdict(config["target"], curve, workload)
        if status:
            break
        upto = min(next_evaluation(step), workload.max_steps)
        started = time.perf_counter()
        while step < upto:
            state = program.step(state, next(order))
            step += 1
        program.wait(state)
        clock += time.perf_counter() - started
    wall = preparation + time.perf_counter() - entered
    reached = status == "reached"
    finite = [value for value in curve["held_out"] if math.isfinite(value)]
    return {
        "status": status,
        "reason": reason,
        "steps_to_target": step if reached else None,
        "seconds_to_target": clock if reached else None,
        "compile_seconds": compile_seconds,
        "preparation_seconds": preparation,
        "evaluation_seconds": evaluation_clock,
        "steps": step,
        "seconds": clock,
        # without compilation, which the trials of a contestant share
        "wall_seconds": wall,
        "harness_seconds": wall - preparation - clock - evaluation_clock,
        "final": curve["held_out"][-1],
        "best": min(finite, default=math.nan),
        "learning_rate": float(rate),
        "rate_note": note,
        "curve": curve,
    }


def next_evaluation(step: int) -> int:
    """The step of the next evaluation: each of the first ones, then in steps of 5 %."""
    return step + 1 if step < DENSE_STEPS else math.ceil(step * 1.05)


def _verdict(
    target: float | None, curve: dict[str, list[float]], workload: Workload
) -> tuple[str, str]:
    """("", "") while there is reason to go on."""
    step, clock = curve["steps"][-1], curve["seconds"][-1]
    first, train, held_out = curve["train"][0], curve["train"][-1], curve["held_out"][-1]
    if not (math.isfinite(train) and train <= DIVERGED * first):
        return (
            "diverged",
            f"training loss {train:.3g} after {step} steps, {curve['train'][0]:.3g} before",
        )
    if target is not None and held_out <= target:
        return "reached", ""
    if step >= workload.max_steps:
        return "missed", f"{workload.max_steps} steps are over"
    if clock >= workload.max_seconds:
        return "missed", f"{workload.max_seconds:g} s of training are over after {step} steps"
    return "", ""


def batches(workload: Workload, seed: int) -> Iterator[NDArray[np.integer] | None]:
    """Rows of each step: epochs without replacement, a remainder is left out.

    Drawn anew in each epoch, unless the settings of the workload fix their order.
    """
    if workload.batch_size is None:
        while True:
            yield None
    size, rng = workload.batch_size, np.random.default_rng(seed)
    samples = len(workload.data().x_train)
    fixed = workload.settings.get("order") == "fixed"
    while True:
        order = np.arange(samples) if fixed else rng.permutation(samples)
        for first in range(0, samples - size + 1, size):
            yield order[first : first + size]
