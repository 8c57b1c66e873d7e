"""What kernels cost, as ratios to the plainest ways of computing them.

Infinite-width kernels against the recursion of Karakida & Osawa (2020, Supplement E) written by
hand; finite-width layer kernels against Jacobian contraction in neural-tangents.
``python -m benchmarks.kernels`` measures everything in one run and prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

import natgrad_flax as ng
from benchmarks.kernel_problems import (
    SIZES,
    Matrix,
    Sizes,
    analytic_works,
    deep_model,
    empirical_memory,
    empirical_works,
    make_inputs,
    make_model,
)
from benchmarks.step import environment
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import empirical_layer_kernels

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


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of one call, waited for."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def medians(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, alternating, after a first call of each that is not counted."""
    for work in works.values():
        jax.block_until_ready(work())
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds_of(work))
    return {name: statistics.median(times) for name, times in found.items()}


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
    x = make_inputs(sizes.samples, sizes.inputs)
    model = deep_model(3, sizes.inputs)

    def kernels(model: ng.MLP, x: Matrix, part: str) -> Callable[[], Any]:
        return lambda: analytic_kernels(model, x, parts=(part,)).arrays

    pair = medians(
        {"layers": kernels(model, x, "tangent"), "total": kernels(model, x, "ntk")}, repeats
    )
    ratio = pair["layers"] / pair["total"]
    floor = analytic_floor(sizes.samples, sizes.inputs, 3, 3)
    what = f"all 3 layer kernels / their sum, N={sizes.samples}"
    rows = [Row(what, ratio, "<= 3", ratio <= 3, floor, pair)]

    n = sizes.depth_samples
    x = make_inputs(n, sizes.inputs)
    works = {
        f"L={depth}": kernels(deep_model(depth, sizes.inputs), x, "tangent")
        for depth in sizes.depths
    }
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


class AnalyticNtk:
    """The infinite-width NTK of three ReLU layers (see README.md)."""

    timeout = 600

    def setup(self) -> None:
        self.works = analytic_works(SIZES)

    def time_ours(self) -> None:
        self.works["ours"]()

    def track_ratio_to_jitted_recursion(self) -> float:
        found = medians({name: self.works[name] for name in ("ours", "jitted jnp")}, REPEATS)
        return found["ours"] / found["jitted jnp"]

    track_ratio_to_jitted_recursion.unit = "recursions"  # type: ignore[attr-defined]


class AnalyticLayers:
    """All layer kernels at infinite width by depth (see README.md)."""

    params: ClassVar = list(SIZES.depths)
    param_names: ClassVar = ["depth"]

    def setup(self, depth: int) -> None:
        self.model = deep_model(depth, SIZES.inputs)
        self.x = make_inputs(SIZES.depth_samples, SIZES.inputs)
        self.time_layers(depth)

    def time_layers(self, depth: int) -> None:
        analytic_kernels(self.model, self.x, parts=("tangent",))


class EmpiricalLayers:
    """Finite-width layer kernels against Jacobian contraction (see README.md)."""

    timeout = 600

    def setup(self) -> None:
        self.model = make_model(SIZES.widths)
        self.x = make_inputs(SIZES.empirical_samples, SIZES.widths[0])
        empirical_layer_kernels(self.model, self.x)

    def time_layers(self) -> None:
        empirical_layer_kernels(self.model, self.x)

    def track_speedup_over_contraction(self) -> float:
        found = medians(empirical_works(SIZES), REPEATS)
        return found["neural-tangents"] / found["ours"]

    def track_memory_of_contraction(self) -> float:
        memory = empirical_memory(SIZES)
        return memory["neural-tangents"] / memory["ours"]

    def track_temporary_memory(self) -> int:
        return empirical_memory(SIZES)["ours"]

    track_speedup_over_contraction.unit = "times"  # type: ignore[attr-defined]
    track_memory_of_contraction.unit = "times"  # type: ignore[attr-defined]
    track_temporary_memory.unit = "bytes"  # type: ignore[attr-defined]


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
    parser.add_argument("--markdown", action="store_true", help="a table for README.md")
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
