"""Natural gradient and the parametrisation: the Statement of Kerekes et al. (2021)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from natgrad_flax import geometry
from natgrad_flax.linear import diagonal_network, logistic
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.kerekes.common import (
    DRAWN,
    SEEDS,
    diagonal_step,
    draw,
    logistic_fisher,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error


def sine(outer: Array, first: Array, w: Array) -> Array:
    """theta = B sin(C w)."""
    return outer @ jnp.sin(first @ w)


def sine_map(seed: int, params: int, inner: int, dim: int) -> Partial:
    """``sine`` with Gaussian B (dim, inner) and C (inner, params)."""
    rng = np.random.default_rng(seed)
    outer, first = rng.standard_normal((dim, inner)), rng.standard_normal((inner, params))
    return Partial(sine, jnp.asarray(outer), jnp.asarray(first / params))


def three_layers(w: Array) -> Array:
    """beta = w_1 * w_2 * w_3 as a function of one vector."""
    return diagonal_network.coefficients(w.reshape(3, -1))


class Sides(NamedTuple):
    """A parametrisation theta = P(w) of logistic regression at one point.

    Attributes:
      theta: P(w), shape (D,).
      jacobian: J, shape (D, d).
      fisher: of theta, shape (D, D).
      pushed: what the natural gradient of w moves theta by, shape (D,).
      direct: the natural gradient of theta, shape (D,).
    """

    theta: Array
    jacobian: Array
    fisher: Array
    pushed: Array
    direct: Array


def sandwich(jacobian: Matrix, fisher: Matrix) -> Matrix:
    """J (J^T F J)^+ J^T, dense: from a gradient of theta to its natural gradient through w."""
    matrix: Matrix = jacobian @ pseudo_inverse(jacobian.T @ fisher @ jacobian) @ jacobian.T
    return matrix


@jax.jit
def sides(phi: Partial, x: Array, y: Array, point: Array) -> Sides:
    """Both natural gradients by the library, that of w with the Fisher as the metric of theta."""
    step = geometry.natural_parameter_gradient(
        phi,
        lambda theta: logistic.loss(x, y, theta),
        point,
        lambda theta: logistic.fisher(x, theta),
    )
    theta = phi(point)
    return Sides(
        theta,
        jax.jacfwd(phi)(point),
        logistic.fisher(x, theta),
        geometry.push_forward(phi, point, step),
        logistic.natural_gradient(x, y, theta),
    )


@check(
    "KE-Stmt",
    "Natural-gradient flow does not see the parametrisation",
    claim="If theta = P(w) has a Jacobian of full row rank and F(theta) is definite, "
    "natural-gradient flow of w moves theta along the natural-gradient flow of theta: "
    "J (J^T F J)^+ J^T = F^-1 (Statement of Section 2.3, Appendix E).",
    setting="logistic regression with N = 12, D = 4; theta = B sin(C w) with 9 parameters, and "
    f"three-layer diagonal networks; {DRAWN}",
    origin="ours",
    fast=True,
)
@in_float64
def statement(report: Report) -> Outcome:
    """Two families of parametrisations, and what happens without either assumption."""
    num, dim, params = 12, 4, 9
    identity, pushed, diagonal, singular, deficient = [], [], [], [], []
    for seed in range(SEEDS):
        report(f"draw {seed + 1} of {SEEDS}")
        case = draw(seed, num, dim)
        rng = np.random.default_rng(seed)
        point = rng.standard_normal(params)
        weights = rng.choice([-1.0, 1.0], 3 * dim) * rng.uniform(0.6, 1.4, 3 * dim)
        curved = sides(sine_map(seed, params, 6, dim), case.x, case.y, point)
        network = sides(Partial(three_layers), case.x, case.y, weights)
        for side in (curved, network):
            matrix = np.asarray(side.fisher)
            inverse = sandwich(np.asarray(side.jacobian), matrix)
            identity.append(relative_error(inverse, np.linalg.inv(matrix)))
            pushed.append(relative_error(side.pushed, side.direct))
        step = np.ravel(diagonal_step(case.x, case.y, weights.reshape(3, dim)))
        diagonal.append(relative_error(np.asarray(network.jacobian) @ step, network.direct))
        jacobian, matrix = np.asarray(curved.jacobian), np.asarray(curved.fisher)
        few = np.asarray(logistic_fisher(case.x[:2], curved.theta))
        singular.append(relative_error(sandwich(jacobian, few), pseudo_inverse(few)))
        basis = np.linalg.qr(rng.standard_normal((dim, dim - 1)))[0]
        narrow = sandwich(basis @ basis.T @ jacobian, matrix)
        deficient.append(relative_error(narrow, np.linalg.inv(matrix)))
    return Outcome(
        (
            below("J (J^T F J)^+ J^T against F^-1, relative", max(identity), 1e-10),
            below("natural gradient of w, pushed forward, against that of theta",
                  max(pushed), 1e-10),
            below("the same for the step of the diagonal network", max(diagonal), 1e-10),
            above("N = 2 < D: J (J^T F J)^+ J^T - F^+, relative, in every draw",
                  min(singular), 0.01),
            above("J of rank 3 < D: distance from F^-1, relative, in every draw",
                  min(deficient), 0.01),
        )
    )  # fmt: skip
