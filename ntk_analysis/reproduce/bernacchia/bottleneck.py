"""Eq. 10 with pseudo-inverses in networks that are not square, and the true natural gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linear.deep_linear import Moments, natural_gradient
from natgrad_flax.linear.deep_linear_bottleneck import (
    flow_direction,
    projectors,
    tangent_projection,
)
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.bernacchia.common import (
    BOTTLENECK,
    NARROW,
    SETTING,
    WIDE,
    Problem,
    draws,
    product_of,
)
from ntk_analysis.reproduce.bernacchia.flow import STEP, runge_kutta, unit_of_time
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

EDGE = (2, 4, 4)
"""The hidden layer is as wide as inputs and outputs, and no wider."""
LATE = 4
"""When the losses of two flows are compared."""


@check(
    "BE-Eq19",
    "Projections express what a network of other shapes can reach",
    claim="In any network Eq. 10 with pseudo-inverses moves the product by dW/dt = -W + (1/L) "
    "sum_i P_i^a W* P_i^b, with projections P^a and P^b (Eq. 19, supplement Eq. 45). P^a = I in a "
    "network that does not expand, P^b = I in one that does not contract.",
    setting=f"widths {WIDE}, {BOTTLENECK}, contracting (4, 3, 2), expanding (2, 3, 4); "
    f"Runge-Kutta with dt = {STEP} to t = 1 at the bottleneck; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_19(report: Report) -> Outcome:
    """The projectors as printed, what they do to W, and the direction of the flow."""
    printed, idempotent, kept, directions, free, trivial, tracked = [], [], [], [], [], [], []
    for widths in (WIDE, BOTTLENECK, (4, 3, 2), (2, 3, 4)):
        report(f"projections of widths {widths}")
        for problem in draws(widths):
            pairs = [
                (np.asarray(p), np.asarray(q)) for p, q in projectors(problem.weights, problem.data)
            ]
            for (p, q), formula in zip(pairs, _printed_projectors(problem), strict=True):
                printed += [relative_error(p, formula[0]), relative_error(q, formula[1])]
                idempotent += [relative_error(p @ p, p), relative_error(q @ q, q)]
                kept.append(relative_error(p @ problem.product @ q, problem.product))
                if widths[0] > widths[-1] and widths != BOTTLENECK:
                    trivial.append(relative_error(q, np.eye(len(q))))
                if widths[0] < widths[-1]:
                    trivial.append(relative_error(p, np.eye(len(p))))
            direction = flow_direction(problem.weights, problem.data)
            steps = natural_gradient(problem.weights, problem.data)
            directions.append(relative_error(direction, -problem.push_forward(steps)))
            if widths == WIDE:
                free.append(relative_error(direction, problem.optimum - problem.product))
    report("flow at the bottleneck")
    for problem in draws(BOTTLENECK):
        weights, product = _tracked(problem.weights, jnp.asarray(problem.product), problem.data)
        tracked.append(relative_error(product_of(weights), product))
    return Outcome(
        (
            below("projectors() against the formulas as printed", max(printed), 1e-9),
            below("P P - P, relative", max(idempotent), 1e-10),
            below("P W Q - W, relative", max(kept), 1e-10),
            below("flow_direction() against the steps of Eq. 10", max(directions), 1e-9),
            below("the same against W* - W, wide hidden layers", max(free), 1e-9),
            below("projectors that the paper says are I", max(trivial), 1e-9),
            below(
                "product of the factors at t = 1 against the integral of Eq. 19", max(tracked), 1e-6
            ),
        ),
        notes=(
            "The formula for dW/dt follows from Eq. 10. Whether Eq. 10 with pseudo-inverses is the "
            "natural gradient of such a network is another matter: see BE-bottleneck.",
        ),
    )


@jax.jit
def _tracked(weights: list[Array], product: Array, data: Moments) -> tuple[list[Array], Array]:
    """The factors after a unit of time, and beside them the integral of Eq. 19."""

    def field(state: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        steps = natural_gradient(state[0], data, method="pseudo-inverse")
        return [-g for g in steps], flow_direction(state[0], data)

    return runge_kutta(field, (weights, product), 100)


def _printed_projectors(problem: Problem) -> list[tuple[Matrix, Matrix]]:
    """P^b^T and P^a^T of the supplement, in the order of our rows."""
    found = []
    for a, b in zip(problem.before, problem.after, strict=True):
        inner = pseudo_inverse(a.T @ problem.inputs @ a)
        outer = pseudo_inverse(b @ problem.precision @ b.T)
        found.append((a @ inner @ a.T @ problem.inputs, problem.precision @ b.T @ outer @ b))
    return found


@check(
    "BE-bottleneck",
    "The natural gradient of a network with a narrow layer",
    claim="Where second moments have no inverse, e.g. in networks that contract, expand or have a "
    "bottleneck, Eq. 10 with Moore-Penrose inverses is the natural gradient (Sections 3 and 4).",
    setting=f"widths {BOTTLENECK} and (5, 3, 2, 4) with bottlenecks, {NARROW} and {EDGE} without; "
    f"Runge-Kutta with dt = {STEP} to t = {LATE}; {SETTING}",
    origin="ours",
    kind="too general",
    remark=(
        "Eq. 10 with pseudo-inverses obeys the paper's law for such networks, Eq. 19 (BE-Eq19), "
        "but is not the natural gradient of all of them. At a bottleneck that one, which no "
        "choice of a generalised inverse changes, moves W by P V + V Q - P V Q, where V = W* - W "
        "and P and Q project on the columns and the rows of W, orthogonally for S^-1 and for "
        "Sigma. Both come to rest where W = P W* Q. Eq. 10 is exact where every hidden layer is "
        "at least as wide as inputs and outputs both. Between the two widths the natural gradient"
        " is still W* - W, and Eq. 10 another direction."
    ),
    fast=True,
)
@in_float64
def natural_gradient_at_a_bottleneck(report: Report) -> Outcome:
    """F^+ grad by autodiff against the projection of the library and against Eq. 10."""
    projected, library, gap = [], [], []
    for widths in (BOTTLENECK, (5, 3, 2, 4)):
        report(f"natural gradients of widths {widths}")
        for problem in draws(widths):
            expected = problem.natural_direction
            projected.append(relative_error(_tangent_direction(problem), expected))
            ours = tangent_projection(problem.weights, problem.data)
            library.append(relative_error(ours, expected))
            printed = flow_direction(problem.weights, problem.data)
            gap.append(relative_error(printed, expected))
    report("fixed points")
    rest = []
    for problem in draws(BOTTLENECK):
        best = [jnp.asarray(w) for w in _best_of_rank(problem, 2)]
        for direction in (tangent_projection, flow_direction):
            rest.append(
                float(np.linalg.norm(direction(best, problem.data)))
                / float(np.linalg.norm(problem.optimum))
            )
    full: list[float] = []
    lag: list[float] = []
    wide: list[float] = []
    slower: list[float] = []
    for widths in (NARROW, EDGE):
        report(f"natural gradients of widths {widths}")
        for problem in draws(widths):
            expected = problem.optimum - problem.product
            full.append(relative_error(problem.natural_direction, expected))
            printed = flow_direction(problem.weights, problem.data)
            (lag if widths == NARROW else wide).append(relative_error(printed, expected))
    report(f"flows of widths {NARROW}")
    for problem in draws(NARROW):
        weights = problem.weights
        for _ in range(LATE):
            weights = unit_of_time(weights, problem.data)
        law = math.exp(-2 * LATE) * problem.excess(problem.product)
        slower.append(problem.excess(product_of(weights)) / law)
    return Outcome(
        (
            below("P V + V Q - P V Q against -J F^+ grad", max(projected), 1e-9),
            below("tangent_projection() against -J F^+ grad", max(library), 1e-9),
            above("Eq. 10 with pseudo-inverses against -J F^+ grad, in every draw", min(gap), 0.01),
            below("both directions at the best W of rank 2, over |W*|", max(rest), 1e-9),
            below("without a bottleneck: -J F^+ grad against W* - W", max(full), 1e-8),
            above(f"Eq. 10 against W* - W, widths {NARROW}, in every draw", min(lag), 0.01),
            above(
                f"its L(t) - L_min over e^(-2t) (L(0) - L_min) at t = {LATE}, in every draw",
                min(slower),
                1.2,
            ),
            below(f"Eq. 10 against W* - W, widths {EDGE}", max(wide), 1e-9),
        ),
        notes=(
            f"At a bottleneck Eq. 10 is off by {min(gap):.2f} to {max(gap):.2f} of the natural "
            "gradient.",
            "Eq. 10 differs as soon as a hidden layer is narrower than inputs or outputs: P_i or "
            "Q_i is not the identity then. "
            f"Widths {NARROW} have {min(slower):.1f} to {max(slower):.1f} times the excess loss of "
            f"the exponential law at t = {LATE}.",
        ),
    )


def _tangent_direction(problem: Problem) -> Matrix:
    """P V + V Q - P V Q with projectors from the singular vectors of W."""
    rank = min(w.shape[1] for w in problem.factors)
    left, _, right = np.linalg.svd(problem.product)
    columns, rows = left[:, :rank], right[:rank]
    inputs, precision = problem.inputs, problem.precision
    p = columns @ np.linalg.solve(columns.T @ inputs @ columns, columns.T @ inputs)
    q = precision @ rows.T @ np.linalg.solve(rows @ precision @ rows.T, rows)
    v = problem.optimum - problem.product
    direction: Matrix = p @ v + v @ q - p @ v @ q
    return direction


def _best_of_rank(problem: Problem, rank: int) -> tuple[Matrix, Matrix]:
    """Two factors of the W of this rank with the least loss."""
    root, noise = np.linalg.cholesky(problem.inputs), np.linalg.cholesky(problem.precision)
    left, values, right = np.linalg.svd(root.T @ problem.optimum @ noise)
    head = np.linalg.solve(root.T, left[:, :rank] * values[:rank])
    tail = np.linalg.solve(noise.T, right[:rank].T).T
    return head, tail
