"""What the checks of Bernacchia et al. (2018) rest on; the checks run in test_na_reproduce."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ntk_analysis.reproduce import load_checks
from ntk_analysis.reproduce.bernacchia import common, flow

load_checks()

pytestmark = pytest.mark.usefixtures("x64")


def test_explicit_side_against_finite_differences():
    problem = common.draw((3, 4, 2), 0).with_unit_noise()
    theta, eps = common.flat(problem.weights), 1e-6
    slopes, jacobian = common.flat(problem.slopes), problem.jacobian
    for place in range(0, theta.size, 3):
        moved = []
        for sign in (1, -1):
            values = theta.copy()
            values[place] += sign * eps
            moved.append(
                [jnp.asarray(values[:12].reshape(3, 4)), jnp.asarray(values[12:].reshape(4, 2))]
            )
        up, down = (problem.loss(weights) for weights in moved)
        np.testing.assert_allclose(slopes[place], (up - down) / (2 * eps), atol=1e-8)
        up, down = (common.product_of(weights).ravel() for weights in moved)
        np.testing.assert_allclose(jacobian[:, place], (up - down) / (2 * eps), atol=1e-8)


def test_explicit_fisher_is_the_curvature_where_the_fit_is_exact():
    problem = common.draw((3, 2, 2), 1)
    step = np.random.default_rng(0).standard_normal(10)
    x = np.asarray(problem.x)
    # of a small step from an exact fit, to second order: 1/2 step^T F step
    moved = problem.jacobian @ (1e-3 * step)
    outputs = x @ moved.reshape(3, 2)
    rise = np.sum((outputs @ problem.precision) * outputs) / (2 * len(x))
    np.testing.assert_allclose(step @ problem.fisher @ step / 2, rise / 1e-6, rtol=1e-10)


def test_chain_around_each_layer():
    problem = common.draw((3, 4, 5, 2), 0)
    for a, w, b in zip(problem.before, problem.factors, problem.after, strict=True):
        np.testing.assert_allclose(a @ w @ b, problem.product, rtol=1e-12)


def test_runge_kutta_is_of_fourth_order():
    start = {"x": jnp.ones(()), "y": jnp.zeros(())}
    end = flow.runge_kutta(lambda s: {"x": s["y"], "y": -s["x"]}, start, 100)
    assert abs(float(end["x"]) - math.cos(1)) < 1e-9
    assert abs(float(end["y"]) + math.sin(1)) < 1e-9
    # and not of a lower one, which would still be close: the error at twice the step is 16 times
    errors = []
    for length in (1.0, 2.0):
        state = flow.runge_kutta(lambda s, k=length: -10 * k * s, jnp.ones(()), int(100 / length))
        errors.append(abs(float(state) - math.exp(-10)))
    assert 12 < errors[1] / errors[0] < 20
