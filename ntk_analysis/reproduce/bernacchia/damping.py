"""Damping of the online algorithm: the damped step, and the rule that adapts it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

import natgrad_flax as ng
from natgrad_flax import linear
from natgrad_flax.linear.deep_linear import natural_gradient
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.bernacchia.common import (
    BOTTLENECK,
    DRAWS,
    SETTING,
    SQUARE,
    Problem,
    draws,
    flat,
    kernels,
    parameters,
    update,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check, close
from ntk_analysis.reproduce.ruler import relative_error

DAMPINGS = tuple(10.0**power for power in range(-4, 13, 2))
"""For the turn from the natural gradient to the gradient."""
DEEP = (3, 4, 2)
"""Widths for the adaptation."""
RATES = (1.0, 0.5, 0.1, 0.01, 0.001)
"""Learning rates alpha of the adaptation, by the counter of steps."""


@check(
    "BE-Eq20",
    "A damped step goes over into a step of gradient descent",
    claim="With sqrt(lambda) I added to both second moments, the update is (alpha / L) "
    "(<e e^T> + sqrt(lambda) I)^-1 <e x^T> (<x x^T> + sqrt(lambda) I)^-1 (Eq. 20). It is not what "
    "lambda I added to the Fisher information gives, but for large lambda it is a small step of "
    "gradient descent.",
    setting=f"widths {SQUARE} and {BOTTLENECK}, lambda = 1e-4 to 1e12, alpha = 0.5 in the optax "
    f"transformation; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_20(report: Report) -> Outcome:
    """The formula with dense inverses, and the limits of large and of small damping."""
    printed, fisher, cosines, sizes, small = [], [], [], [], []
    for widths in (SQUARE, BOTTLENECK):
        report(f"damped steps of widths {widths}")
        for problem in draws(widths):
            slope = flat(problem.slopes)
            turn = []
            for damping in DAMPINGS:
                ours = flat(natural_gradient(problem.weights, problem.data, damping=damping))
                formula = _formula(problem, damping)
                printed.append(relative_error(ours, formula))
                size = float(np.linalg.norm(ours))
                turn.append(float(ours @ slope) / (size * float(np.linalg.norm(slope))))
            cosines.append(turn)
            # of the largest damping, from the loop above
            sizes.append(size * problem.depth * DAMPINGS[-1] / float(np.linalg.norm(slope)))
            ours = flat(natural_gradient(problem.weights, problem.data, damping=0.01))
            dense = np.linalg.solve(problem.fisher + 0.01 * np.eye(len(slope)), slope)
            fisher.append(relative_error(ours, dense))
            if widths == SQUARE:
                weak = flat(natural_gradient(problem.weights, problem.data, damping=1e-20))
                exact = flat(natural_gradient(problem.weights, problem.data))
                small.append(relative_error(weak, exact))
    report("the optax transformation")
    # the loss of a Flax model is the mean squared error, whose S is I
    problem = draws(SQUARE)[0].with_unit_noise()
    step, _ = update(linear.deep_linear_descent(0.5, damping=0.04), problem)
    descended = relative_error(-flat(kernels(step)), 0.5 * _formula(problem, 0.04))
    least = np.min(cosines, axis=0)
    return Outcome(
        (
            below("natural_gradient(damping=lambda) against Eq. 20, relative", max(printed), 1e-9),
            below("deep_linear_descent against Eq. 20, relative", descended, 1e-9),
            above("cosine with the gradient at lambda = 1e12, least", float(least[-1]), 0.9999),
            close(
                "size over |gradient| / (L lambda) at lambda = 1e12, farthest from 1",
                max(sizes, key=lambda value: abs(value - 1)),
                1,
                1e-3,
            ),
            below("lambda = 1e-20 against the undamped step, square networks", max(small), 1e-6),
            above(
                "against (F + lambda I)^-1 grad at lambda = 0.01, in every draw", min(fisher), 0.01
            ),
        ),
        data={"damping": list(DAMPINGS), "least cosine with the gradient": least.tolist()},
    )


def _formula(problem: Problem, damping: float) -> Any:
    """Eq. 20 at alpha = 1 with dense inverses, as one vector and uphill."""
    root = math.sqrt(damping)
    return flat(
        np.linalg.solve(inputs + root * np.eye(len(inputs)), slope)
        @ np.linalg.inv(errors + root * np.eye(len(errors)))
        / problem.depth
        for (inputs, errors), slope in zip(problem.layer_moments(), problem.slopes, strict=True)
    )


class Recorder(ng.LevenbergMarquardt):
    """Keeps the reduction ratio where the next damping would be."""

    def adapt(self, damping: Array, actual: Array, predicted: Array) -> Array:
        """(L_new - L_old) / predicted."""
        return actual / predicted


@check(
    "BE-Eq21",
    "Damping adapts to how well a quadratic model predicts the loss",
    claim="lambda is multiplied by 3/2 where the ratio rho of the actual to the predicted decrease "
    "of the loss is below 0.25, by 2/3 where it is above 0.75, and kept between (Eq. 21).",
    setting=f"widths {DEEP} and (3, 2), S = I, alpha in {RATES}, lambda = 1e-4 to 100, "
    f"targets ten times as large for the former; {SETTING}",
    origin="ours",
    kind="misprint",
    remark=(
        "The footnote prints the predicted decrease as (-alpha + alpha^2 / 2) sum_i tr(Delta "
        "W_i^T <e_i x_(i-1)^T>). That is negative, so it is the change and not the decrease. "
        "Beside that it can be read in two ways: with Delta W_i at alpha = 1, rho is 1 where the "
        "loss is quadratic and the step is Newton's times alpha, and this is what we use; with "
        "the Delta W_i of Eq. 20, which holds alpha, it would be 1 / alpha. At alpha = 1, as in "
        "the paper's experiments, the two agree."
    ),
    fast=True,
)
@in_float64
def eq_21(report: Report) -> Outcome:
    """The rule, and the ratio of ``deep_linear_descent`` against losses written out."""
    report("the rule")
    rule = ng.LevenbergMarquardt()
    cases = {-1.0: 1.5, 0.2: 1.5, 0.25: 1.0, 0.5: 1.0, 0.75: 1.0, 0.8: 2 / 3, 1.2: 2 / 3}
    one = jnp.ones(())
    factors = [abs(float(rule.adapt(one, -rho * one, -one)) - f) for rho, f in cases.items()]

    ratios, followed, branches, small = [], [], [], []
    for seed, drawn in enumerate(draws(DEEP)):
        report(f"damped steps of widths {DEEP}, draw {seed + 1} of {DRAWS}")
        # targets that are far away, so that some predictions are poor
        problem = replace(drawn.with_unit_noise(), y=10 * drawn.y)
        for index, rate in enumerate(RATES):
            for damping in (1e-4, 1e-2, 1.0, 100.0):
                step, recorded = _step(problem, index, damping, RECORDING)
                rho, _ = _ratios(problem, step, rate)
                ratios.append(abs(recorded / rho - 1))
                factor = 1.5 if rho < 0.25 else 2 / 3 if rho > 0.75 else 1.0
                _, following = _step(problem, index, damping, ADAPTING)
                followed.append(abs(following / (damping * factor) - 1))
                branches.append(factor)
            if rate == RATES[-1]:
                # of the largest damping, from the loop above
                small.append(abs(rho - 1))
    report("one layer, where the loss is quadratic")
    quadratic, misread = [], []
    for drawn in draws((3, 2)):
        problem = drawn.with_unit_noise()
        for index, rate in enumerate(RATES[:2]):
            step, recorded = _step(problem, index, 1e-12, RECORDING)
            rho, printed = _ratios(problem, step, rate)
            quadratic += [abs(rho - 1), abs(recorded - 1)]
            if rate != 1:
                misread.append(printed)
    return Outcome(
        (
            below("factor of LevenbergMarquardt() against Eq. 21", max(factors), 1e-12),
            below(
                "rho of deep_linear_descent against losses written out, relative", max(ratios), 1e-5
            ),
            below("its next damping against the rule for that rho, relative", max(followed), 1e-6),
            close("how many of the three factors occurred", len(set(branches)), 3, 0),
            below(f"|rho - 1| at alpha = {RATES[-1]}, two layers", max(small), 0.01),
            below("|rho - 1|, one layer, alpha = 1 and 0.5, lambda = 1e-12", max(quadratic), 1e-4),
            close(
                "rho with the footnote as printed, alpha = 0.5", max(misread), 1 / RATES[1], 1e-3
            ),
        ),
    )


def _rate(step: Array) -> Array:
    return jnp.asarray(RATES)[step]


RECORDING = linear.deep_linear_descent(_rate, damping=Recorder())
ADAPTING = linear.deep_linear_descent(_rate, damping=ng.LevenbergMarquardt())


def _step(problem: Problem, index: int, damping: float, descent: Any) -> tuple[list[Matrix], float]:
    """The step with ``RATES[index]`` and lambda = ``damping``, and what takes lambda's place."""
    state = descent.init(parameters(problem.model))
    state = state._replace(
        steps=jnp.asarray(index, state.steps.dtype),
        damping=jnp.asarray(damping, state.damping.dtype),
    )
    step, state = update(descent, problem, state)
    return kernels(step), float(state.damping)


def _ratios(problem: Problem, step: list[Matrix], rate: float) -> tuple[float, float]:
    """rho of a step by the explicit loss: as it is meant, and with the footnote as printed."""
    moved = [jnp.asarray(w + d) for w, d in zip(problem.factors, step, strict=True)]
    actual = problem.loss(moved) - problem.loss(problem.weights)
    printed = (-rate + rate**2 / 2) * -float(flat(step) @ flat(problem.slopes))
    return actual / (printed / rate), actual / printed
