"""Figure 3 of Kerekes et al. (2021): which entries of a product move when one is observed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from natgrad_flax.linear import matrix_factorization as mf
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, between, check

Matrix = NDArray[np.float64]
Kernels = dict[str, Matrix]

SIZE = 11
ENTRY = (5, 5)
DEPTHS = (1, 2, 3, 5)
COLUMNS = ("EGF", "EGD", "NGF", "NGD")
DRAWS = 5
STEP_SIZE = 0.1
ERROR = -1.0
_SMALL = 1e-3
_TINY = 1e-30  # of the complex step: nothing is subtracted, so it may be as small as this


def random_factors(depth: int, seed: int) -> Matrix:
    """Factors with random singular vectors and singular values from 0.5 to 1.5, (L, n, n)."""
    rng = np.random.default_rng([seed, depth])
    factors = []
    for _ in range(depth):
        left, _, right = np.linalg.svd(rng.standard_normal((SIZE, SIZE)))
        factors.append((left * rng.uniform(0.5, 1.5, SIZE)) @ right)
    return np.stack(factors)


def gaussian_factors(depth: int, seed: int) -> Matrix:
    """Factors from N(0, 1 / n), whose products have conditions up to 1e8; (L, n, n)."""
    rng = np.random.default_rng([seed, depth])
    return rng.standard_normal((depth, SIZE, SIZE)) / np.sqrt(SIZE)


def kernels(factors: Matrix) -> Kernels:
    """The four columns of the figure, by the library."""
    layers = tuple(factors)

    def flow(kind: mf.Kind) -> Matrix:
        return np.asarray(mf.flow_kernel(layers, ENTRY, kind=kind))

    def step(kind: mf.Kind) -> Matrix:
        found = mf.step_kernel(layers, ENTRY, kind=kind, step_size=STEP_SIZE, error=ERROR)
        return np.asarray(found)

    return {
        "EGF": flow("euclidean"),
        "EGD": step("euclidean"),
        "NGF": flow("split"),
        "NGD": step("split"),
    }


@jax.jit
def joint_kernels(factors: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the solution of least norm: the flow, a small step and half of it."""
    flow = mf.flow_kernel(factors, ENTRY, kind="joint")
    step, half = (
        mf.step_kernel(factors, ENTRY, kind="joint", step_size=size, error=ERROR)
        for size in (_SMALL, _SMALL / 2)
    )
    return flow, step, half


def expected_kernels(factors: Matrix) -> Kernels:
    """The same four columns from the product alone.

    The gradient and the flow by complex steps (Squire & Trapp 1998), the Euclidean step by taking
    it, and the natural step from its closed form: beta moves by -((1 - (1 - eta r k / L)^L) / k) E
    with k the entry of beta^{-1} opposite to E.

    Args:
      factors: shape (L, n, n), invertible.
    """
    moving = factors.astype(np.complex128)
    gradient = np.empty_like(factors)
    for place in np.ndindex(*factors.shape):
        moving[place] += _TINY * 1j
        gradient[place] = _product(moving)[ENTRY].imag / _TINY
        moving[place] = factors[place]
    moved = _product(factors - STEP_SIZE * ERROR * gradient)
    one = np.zeros_like(factors[0])
    one[ENTRY] = 1
    depth = len(factors)
    opposite = np.linalg.inv(_product(factors))[ENTRY[::-1]]
    shrunk = 1 - (1 - STEP_SIZE * ERROR * opposite / depth) ** depth
    return {
        "EGF": _product(factors + _TINY * 1j * gradient).imag / _TINY,
        "EGD": (_product(factors) - moved) / (STEP_SIZE * ERROR),
        "NGF": one,
        "NGD": one * shrunk / (STEP_SIZE * ERROR * opposite),
    }


def _product(factors: Any) -> Any:
    return reduce(np.matmul, factors)


def off_entry(kernel: Matrix) -> Matrix:
    """The entries other than the observed one, flat."""
    return np.delete(kernel.ravel(), np.ravel_multi_index(ENTRY, kernel.shape))


def cross(kernel: Matrix) -> Matrix:
    """Row and column of the observed entry, without it."""
    row, column = ENTRY
    return np.concatenate([np.delete(kernel[row], column), np.delete(kernel[:, column], row)])


def off_cross(kernel: Matrix) -> Matrix:
    """All that is neither in the row nor in the column of the observed entry."""
    row, column = ENTRY
    return np.delete(np.delete(kernel, row, axis=0), column, axis=1)


def _largest(parts: Iterable[Matrix]) -> float:
    return max(float(np.max(np.abs(part))) for part in parts)


def _smallest(parts: Iterable[Matrix]) -> float:
    return min(float(np.min(np.abs(part))) for part in parts)


def _error(column: str, found: Sequence[Kernels], wanted: Sequence[Kernels]) -> float:
    """The largest error of a column over all draws, relative to its largest entry."""
    return max(
        float(np.max(np.abs(f[column] - w[column])) / np.max(np.abs(w[column])))
        for f, w in zip(found, wanted, strict=True)
    )


@check(
    "KE-Fig3",
    "Which entries a single observation moves",
    claim=(
        "With one observed entry of beta = W_1 ... W_L, gradient descent moves that entry alone if "
        "L = 1, its row and column if L = 2, and everything from L = 3 on; natural gradient "
        "moves that entry alone at every depth, in the flow and in steps of finite size."
    ),
    setting=(
        f"n = {SIZE}, entry {ENTRY} counted from 0, L = 1, 2, 3, 5; factors with random singular "
        f"vectors and singular values from 0.5 to 1.5 (the paper's are not stated), {DRAWS} draws, "
        f"float64; steps of {STEP_SIZE} at a residual of {ERROR:g}; NGD takes the solution of B.4 "
        f"with a factor 1/L; the natural columns from N(0, 1/n) factors as well, {DRAWS} draws"
    ),
    origin="paper, partly",
    differs=("factors, draws and step size are ours; A^+ G B^+ in the order of KE-Eq51"),
    fast=True,
)
@in_float64
def run_figure_3(report: Report) -> Outcome:
    """Kernels of every column and depth, in random draws."""
    found: dict[int, list[Kernels]] = {}
    expected: list[Kernels] = []
    harsh: list[Kernels] = []
    for depth in DEPTHS:
        report(f"kernels of {depth} factors")
        draws = [random_factors(depth, seed) for seed in range(DRAWS)]
        found[depth] = [kernels(draw) for draw in draws]
        expected += [expected_kernels(draw) for draw in draws]
        harsh += [kernels(gaussian_factors(depth, seed)) for seed in range(DRAWS)]
    every = [kernel for depth in DEPTHS for kernel in found[depth]]
    flows, ratios = [], []
    for depth in (2, 3):
        report(f"the solution of least norm, {depth} factors")
        for seed in range(DRAWS):
            flow, step, half = joint_kernels(tuple(jnp.asarray(random_factors(depth, seed))))
            flows.append(np.asarray(flow))
            ratios.append(float(np.linalg.norm(off_entry(step)) / np.linalg.norm(off_entry(half))))
    one = expected[0]["NGF"]
    euclidean = {depth: [k[name] for k in found[depth] for name in COLUMNS[:2]] for depth in DEPTHS}
    measurements = (
        below("EGF against complex steps, relative", _error("EGF", every, expected), 1e-12),
        below("EGD against the step taken, relative", _error("EGD", every, expected), 1e-12),
        below(
            "L = 1: other entries in all four columns",
            _largest(off_entry(kernel[name]) for kernel in found[1] for name in COLUMNS),
            1e-15,
        ),
        below(
            "L = 2, EGF and EGD: entries off the cross",
            _largest(map(off_cross, euclidean[2])),
            1e-15,
        ),
        above(
            "L = 2, EGF and EGD: entries on the cross, smallest",
            _smallest(map(cross, euclidean[2])),
            1e-6,
        ),
        above(
            "L = 3 and 5, EGF and EGD: entries off the cross, smallest",
            _smallest(map(off_cross, [*euclidean[3], *euclidean[5]])),
            1e-8,
        ),
        below("NGF against the identity", _error("NGF", every, expected), 1e-10),
        below(
            "NGF from Gaussian factors", _largest(kernel["NGF"] - one for kernel in harsh), 1e-10
        ),
        below("NGD: other entries", _largest(off_entry(kernel["NGD"]) for kernel in every), 1e-13),
        below(
            "NGD from Gaussian factors: other entries over the one observed",
            _largest(off_entry(kernel["NGD"]) / kernel["NGD"][ENTRY] for kernel in harsh),
            1e-13,
        ),
        below("NGD: the entry against its closed form", _error("NGD", every, expected), 1e-12),
        below("NGF, joint solution, L = 2, 3", _largest(flow - one for flow in flows), 1e-10),
        between(
            "NGD, joint solution, L = 2, 3: other entries at a step over half of it, smallest",
            min(ratios),
            1.9,
            2.1,
        ),
        between(
            "NGD, joint solution, L = 2, 3: other entries at a step over half of it, largest",
            max(ratios),
            1.9,
            2.1,
        ),
    )
    maps = {
        str(depth): {name: found[depth][0][name].round(6).tolist() for name in COLUMNS}
        for depth in DEPTHS
    }
    return Outcome(measurements, {"entry": list(ENTRY), "maps": maps}, _NOTES)


_NOTES = (
    "The natural gradient of least norm over all factors jointly has the same flow, but a step of "
    f"finite size moves other entries, in proportion to it (measured at {_SMALL} and half of it).",
    "Gaussian factors make products of five nearly singular: the step of finite size then moves "
    "the observed entry alone, but by a factor of up to 1e13 too far. The figure therefore shows "
    "factors of condition 3.",
)
