"""What one natural-gradient step costs, as the ratio to one SGD step.

Both steps are jitted functions from parameters to parameters, on the same model and batch, timed
alternately in one process. Adam, Shampoo and SOAP stand beside them, as means over the steps from
one renewal to the next. The asv suite tracks the ratio and what the compiler knows for certain;
``python -m benchmarks.step`` prints the table of docs/structures.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax

from benchmarks.answers import check_step
from benchmarks.common import StepSuite, by_profile, unit
from benchmarks.machine import check_machine, cores, processor
from benchmarks.problems import (
    LINES,
    OPTIMIZERS,
    PERIOD,
    STRUCTURES,
    TIMING_SKIPS,
    Case,
    Entry,
    Line,
    make_problem,
    skip_reason,
)
from benchmarks.programs import (
    Steps,
    alternate,
    flops,
    peak_bytes,
    prepare,
    prepare_optimizer,
    temporary_bytes,
)
from ntk_analysis.results import write_json

MIN_REPEATS = 7

ALL = (["mse", "cross-entropy"], ["exact", "mc"])

CASES = by_profile(
    smoke=([64], [3], [16], [3], ["cross-entropy"], ["exact"]),
    fast=([1024], [3], [128], [10], ["cross-entropy"], ["exact", "mc"]),
    regular=([512, 2048], [3, 6], [64, 256], [1, 10], *ALL),
    large=([1024, 4096, 8192], [3, 6], [128, 1024], [1, 10], *ALL),
)
"""Widths, depths, samples, outputs, losses, kinds of Fisher.

No depth 3s + 2, where tri-diag has a singular coupling.
"""

TIMED = by_profile(
    smoke=(["exact"], *CASES),
    fast=(["exact", "block-diag", "K-FAC", "quasi-diag"], *CASES[:5], ["exact"]),
    regular=(list(STRUCTURES), *CASES),
    large=(list(STRUCTURES), *CASES),
)
"""Structures and cases of StepTiming; the fast profile leaves the rest to Step."""

REPEATS = by_profile(smoke=1, fast=MIN_REPEATS, regular=MIN_REPEATS, large=15)


@dataclass(frozen=True)
class Measurement:
    """One case, or one cell of the table.

    Attributes:
      natural_seconds: every timed natural-gradient step, in order.
      sgd_seconds: every timed SGD step, in order.
      temporary_bytes: XLA's temporary memory of the natural-gradient step.
      peak_bytes: device memory of that step; see ``programs.peak_bytes``.
      flops: its floating-point operations by XLA's count, without LAPACK calls.
      compile_seconds: tracing and compiling it.
      defect: |G u - g| / |g| of the step that was timed; see ``answers.check_step``. NaN of an
        optimizer that solves no system.
      scale: <G u, g> / <g, g> of the same, which should be 1.
    """

    natural_seconds: tuple[float, ...]
    sgd_seconds: tuple[float, ...]
    temporary_bytes: int
    peak_bytes: int
    flops: float
    compile_seconds: float
    defect: float
    scale: float

    @property
    def natural(self) -> float:
        """Median seconds of the natural-gradient step."""
        return statistics.median(self.natural_seconds)

    @property
    def sgd(self) -> float:
        """Median seconds of the SGD step."""
        return statistics.median(self.sgd_seconds)

    @property
    def ratio(self) -> float:
        """Median natural-gradient step over median SGD step."""
        return self.natural / self.sgd


@dataclass(frozen=True)
class Cell:
    """A measurement with its place in the table of docs/structures.md.

    Attributes:
      line: key of the line.
      structure: key of the structure, or of the optimizer.
      found: what was measured.
    """

    line: str
    structure: str
    found: Measurement

    @property
    def target(self) -> float:
        """The ratio to reach."""
        return LINES[self.line].ratios[self.structure]

    def record(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        names = {"line": self.line, "structure": self.structure}
        return {**names, "ratio": self.found.ratio, "target": self.target, **asdict(self.found)}


def measure(line: Line, entry: Entry, repeats: int = MIN_REPEATS) -> Measurement:
    """Compiles both steps, checks the answer of the natural one, and times them.

    Args:
      line: network, batch and loss.
      entry: the structure.
      repeats: timed natural-gradient steps.

    Raises:
      FloatingPointError: parameters that are not finite.
      ArithmeticError: the step is not the natural gradient of the structure.
    """
    steps, peak, (defect, scale) = first_step(line, entry)
    natural, sgd = alternate(steps, repeats)
    return _measurement(steps, peak, natural, sgd, defect, scale)


def _measurement(
    steps: Steps,
    peak: int,
    natural: Sequence[float],
    sgd: Sequence[float],
    defect: float = math.nan,
    scale: float = math.nan,
) -> Measurement:
    return Measurement(
        tuple(natural),
        tuple(sgd),
        temporary_bytes(steps.natural_compiled),
        peak,
        flops(steps.natural_compiled),
        steps.compile_seconds,
        defect,
        scale,
    )


def measure_optimizer(line: Line, name: str, repeats: int = MIN_REPEATS) -> Measurement:
    """Times an optimizer on gradients alone: means over PERIOD steps, with one renewal in each.

    There is no system that its answer could be put into. The flops are those of a step that renews.

    Raises:
      FloatingPointError: parameters that are not finite.
    """
    steps = prepare_optimizer(line, name)
    jax.block_until_ready(steps.natural())
    peak = peak_bytes(steps.natural_compiled)
    periods, sgd = alternate(steps, repeats)
    return _measurement(steps, peak, [period / PERIOD for period in periods], sgd)


def first_step(line: Line, entry: Entry) -> tuple[Steps, int, tuple[float, float]]:
    """The compiled steps after one natural-gradient step, its peak memory and what the check found.

    Raises:
      FloatingPointError, ArithmeticError: the step is wrong; see ``answers.check_step``.
    """
    steps = prepare(line, entry)
    after = jax.block_until_ready(steps.natural())
    peak = peak_bytes(steps.natural_compiled)
    return steps, peak, check_step(line, entry, make_problem(line, entry), after)


class Step(StepSuite):
    """One natural-gradient step of each structure against network, batch, loss and kind of Fisher.

    A change here is a change of what training costs. The flops and bytes are the compiler's and
    carry no noise: where they stay and a time moves, the machine or a library did it; where they
    move, the program did.
    """

    params: ClassVar = (list(STRUCTURES), *CASES)
    param_names: ClassVar = ["structure", "width", "depth", "samples", "outputs", "loss", "fisher"]
    version = "1"

    def skipped(self, structure: str, *sizes: Any) -> str | None:
        return skip_reason(Case(*sizes))

    def measure(self, structure: str, *sizes: Any) -> dict[str, float]:
        found = measure(Case(*sizes).line(), STRUCTURES[structure], REPEATS)
        return {
            "ratio": found.ratio,
            "natural": found.natural,
            "sgd": found.sgd,
            "flops": found.flops / 1e9,
            "temporary": found.temporary_bytes,
            "peak": found.peak_bytes,
        }

    @unit("bytes")
    def track_peak_memory(self, *case: Any) -> float:
        """Device memory of the step with parameters, batch and result.

        Counted by the device in this process where it counts (GPUs), else planned by XLA. Up means
        that smaller networks and batches fit.
        """
        return self.figures["peak"]


class StepTiming:
    """asv's own statistics of the step, and the memory of the process: for ``asv continuous``.

    ``time_step`` gives the spread that ``asv compare`` needs to tell a change from noise; the same
    change must show in ``Step``. Compiling, warm-up and the check of the answer are in the set-up.
    """

    params: ClassVar = TIMED
    param_names: ClassVar = Step.param_names
    version = "1"
    timeout = 900
    number = 1
    repeat = by_profile(
        smoke=(1, 1, 1.0), fast=(3, 15, 1.0), regular=(5, 30, 5.0), large=(5, 50, 20.0)
    )
    rounds = by_profile(smoke=1, fast=1, regular=2, large=2)
    warmup_time = by_profile(smoke=0.0, fast=0.1, regular=0.5, large=1.0)

    steps: Steps | None = None

    def setup(self, structure: str, *sizes: Any) -> None:
        # asv calls it again before every sample
        if self.steps is not None:
            return
        case = Case(*sizes)
        reason = skip_reason(case, TIMING_SKIPS)
        if reason:
            raise NotImplementedError(reason)
        check_machine()
        self.steps, _, _ = first_step(case.line(), STRUCTURES[structure])

    def time_step(self, *case: Any) -> None:
        """Seconds of one step, waited for: up means slower training on this machine."""
        assert self.steps is not None
        jax.block_until_ready(self.steps.natural())

    def peakmem_step(self, *case: Any) -> None:
        """Largest resident memory of the process on the host, JAX and compilation included."""
        assert self.steps is not None
        jax.block_until_ready(self.steps.natural())


def environment() -> dict[str, str]:
    """Machine, versions and date of a measurement."""
    return {
        "processor": processor(),
        "cores": str(cores()),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(cells: Sequence[Cell], markdown: bool) -> str:
    """The measurements, one row each, as plain text or Markdown."""
    header = ("network and batch", "structure", "ratio", "target", "met", "step ms", "SGD ms")
    rows: list[tuple[str, ...]] = [(*header, "temporary MB", "Gflop", "compile s")]
    for cell in cells:
        found = cell.found
        rows.append(
            (
                LINES[cell.line].title if markdown else cell.line,
                cell.structure,
                f"{found.ratio:.2f}",
                f"{cell.target:g}",
                "yes" if found.ratio <= cell.target else "no",
                f"{1e3 * found.natural:.1f}",
                f"{1e3 * found.sgd:.1f}",
                f"{found.temporary_bytes / 1e6:.0f}",
                f"{found.flops / 1e9:.1f}",
                f"{found.compile_seconds:.1f}",
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


def _measured(line: Line, name: str, repeats: int) -> Measurement:
    if name in OPTIMIZERS:
        return measure_optimizer(line, name, repeats)
    return measure(line, STRUCTURES[name], repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    everyone = [*STRUCTURES, *OPTIMIZERS]
    parser.add_argument("--line", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--structure", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help="timed steps of each cell")
    parser.add_argument("--markdown", action="store_true", help="a table for the pages of docs")
    parser.add_argument("--out", type=Path, help="also write every timing to this JSON file")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    wanted = [
        (line, structure)
        for line in options.line
        for structure in options.structure
        if structure in LINES[line].ratios
    ]
    if not wanted:
        parser.error(
            f"{', '.join(options.line)}: no target for {', '.join(options.structure)}; "
            "benchmarks/problems.py has them"
        )
    cells = [
        Cell(line, structure, _measured(LINES[line], structure, options.repeats))
        for line, structure in wanted
    ]
    about = environment()
    print(table(cells, options.markdown))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.out:
        records = [cell.record() for cell in cells]
        write_json(
            options.out,
            {"command": "benchmarks.step", "environment": about, "measurements": records},
        )


if __name__ == "__main__":
    main()
