"""What one natural-gradient step costs, as the ratio to one SGD step.

Both steps are jitted functions from parameters to parameters, on the same model and batch, timed
alternately in one process. The asv suite tracks the ratio and what the compiler knows for certain;
``python -m benchmarks.step`` prints the table of README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.problems import LINES, STRUCTURES, Entry, Line, Problem, make_problem

LEARNING_RATE = 0.1
DAMPING = ng.RelativeDamping(1e-3)
SGD_PER_ROUND = 3
MIN_REPEATS = 7


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


@dataclass(frozen=True)
class Measurement:
    """One cell of the table.

    Attributes:
      line: key of the line.
      structure: key of the structure.
      ratio: median natural-gradient step over median SGD step.
      target: the ratio to reach.
      natural_seconds: every timed natural-gradient step, in order.
      sgd_seconds: every timed SGD step, in order.
      temporary_bytes: XLA's temporary memory of the natural-gradient step.
      flops: its floating-point operations by XLA's count, without LAPACK calls.
      compile_seconds: tracing and compiling it.
    """

    line: str
    structure: str
    ratio: float
    target: float
    natural_seconds: tuple[float, ...]
    sgd_seconds: tuple[float, ...]
    temporary_bytes: int
    flops: float
    compile_seconds: float


def sgd_step(line: Line, graphdef: Any) -> Callable[[nnx.State, Array, Array], Any]:
    """The jitted step (parameters, x, y) -> (parameters, loss) of gradient descent."""

    def loss(state: nnx.State, x: Array, y: Array) -> Array:
        return line.loss(nnx.merge(graphdef, state)(x), y)

    @jax.jit
    def step(state: nnx.State, x: Array, y: Array) -> tuple[nnx.State, Array]:
        value, gradient = jax.value_and_grad(loss)(state, x, y)
        return _descend(state, gradient), value

    return step


def natural_step(
    line: Line, entry: Entry, graphdef: Any
) -> Callable[[nnx.State, Array, Array, Array], nnx.State]:
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


def damping(line: Line, entry: Entry) -> float | ng.RelativeDamping:
    """The damping at which a structure is measured on a line."""
    return 0.0 if line.undamped and entry.undamped else DAMPING


def _descend(state: nnx.State, direction: nnx.State) -> nnx.State:
    return jax.tree.map(lambda leaf, slope: leaf - LEARNING_RATE * slope, state, direction)


def compile_natural(
    line: Line, entry: Entry, problem: Problem
) -> tuple[jax.stages.Compiled, float]:
    """The executable of the natural-gradient step, and the seconds of tracing and compiling."""
    graphdef, state = nnx.split(problem.model)
    start = time.perf_counter()
    step = natural_step(line, entry, graphdef)
    compiled = step.lower(state, problem.x, problem.y, problem.key).compile()  # type: ignore[attr-defined]
    return compiled, time.perf_counter() - start


def prepare(line: Line, entry: Entry) -> Steps:
    """Compiles both steps."""
    problem = make_problem(line, entry)
    graphdef, state = nnx.split(problem.model)
    natural, seconds = compile_natural(line, entry, problem)
    sgd = sgd_step(line, graphdef)
    return Steps(
        state,
        lambda: sgd(state, problem.x, problem.y)[0],
        lambda: natural(state, problem.x, problem.y, problem.key),
        natural,
        seconds,
    )


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
        sgd.extend(_seconds(steps.sgd) for _ in range(SGD_PER_ROUND))
        natural.append(_seconds(steps.natural))
    return natural, sgd


def _seconds(step: Callable[[], nnx.State]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start


def check_finite(state: nnx.State) -> None:
    """Raises FloatingPointError where parameters are not finite."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state)):
        raise FloatingPointError("the step gives parameters that are not finite")


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """The temporary memory that XLA reserves for an executable."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not report the memory of an executable")
    return int(analysis.temp_size_in_bytes)


def flops(compiled: jax.stages.Compiled) -> float:
    """Floating-point operations by XLA's count; LAPACK calls and repeats of loops are not in it."""
    analysis = compiled.cost_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not report the work of an executable")
    return float(analysis["flops"])


def measure(line: str, structure: str, repeats: int = MIN_REPEATS) -> Measurement:
    """One cell of the table."""
    where, entry = LINES[line], STRUCTURES[structure]
    steps = prepare(where, entry)
    natural, sgd = alternate(steps, repeats)
    return Measurement(
        line,
        structure,
        statistics.median(natural) / statistics.median(sgd),
        where.targets[structure],
        tuple(natural),
        tuple(sgd),
        temporary_bytes(steps.natural_compiled),
        flops(steps.natural_compiled),
        steps.compile_seconds,
    )


class Step:
    """One natural-gradient step of each structure on each line (see README.md)."""

    params: ClassVar = (list(LINES), list(STRUCTURES))
    param_names: ClassVar = ["line", "structure"]

    def setup(self, line: str, structure: str) -> None:
        self.line, self.entry = LINES[line], STRUCTURES[structure]

    def _compile(self) -> tuple[jax.stages.Compiled, float]:
        return compile_natural(self.line, self.entry, make_problem(self.line, self.entry))

    def track_step_ratio(self, line: str, structure: str) -> float:
        return measure(line, structure).ratio

    def track_peak_temporary_memory(self, line: str, structure: str) -> int:
        return temporary_bytes(self._compile()[0])

    def track_flops(self, line: str, structure: str) -> float:
        return flops(self._compile()[0])

    def track_compile_time(self, line: str, structure: str) -> float:
        return self._compile()[1]

    track_step_ratio.unit = "SGD steps"  # type: ignore[attr-defined]
    track_peak_temporary_memory.unit = "bytes"  # type: ignore[attr-defined]
    track_flops.unit = "flop"  # type: ignore[attr-defined]
    track_compile_time.unit = "s"  # type: ignore[attr-defined]


def environment() -> dict[str, str]:
    """Machine, versions and date of a measurement."""
    info = Path("/proc/cpuinfo")
    models = info.read_text().splitlines() if info.exists() else []
    names = [row.split(":", 1)[1].strip() for row in models if row.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if names else os.cpu_count()),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(measurements: Sequence[Measurement], markdown: bool) -> str:
    """The measurements, one row each, as plain text or Markdown."""
    header = ("network and batch", "structure", "ratio", "target", "met", "step ms", "SGD ms")
    rows: list[tuple[str, ...]] = [(*header, "temporary MB", "Gflop", "compile s")]
    for cell in measurements:
        rows.append(
            (
                LINES[cell.line].title if markdown else cell.line,
                cell.structure,
                f"{cell.ratio:.2f}",
                f"{cell.target:g}",
                "yes" if cell.ratio <= cell.target else "no",
                f"{1e3 * statistics.median(cell.natural_seconds):.1f}",
                f"{1e3 * statistics.median(cell.sgd_seconds):.1f}",
                f"{cell.temporary_bytes / 1e6:.0f}",
                f"{cell.flops / 1e9:.1f}",
                f"{cell.compile_seconds:.1f}",
            )
        )
    if markdown:
        rows.insert(1, ("---",) * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--line", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--structure", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help="timed steps of each cell")
    parser.add_argument("--markdown", action="store_true", help="a table for README.md")
    parser.add_argument("--out", type=Path, help="also write every timing to this JSON file")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    cells = [
        measure(line, structure, options.repeats)
        for line in options.line
        for structure in options.structure
    ]
    about = environment()
    print(table(cells, options.markdown))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.out:
        found = {"environment": about, "measurements": [asdict(cell) for cell in cells]}
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
