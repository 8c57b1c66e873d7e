"""How the time of a step grows with batch, width, outputs and depth, beside what theory counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from benchmarks.common import Suite, by_profile, unit
from benchmarks.problems import STRUCTURES, Case, Line
from benchmarks.programs import flops, seconds_of
from benchmarks.step import first_step
from natgrad_flax.structures import Geometry
from ntk_analysis.cost import structure_cost

BASE = by_profile(
    smoke=Case(32, 3, 16, 2, "mse"),
    fast=Case(512, 3, 256, 2, "mse"),
    regular=Case(1024, 3, 256, 4, "mse"),
    large=Case(4096, 3, 1024, 4, "mse"),
)

SIZES: dict[str, tuple[int, ...]] = by_profile(
    smoke={"samples": (8, 16)},
    fast={
        "samples": (128, 256, 512),
        "width": (256, 512, 1024),
        "outputs": (1, 2, 4),
    },
    regular={
        "samples": (64, 128, 256, 512),
        "width": (256, 512, 1024, 2048),
        "outputs": (1, 2, 4, 8),
        "depth": (3, 6, 12, 24),
    },
    large={
        "samples": (256, 512, 1024, 2048),
        "width": (1024, 2048, 4096, 8192),
        "outputs": (1, 2, 4, 8),
        "depth": (3, 6, 12, 24),
    },
)
"""What grows; the rest is as in BASE. No depth 3s + 2, where tri-diag has a singular coupling."""

CHOSEN: tuple[str, ...] = by_profile(
    smoke=("exact",),
    fast=("exact", "K-FAC"),
    regular=tuple(STRUCTURES),
    large=tuple(STRUCTURES),
)
REPEATS = by_profile(smoke=1, fast=5, regular=7, large=7)


class Growth(Suite):
    """Exponents p of time ~ size^p for a step, fitted over a few sizes, with theory beside.

    Mean squared error with the exact Fisher and relative damping, 784 inputs; the other sizes stay
    at those of the profile (fast: width 512, 3 layers, 256 samples, 2 outputs). A fitted exponent
    above the theoretical one says that something grows which should not: a copy, a loop, a
    Jacobian. One below it says that at these sizes smaller terms still count. The exponents of
    flops and of theory have no noise.
    """

    params: ClassVar = (list(CHOSEN), list(SIZES))
    param_names: ClassVar = ["structure", "size"]
    version = "1"

    def measure(self, structure: str, size: str) -> dict[str, float]:
        cases = [Case(**(vars(BASE) | {size: value})) for value in SIZES[size]]
        entry = STRUCTURES[structure]
        seconds, counted = [], []
        for case in cases:
            steps, _, _ = first_step(damped(case), entry)
            seconds.append(statistics.median(seconds_of(steps.natural) for _ in range(REPEATS)))
            counted.append(flops(steps.natural_compiled))
        theory = [theoretical_flops(structure, case) for case in cases]
        sizes = SIZES[size]
        return {
            "seconds": round(exponent(sizes, seconds), 3),
            "flops": round(exponent(sizes, counted), 3),
            "theory": round(exponent(sizes, theory), 3),
            "largest": seconds[-1],
        }

    @unit("exponent")
    def track_time_exponent(self, *case: Any) -> float:
        """Fitted to the median seconds of each size: up means that large problems got dearer."""
        return self.figures["seconds"]

    @unit("exponent")
    def track_flops_exponent(self, *case: Any) -> float:
        """Fitted to XLA's flops, which have no LAPACK calls: it moves with the program only."""
        return self.figures["flops"]

    @unit("exponent")
    def track_theoretical_exponent(self, *case: Any) -> float:
        """Fitted to ``ntk_analysis.structure_cost(...).step_flops`` at the same sizes.

        The flops of the traced program with its factorisations: it moves with the program only.
        """
        return self.figures["theory"]

    @unit("seconds")
    def track_largest_step(self, *case: Any) -> float:
        """Median seconds at the largest size, to see how much an exponent stands on."""
        return self.figures["largest"]


def damped(case: Case) -> Line:
    """The line of a case, with the relative damping for every structure."""
    return dataclasses.replace(case.line(), undamped=False)


def theoretical_flops(structure: str, case: Case) -> float:
    """Flops of a damped step (``ntk_analysis.cost``)."""
    line, entry = case.line(), STRUCTURES[structure]
    bias = entry.bias_variance > 0
    layers = tuple((a + bias, b) for a, b in itertools.pairwise(line.widths))
    geometry = Geometry(layers, case.samples, case.outputs, 0.5)
    return structure_cost(entry.structure, geometry, damped=True).step_flops


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(value) against log(size) by least squares.

    Raises:
      ArithmeticError: a value is not positive and finite.
    """
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ArithmeticError(f"no power law through {list(values)} at sizes {list(sizes)}")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
