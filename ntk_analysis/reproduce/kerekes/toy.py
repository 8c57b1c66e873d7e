"""Figure 2 of Kerekes et al. (2021): the separators that descents in the plane converge to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from natgrad_datasets.separable import planar
from numpy.typing import NDArray

from natgrad_flax.linear import diagonal_network as dn
from natgrad_flax.linear.descent import descend
from natgrad_flax.linear.references import max_margin, natural_gradient_limit
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check, close

Vector = NDArray[np.float64]

EUCLIDEAN_STARTS = {1: 0.01, 4: 0.3}
"""Every weight at the start of Euclidean descent, by depth."""

NATURAL_DEPTHS = (1, 2, 4)
DRAWS = 3
"""Random starts of natural-gradient descent at depths above 1."""

_LEGS = ((20_000, 20), (1_980_000, 2_000))
"""Steps of Euclidean descent, and how many of them lie between two records, one after another."""
_NATURAL_STEPS = 6000
_POINTS = 60


class Path(NamedTuple):
    """Where a descent went.

    Attributes:
      method: "EGD" or "NGD".
      depth: L of the diagonal network.
      draw: number of the start.
      times: step size times steps, shape (R,), without 0.
      coefficients: beta at those times, shape (R, 2).
    """

    method: str
    depth: int
    draw: int
    times: Vector
    coefficients: Vector

    @property
    def angles(self) -> Vector:
        """Of beta with the first axis, in degrees, shape (R,)."""
        return angle(self.coefficients)


def angle(coefficients: Vector) -> Vector:
    """Degrees between beta, of shape (..., 2), and the first axis."""
    return np.degrees(np.arctan2(coefficients[..., 1], coefficients[..., 0]))


def scanned_angle(signed: Vector, cost: Callable[[Vector], Vector]) -> float:
    """The angle of the separator of least cost with all margins at least 1.

    Tries every direction of the right half plane, 0.001 degrees apart, each at the length that
    makes its smallest margin 1.

    Args:
      signed: the rows y_n x_n, shape (N, 2).
      cost: from vectors (K, 2) to shape (K,), growing with the length.
    """
    degrees = np.linspace(-90, 90, 180_001)
    directions = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    margins = np.min(directions @ signed.T, axis=1)
    inside = margins > 0
    costs = cost(directions[inside] / margins[inside, None])
    return float(degrees[inside][np.argmin(costs)])


def start_weights(dim: int, depth: int, seed: int) -> Vector:
    """Weights of both signs and a size of 0.6 to 1.2, but a last layer of zero; shape (L, D).

    The product is zero, so that every margin starts at 0, and nothing is stiff.
    """
    rng = np.random.default_rng([seed, dim, depth])
    weights = rng.choice([-1.0, 1.0], (depth, dim)) * rng.uniform(0.6, 1.2, (depth, dim))
    weights[-1] = 0
    return weights


def euclidean_paths(x: Vector, y: Vector, legs: Sequence[tuple[int, int]]) -> list[Path]:
    """Loss-normalised gradient descent of both depths, in one program; step size 0.02."""
    state: Any = tuple(jnp.full((depth, 2), size) for depth, size in EUCLIDEAN_STARTS.items())
    field, done = dn.gradient_field(x, y, normalised=True), 0
    times, betas = [], []
    for steps, every in legs:
        run = descend(field, state, step_size=0.02, steps=steps, record_every=every)
        state = run.final
        times.append(0.02 * (done + run.steps[1:]))
        betas.append([np.asarray(dn.coefficients(weights))[1:] for weights in run.recorded])
        done += steps
    return [
        Path("EGD", depth, 0, np.concatenate(times), np.concatenate(parts))
        for depth, parts in zip(EUCLIDEAN_STARTS, zip(*betas, strict=True), strict=True)
    ]


def natural_path(x: Vector, y: Vector, depth: int, draw: int, steps: int) -> Path:
    """Natural-gradient descent from a product of zero; step size 0.01."""
    start = start_weights(2, depth, draw)
    field = dn.natural_gradient_field(x, y)
    run = descend(field, start, step_size=0.01, steps=steps, record_every=10)
    beta = np.asarray(dn.coefficients(run.recorded))[1:]
    return Path("NGD", depth, draw, 0.01 * run.steps[1:], beta)


def document(x: Vector, y: Vector, targets: dict[str, float], paths: list[Path]) -> dict[str, Any]:
    """What the figure needs: the points, and the angles of targets and paths."""
    runs = []
    for path in paths:
        kept = np.unique(np.geomspace(1, len(path.times), _POINTS).round().astype(int)) - 1
        runs.append(
            {
                "method": path.method,
                "depth": path.depth,
                "draw": path.draw,
                "times": path.times[kept].round(4).tolist(),
                "angles": path.angles[kept].round(4).tolist(),
            }
        )
    return {"points": x.tolist(), "labels": y.tolist(), "targets": targets, "runs": runs}


@check(
    "KE-Fig2",
    "Separators in the plane",
    claim=(
        "On separable data gradient descent on the logistic loss goes to the l_2 max-margin "
        "separator with a direct parametrisation (A) and to the l_2/L one, which favours sparsity, "
        "in a diagonal network of L layers (B). Natural-gradient descent goes to one and the same "
        "separator with both (C, D), which is neither of these."
    ),
    setting=(
        "ten points in the plane (ours; the paper does not state its own), float64; EGD: L = 1 and "
        "4, all weights 0.01 and 0.3 at the start, 2 x 10^6 loss-normalised steps of 0.02; NGD: "
        f"L = 1, 2, 4 from a product of zero, {DRAWS} draws of the other weights, 6000 steps of "
        "0.01 (t = 60)"
    ),
    origin="ours",
    fast=True,
)
@in_float64
def run_figure_2(report: Report) -> Outcome:
    """Paths of both methods beside the solutions of the convex programs."""
    x, y = planar(0)
    signed = y[:, None] * x
    report("solving for the separators, and scanning all directions")
    l2, half = max_margin(x, y, depth=1), max_margin(x, y, depth=4)
    limit = natural_gradient_limit(x, y)
    initial_gradient = signed.sum(axis=0) / 2
    scans = {
        "l_2": scanned_angle(signed, lambda b: np.sum(b**2, axis=1)),
        "l_1/2": scanned_angle(signed, lambda b: np.sum(np.abs(b) ** 0.5, axis=1)),
        "flow": scanned_angle(signed, lambda b: b @ initial_gradient),
    }
    targets = {
        "l_2": float(angle(l2.coefficients)),
        "l_1/2": float(angle(half.coefficients)),
        "flow": float(angle(limit)),
    }
    report("Euclidean descent, depths 1 and 4")
    euclidean = euclidean_paths(x, y, _LEGS)
    natural = []
    for depth in NATURAL_DEPTHS:
        report(f"natural-gradient descent, depth {depth}")
        for draw in range(DRAWS if depth > 1 else 1):
            natural.append(natural_path(x, y, depth, draw, _NATURAL_STEPS))
    paths = [*euclidean, *natural]
    flat, deep = (path.angles for path in euclidean)
    ends = np.array([path.angles[-1] for path in natural])
    last = np.stack([path.coefficients[-1] for path in paths])
    margins = np.min(last @ signed.T, axis=1) / np.linalg.norm(last, axis=1)
    measurements = (
        close("l_2 max margin, degrees", targets["l_2"], 24.62, 0.01),
        close("l_1/2 max margin, degrees", targets["l_1/2"], 0.0, 0.01),
        close("l_1/2 max margin, objective", half.objective, 0.9**-0.5, 1e-6),
        close("limit of the natural-gradient flow, degrees", targets["flow"], 19.65, 0.01),
        below(
            "these three against a scan of all directions, degrees",
            max(abs(targets[name] - scans[name]) for name in scans),
            2e-3,
        ),
        below("EGD, L = 1: degrees to the l_2 max margin", abs(flat[-1] - targets["l_2"]), 0.05),
        below("EGD, L = 4: degrees to the l_1/2 max margin", abs(deep[-1] - targets["l_1/2"]), 2.0),
        below(
            "EGD, L = 4: largest change between records 2000 steps apart, second half, degrees",
            float(np.max(np.diff(deep[len(deep) // 2 :]))),
            -1e-6,
        ),
        below("NGD: degrees between all depths and starts", float(np.ptp(ends)), 0.5),
        below(
            "NGD: degrees to the limit of the flow, largest",
            float(np.max(np.abs(ends - targets["flow"]))),
            1.5,
        ),
        above(
            "NGD against EGD of either depth: degrees apart, smallest",
            float(np.min(np.abs(ends[:, None] - [flat[-1], deep[-1]]))),
            3.0,
        ),
        above("smallest margin of a final separator, over its norm", float(np.min(margins)), 1e-3),
    )
    notes = (
        "All directions are approached slowly: NGD is 1 degree short of its limit at t = 60, and "
        "EGD with L = 4 is 11 degrees from the sparse separator after 20 000 steps, 5.3 after "
        "200 000 and 1.3 after two million.",
        "Every start of EGD is positive, as is every coefficient of the three separators.",
    )
    return Outcome(measurements, document(x, y, targets, paths), notes)
