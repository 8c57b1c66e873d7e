"""The numerically stable solve of Appendix B.1 of Kerekes et al. (2021)."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from scipy.special import expit

from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.kerekes.common import (
    draw,
    gradient,
    logistic_step,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, above, below, check, close
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

SEEDS = 4
"""Random draws of every kind of margins; the worst counts."""


def exact_natural_gradient(z: Matrix, beta: Matrix) -> Matrix:
    """F^-1 grad for D = 2 from the definitions, in decimal arithmetic with 60 digits.

    Decimal exponents have no limit that matters here, so nothing overflows or vanishes.
    """
    with localcontext() as context:
        context.prec = 60
        a = b = c = left = right = Decimal(0)
        for row in z:
            first, second = (Decimal(float(entry)) for entry in row)
            u = first * Decimal(float(beta[0])) + second * Decimal(float(beta[1]))
            # not 1 - wrong, which is 0 in any number of digits where u is far below 0
            wrong = 1 / (1 + u.exp())
            weight = wrong / (1 + (-u).exp())
            a, b, c = a + weight * first**2, b + weight * first * second, c + weight * second**2
            left, right = left - wrong * first, right - wrong * second
        determinant = a * c - b * b
        solution = (c * left - b * right) / determinant, (a * right - b * left) / determinant
        return np.array([float(entry) for entry in solution])


def printed_natural_gradient(z: Matrix, beta: Matrix) -> Matrix:
    """Eqs. 24 and 25 with the missing transpose: both sides without the factor e^-u_max."""
    u = z @ beta
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.exp(u.max() - u)
        fisher = (z.T * (factor * expit(u) ** 2)) @ z
        right = -z.T @ (factor * expit(u))
    if not (np.isfinite(fisher).all() and np.isfinite(right).all()):
        return np.full_like(beta, np.nan)
    return np.linalg.solve(fisher, right)


def naive_natural_gradient(z: Matrix, beta: Matrix) -> Matrix:
    """Eqs. 19 and 20 as they stand."""
    u = z @ beta
    fisher = (z.T * (expit(u) * expit(-u))) @ z
    if np.linalg.matrix_rank(fisher) < len(beta):
        return np.full_like(beta, np.nan)
    return np.linalg.solve(fisher, -z.T @ expit(-u))


def margins_case(rng: np.random.Generator, margins: Matrix) -> tuple[Matrix, Matrix]:
    """Z (N, 2) and beta (2,) with these margins, up to rounding."""
    turn = np.linalg.qr(rng.standard_normal((2, 2)))[0]
    size = float(np.abs(margins).max())
    rows = np.stack([margins / size, rng.standard_normal(len(margins))], axis=1)
    return rows @ turn, size * turn[0]


@check(
    "KE-B1",
    "A solve that stays exact however large the margins are",
    claim="F d = grad can be solved late in a run, when both sides vanish as e^-u, after a common "
    "factor is divided out of them (Appendix B.1).",
    setting="D = 2, N = 8, margins moderate, all near 800, from 1 to 1500, and near +700 and -700, "
    f"{SEEDS} draws each, against decimal arithmetic with 60 digits; N = 2, D = 5 with margins "
    "+700 and -700",
    origin="ours",
    kind="misprint",
    remark=(
        "Eqs. 22 and 25 lack a transpose: the gradient is -Z^T phi(-u). Beside that, the printed "
        "factor e^-u_max serves, as the paper says, where the elements of u do not differ too "
        "much. Where they do, e^(u_max - u) overflows; e^-u_min gives the same solution and "
        "factors of at most 1."
    ),
    fast=True,
)
@in_float64
def stable_solve(report: Report) -> Outcome:
    """Four kinds of margins; the printed and the naive form where they can be had."""
    rng = np.random.default_rng(0)
    kinds = {
        "moderate": lambda: rng.uniform(-4, 4, 8),
        "near 800": lambda: rng.uniform(795, 805, 8),
        "from 1 to 1500": lambda: np.concatenate(
            [rng.uniform(1, 4, 3), rng.uniform(5, 1500, 4), [1500]]
        ),
        "near +-700": lambda: np.resize([1.0, -1.0], 8) * rng.uniform(690, 700, 8),
    }
    measurements: list[Measurement] = []
    finite: dict[str, list[bool]] = {"printed": [], "naive": []}
    same: list[float] = []
    for name, margins in kinds.items():
        report(f"margins {name}")
        errors = []
        for _ in range(SEEDS):
            z, beta = margins_case(rng, margins())
            expected = exact_natural_gradient(z, beta)
            errors.append(relative_error(logistic_step(z, np.ones(8), beta), expected))
            others = printed_natural_gradient(z, beta), naive_natural_gradient(z, beta)
            if name == "moderate":
                same.extend(relative_error(other, expected) for other in others)
            if name in ("from 1 to 1500", "near +-700"):
                finite["printed"].append(bool(np.isfinite(others[0]).all()))
            if name == "near 800":
                finite["naive"].append(bool(np.isfinite(others[1]).all()))
        measurements.append(below(f"margins {name}: error, relative", max(errors), 1e-8))
    wide, signs = rng.standard_normal((2, 5)), np.array([1.0, -1.0])
    beta = pseudo_inverse(wide) @ (700 * signs)
    found = logistic_step(wide, np.ones(2), beta)
    # 1 + e^-u over e^700, so that the least-norm solution of the oracle stays in range
    target = np.exp(-(wide @ beta) - 700) + np.exp(-700.0)
    expected = -pseudo_inverse(wide) @ target
    square = draw(0, 3, 3)
    wrong = expit(-square.signed @ square.start)
    slope = gradient(square.x, square.y, square.start)
    return Outcome(
        (
            *measurements,
            below("N < D, margins +-700: error, relative",
                  relative_error(np.asarray(found) * np.exp(-700.0), expected), 1e-9),
            below("moderate margins: printed and naive form against the exact solution",
                  max(same), 1e-9),
            close("margins from 1 to 1500 and near +-700: share of finite results with e^-u_max",
                  float(np.mean(finite["printed"])), 0, 0),
            close("margins near 800: share of naive systems that are not singular",
                  float(np.mean(finite["naive"])), 0, 0),
            below("-Z^T phi(-u) against the gradient, relative",
                  relative_error(-square.signed.T @ wrong, slope), 1e-12),
            above("-Z phi(-u), as printed, against it",
                  relative_error(-square.signed @ wrong, slope), 0.1),
        )
    )  # fmt: skip
