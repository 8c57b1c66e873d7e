"""The natural gradient of diagonal networks: Appendix B.2 of Kerekes et al. (2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_flax.linear import diagonal_network, logistic
from natgrad_flax.linear.descent import Descent, descend
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.kerekes.common import (
    Case,
    cosine,
    diagonal_step,
    draw,
    expected_fisher,
    gradient,
    logistic_field,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check
from ntk_analysis.reproduce.ruler import CUTOFF, pseudo_inverse, relative_error

SEEDS = 3
"""Random draws of every shape; the worst counts."""
_SHAPES = ((3, 6, 2), (5, 5, 3), (9, 4, 3))
_jacobian = jax.jit(jax.jacobian(lambda weights: jnp.prod(weights, axis=0)))


def draw_weights(rng: np.random.Generator, depth: int, dim: int) -> Matrix:
    """Weights (L, D) of both signs and of order one."""
    return rng.choice([-1.0, 1.0], (depth, dim)) * rng.uniform(0.6, 1.4, (depth, dim))


@dataclass(frozen=True, eq=False)
class Dense:
    """The explicit side of a diagonal network.

    Attributes:
      jacobian: d beta / d w by automatic differentiation, shape (D, L D).
      fisher: of beta, the expectation over all label vectors, shape (D, D).
      slope: the gradient of beta, shape (D,).
    """

    jacobian: Matrix
    fisher: Matrix
    slope: Matrix

    def least_norm(self) -> Matrix:
        """The shortest solution of F J dw = grad over all layers jointly, shape (L D,)."""
        solution, *_ = np.linalg.lstsq(self.fisher @ self.jacobian, self.slope, rcond=CUTOFF)
        return solution.astype(np.float64)

    def moore_penrose(self) -> Matrix:
        """(J^T F J)^+ J^T grad, shape (L D,)."""
        pulled = self.jacobian.T @ self.fisher @ self.jacobian
        solution: Matrix = pseudo_inverse(pulled) @ (self.jacobian.T @ self.slope)
        return solution


def dense(case: Case, weights: Matrix) -> Dense:
    """Everything explicit at weights (L, D)."""
    beta = np.prod(weights, axis=0)
    return Dense(
        np.asarray(_jacobian(weights)).reshape(len(beta), -1),
        expected_fisher(case.x, beta),
        gradient(case.x, case.y, beta),
    )


def flow(field: Callable[[Any], Any], start: Matrix) -> Descent:
    """The flow to t = 3, by Runge-Kutta steps of 0.01."""
    return descend(field, start, step_size=0.01, steps=300, record_every=50, integrator="rk4")


def mirror_residual(case: Case, run: Descent) -> tuple[float, float]:
    """How far a two-layer flow is from the Bregman projection on {X b = s(t)}.

    The flow is dw_1 = w_2 * X^T n, dw_2 = w_1 * X^T n: it keeps w_1^2 - w_2^2, and the logarithm of
    w_1 + w_2 moves inside the row space of X, which are the conditions of the projection.

    Returns:
      The change of w_1^2 - w_2^2, and the part of the logarithm outside of the row space; relative.
    """
    recorded = np.asarray(run.recorded)
    squares = recorded[:, 0] ** 2 - recorded[:, 1] ** 2
    dual = np.log(np.abs(recorded.sum(axis=1)))
    moved = dual[-1] - dual[0]
    inside = pseudo_inverse(case.x) @ (case.x @ moved)
    return relative_error(squares, np.tile(squares[0], (len(squares), 1))), relative_error(
        inside, moved
    )


@check(
    "KE-B2",
    "The joint minimum-norm natural gradient of a diagonal network",
    claim="In beta = w_1 * ... * w_L the natural gradient solves F J dw = grad_beta, and the "
    "solution of least norm over all layers is taken (Eqs. 26-31). With q_l = prod_{k != l} w_k "
    "and m = sum_l q_l^2 the step is q_l * Z^T (Z diag(m) Z^T)^-1 (1 + e^-u), without any F, for "
    "N < D, and q_l / m * F^-1 (-grad) for N >= D.",
    setting=f"(N, D, L) = {', '.join(map(str, _SHAPES))}, {SEEDS} draws each; (4, 100000, 2), "
    "where F would have 80 GB; flow to t = 3 at (N, D) = (4, 8), L = 1, 2, 3 from beta = 0; "
    "float64",
    origin="ours",
    kind="too general",
    remark=(
        "The introduction says that natural gradient finds the same optimum in every "
        "parametrisation. The paper's Statement of it asks for Fisher matrices of full rank, and "
        "with these (N >= D) it holds. For N < D only the logits of the training inputs agree: "
        "beta, and so the test accuracy, depends on the depth."
    ),
    fast=True,
)
@in_float64
def joint_solution(report: Report) -> Outcome:
    """Single steps against dense matrices, then flows of three depths."""
    least, penrose, many, few, different, stuck = [], [], [], [], [], []
    for num, dim, depth in _SHAPES:
        report(f"N, D, L = {num}, {dim}, {depth}")
        for seed in range(SEEDS):
            case, rng = draw(seed, num, dim), np.random.default_rng(seed)
            weights = draw_weights(rng, depth, dim)
            side = dense(case, weights)
            step = np.ravel(diagonal_step(case.x, case.y, weights))
            least.append(relative_error(step, side.least_norm()))
            penrose.append(relative_error(step, side.moore_penrose()))
            moved = side.jacobian @ step
            direct = pseudo_inverse(side.fisher) @ side.slope
            if num < dim:
                few.append(relative_error(case.x @ moved, case.x @ direct))
                different.append(relative_error(moved, direct))
                # both weights of a coefficient are zero: J has a row of zeros
                weights[:, 0] = 0
                found = np.ravel(diagonal_step(case.x, case.y, weights))
                stuck.append(relative_error(found, dense(case, weights).least_norm()))
            else:
                many.append(relative_error(moved, direct))
    report("D = 100000")
    wide, weights = draw(0, 4, 6), draw_weights(np.random.default_rng(0), 2, 100_000)
    x = np.random.default_rng(1).standard_normal((4, 100_000)) / 300
    step = np.asarray(diagonal_step(x, wide.y, weights))
    moved = wide.y * (x @ (weights[1] * step[0] + weights[0] * step[1]))
    margins = wide.y * (x @ np.prod(weights, axis=0))
    large = relative_error(moved, -(1 + np.exp(-margins)))
    case = draw(0, 4, 8)
    report("following the flow of depth 1")
    run = flow(logistic_field(case.x, case.y), np.zeros(8))
    runs = [np.asarray(run.recorded)]
    field = diagonal_network.natural_gradient_field(case.x, case.y)
    mirror: list[float] = []
    for depth in (2, 3):
        report(f"following the flow of depth {depth}")
        weights = draw_weights(np.random.default_rng(depth), depth, 8)
        weights[-1] = 0
        run = flow(field, weights)
        runs.append(np.prod(run.recorded, axis=1))
        if depth == 2:
            mirror.extend(mirror_residual(case, run))
    expected = np.asarray(logistic.train_margins(0.0, 0.01 * run.steps[:, None]))
    law = max(float(np.max(np.abs(betas @ case.signed.T - expected))) for betas in runs)
    direct, *deep = (betas[-1] for betas in runs)
    return Outcome(
        (
            below("against lstsq(F J, grad), relative", max(least), 1e-9),
            below("against (J^T F J)^+ J^T grad, relative", max(penrose), 1e-9),
            below("the same where a coefficient has two weights of zero", max(stuck), 1e-9),
            below("D = 100000: change of the margins against -(1 + e^-u), relative", large, 1e-10),
            below("N >= D: J dw against F^-1 grad of beta itself, relative", max(many), 1e-10),
            below("N < D: X J dw against X F^+ grad, relative", max(few), 1e-10),
            above("N < D, L = 2: J dw - F^+ grad, relative, in every draw", min(different), 0.01),
            below("N < D, L = 1, 2, 3: margins against the closed form up to t = 3",
                  law, 1e-6),
            below("N < D, L = 1: 1 - cos of beta and X^+ y",
                  1 - cosine(direct, pseudo_inverse(case.x) @ case.y), 1e-12),
            above("N < D: beta of depth 2 and 3 against depth 1, relative, smaller one",
                  min(relative_error(beta, direct) for beta in deep), 0.05),
            below("N < D, L = 2: change of w_1^2 - w_2^2 along the flow, relative",
                  mirror[0], 1e-6),
            below("N < D, L = 2: log(w_1 + w_2) moves inside the row space of X, relative",
                  mirror[1], 1e-6),
        ),
        notes=("The flow of depth 2 is a mirror flow: beta is the Bregman projection of its start "
               "on {X b = s(t)}, and not the least-squares direction that depth 1 takes.",),
    )  # fmt: skip
