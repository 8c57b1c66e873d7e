"""What kernels cost, as ratios to the plainest ways of computing them.

Infinite-width kernels against the recursion of Karakida & Osawa (2020, Supplement E) written by
hand; finite-width layer kernels against Jacobian contraction in neural-tangents.
``python -m benchmarks.kernels`` measures everything in one run and prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.common import Suite, by_profile, unit
from benchmarks.kernel_problems import (
    PROFILE_SIZES,
    SIZES,
    Sizes,
    analytic_works,
    check_sum,
    empirical_memory,
    empirical_works,
    layer_works,
    make_inputs,
    medians,
)
from benchmarks.step import environment

HERE = by_profile(**PROFILE_SIZES)
REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      what: the two things that are compared.
      value: the ratio, or what else is measured.
      target: what it should be, in words; "" for a row without a target.
      met: whether it is so.
      floor: the arithmetic and the traffic that no program can go below.
      seconds: medians, by name.
    """

    what: str
    value: float
    target: str
    met: bool
    floor: str
    seconds: dict[str, float]


def measure_analytic(sizes: Sizes, repeats: int) -> list[Row]:
    """Ours against the recursions written by hand."""
    found = medians(analytic_works(sizes), repeats)
    n, floor = sizes.samples, analytic_floor(sizes.samples, sizes.inputs, 3, 1)
    rows = []
    for other, target in (("jitted jnp", 1.2), ("NumPy", 0.5)):
        ratio = found["ours"] / found[other]
        pair = {name: found[name] for name in ("ours", other)}
        what = f"analytic NTK, L=3, N={n}, M_0={sizes.inputs}: ours / {other}"
        rows.append(Row(what, ratio, f"<= {target}", ratio <= target, floor, pair))
    return rows


def measure_layers(sizes: Sizes, repeats: int) -> list[Row]:
    """All layers against their sum at L = 3, and the time of all layers as the depth grows."""
    pair = medians(layer_works(make_inputs(sizes.samples, sizes.inputs), 3), repeats)
    ratio = pair["layers"] / pair["total"]
    floor = analytic_floor(sizes.samples, sizes.inputs, 3, 3)
    what = f"all 3 layer kernels / their sum, N={sizes.samples}"
    rows = [Row(what, ratio, "<= 3", ratio <= 3, floor, pair)]

    n = sizes.depth_samples
    x = make_inputs(n, sizes.inputs)
    works = {f"L={depth}": layer_works(x, depth)["layers"] for depth in sizes.depths}
    found = medians(works, repeats)
    times = [found[f"L={depth}"] for depth in sizes.depths]
    slope, offset = np.polyfit(sizes.depths, times, 1)
    before, last = sizes.depths[-2:]
    growth = found[f"L={last}"] / found[f"L={before}"]
    # halfway between linear and quadratic in the depth
    limit = 1.5 * last / before
    rows.append(
        Row(
            f"all layer kernels, N={n}: time at L={last} / L={before} "
            f"(fit {1e3 * offset:.0f} + {1e3 * slope:.1f} L ms)",
            growth,
            f"<= {limit:g}, linear",
            growth <= limit,
            analytic_floor(n, sizes.inputs, last, last),
            found,
        )
    )
    return rows


def measure_empirical(sizes: Sizes, repeats: int) -> list[Row]:
    """Finite-width kernels: time and temporary memory of Jacobian contraction over ours."""
    n, widths = sizes.empirical_samples, sizes.widths
    found = medians(empirical_works(sizes), repeats)
    name = f"{'-'.join(map(str, widths))}, N={n}, float64: neural-tangents / ours"
    ratio = found["neural-tangents"] / found["ours"]
    memory = empirical_memory(sizes)
    share = memory["neural-tangents"] / memory["ours"]
    weights = [fan_in * units for fan_in, units in itertools.pairwise(widths)]
    params = sum(weights)
    passes = 2 * n * (params + sum(weights[1:]))
    grams = 2 * n**2 * (sum(widths[:-1]) + sum(widths[1:]))
    ours = f"ours {(passes + grams) / 1e9:.2g} Gflop"
    return [
        Row(
            f"time, {name}",
            ratio,
            ">= 30",
            ratio >= 30,
            f"{ours}; contraction {2 * n**2 * params / 1e9:.2g} Gflop",
            found,
        ),
        Row(
            f"temporary memory (XLA), {name}",
            share,
            ">= 50",
            share >= 50,
            f"one Jacobian {8 * n * params / 1e6:.0f} MB; ours {memory['ours'] / 1e6:.1f} MB, "
            f"theirs {memory['neural-tangents'] / 1e6:.0f} MB",
            {},
        ),
    ]


def analytic_floor(samples: int, inputs: int, depth: int, arrays: int) -> str:
    """Half of the Gram product, one arccos an entry and activation, and the results written."""
    half = samples * (samples + 1) // 2
    return (
        f"{2 * half * inputs / 1e9:.2g} Gflop, {half * (depth - 1) / 1e6:.3g} M arccos, "
        f"{8 * samples**2 * arrays / 1e9:.2g} GB written"
    )


class AnalyticNtk(Suite):
    """The infinite-width NTK of a three-layer ReLU network, against the same recursion by hand.

    784 inputs (64 in the smoke profile), float64. Ours goes through neural-tangents block by block;
    beside it the arc-cosine recursion on whole matrices, jitted and in NumPy. Kernels that differ
    fail the case.
    """

    params: ClassVar[tuple[list[Any], ...]] = ([HERE.samples],)
    param_names: ClassVar = ["samples"]

    def measure(self, samples: int) -> dict[str, float]:
        """Seconds of ours, and its ratios to both; see the class.

        Raises:
          ArithmeticError: the kernels differ.
        """
        jitted, numpy = measure_analytic(replace(HERE, samples=samples), REPEATS)
        return {
            "seconds": jitted.seconds["ours"],
            "ratio to jitted recursion": jitted.value,
            "ratio to NumPy": numpy.value,
        }

    @unit("seconds")
    def track_seconds(self, *case: Any) -> float:
        """Median time of ours. Compare on one machine only; the ratios travel better."""
        return self.figures["seconds"]

    @unit("jitted recursions")
    def track_ratio_to_jitted_recursion(self, *case: Any) -> float:
        """Below 1 ours is faster. A rise is overhead in blocks, in neural-tangents or in ours."""
        return self.figures["ratio to jitted recursion"]

    @unit("NumPy recursions")
    def track_ratio_to_numpy(self, *case: Any) -> float:
        """The same against NumPy, which no release of JAX changes."""
        return self.figures["ratio to NumPy"]


class AnalyticLayers(Suite):
    """The kernels of all layers at infinite width, by depth, in float64.

    All L of them come from one pass, so that the time is linear in the depth. Layer kernels that
    do not sum to the NTK fail the case.
    """

    params: ClassVar[tuple[list[Any], ...]] = ([HERE.depth_samples], list(HERE.depths))
    param_names: ClassVar = ["samples", "depth"]

    def measure(self, samples: int, depth: int) -> dict[str, float]:
        """Seconds of all layers, and their ratio to the sum alone; see the class.

        Raises:
          ArithmeticError: the layers do not sum to the NTK.
        """
        works = layer_works(make_inputs(samples, HERE.inputs), depth)
        check_sum(works)
        found = medians(works, REPEATS)
        return {"seconds": found["layers"], "ratio to sum": found["layers"] / found["total"]}

    @unit("seconds")
    def track_seconds(self, *case: Any) -> float:
        """Median time. Growth faster than the depth means that work is repeated in each layer."""
        return self.figures["seconds"]

    @unit("NTKs")
    def track_ratio_to_sum(self, *case: Any) -> float:
        """All layers over the NTK alone, which writes one array where they write L."""
        return self.figures["ratio to sum"]


class EmpiricalLayers(Suite):
    """The kernels of all layers at finite width, against neural-tangents' Jacobian contraction.

    784-M-M-1 ReLU networks (64-M-M-1 in the smoke profile), float64. Ours never builds a Jacobian.
    Kernels that differ fail the case.
    """

    params: ClassVar[tuple[list[Any], ...]] = ([HERE.widths[1]], [HERE.empirical_samples])
    param_names: ClassVar = ["width", "samples"]

    def measure(self, width: int, samples: int) -> dict[str, float]:
        """Seconds and bytes of ours, and their ratios to those of the contraction.

        Raises:
          ArithmeticError: the kernels differ.
        """
        inputs, *_, outputs = HERE.widths
        sizes = replace(HERE, widths=(inputs, width, width, outputs), empirical_samples=samples)
        seconds, memory = medians(empirical_works(sizes), REPEATS), empirical_memory(sizes)
        return {
            "seconds": seconds["ours"],
            "ratio": seconds["ours"] / seconds["neural-tangents"],
            "temporary bytes": memory["ours"],
            "memory ratio": memory["ours"] / memory["neural-tangents"],
        }

    @unit("seconds")
    def track_seconds(self, *case: Any) -> float:
        """Median time of ours. A rise slows every theory at finite width."""
        return self.figures["seconds"]

    @unit("contractions")
    def track_ratio_to_contraction(self, *case: Any) -> float:
        """Time of ours over that of neural-tangents, far below 1. A rise is ours getting slower."""
        return self.figures["ratio"]

    @unit("bytes")
    def track_temporary_memory(self, *case: Any) -> float:
        """XLA's temporary memory of ours: the same on each run, so any change is the program's."""
        return self.figures["temporary bytes"]

    @unit("contractions")
    def track_memory_ratio_to_contraction(self, *case: Any) -> float:
        """Temporary memory of ours over neural-tangents': a Jacobian in ours would show here."""
        return self.figures["memory ratio"]


def table(rows: Sequence[Row], markdown: bool) -> str:
    """The rows as plain text or Markdown."""
    cells: list[tuple[str, ...]] = [("what", "value", "target", "met", "ms", "floor")]
    for row in rows:
        times = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in row.seconds.items())
        met = "yes" if row.met else "no"
        cells.append((row.what, f"{row.value:.3g}", row.target, met, times, row.floor))
    if markdown:
        cells.insert(1, ("---",) * len(cells[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return "\n".join("  |  ".join(row) for row in cells)


MEASUREMENTS = {
    "analytic": measure_analytic,
    "layers": measure_layers,
    "empirical": measure_empirical,
}


def main(arguments: Sequence[str] | None = None, sizes: Sizes = SIZES) -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed calls of each")
    parser.add_argument("--markdown", action="store_true", help="a table for the pages of docs")
    parser.add_argument("--out", type=Path, help="also write every median to this JSON file")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    rows = [row for name in options.only for row in MEASUREMENTS[name](sizes, options.repeats)]
    about = environment()
    print(table(rows, options.markdown))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.out:
        found = {"environment": about, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
