"""How W = W_1 ... W_L moves under the natural gradient: in continuous time, and in one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from natgrad_datasets import random_linear_network

from natgrad_flax.linear.deep_linear import (
    Moments,
    euler_product,
    excess_loss,
    flow_product,
    natural_gradient,
)
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.bernacchia.common import (
    SETTING,
    SQUARE,
    WIDE,
    Problem,
    draw,
    draws,
    product_of,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, between, check
from ntk_analysis.reproduce.ruler import relative_error

State = TypeVar("State")

STEP = 0.01
"""Of the Runge-Kutta method, in units of time."""
DEEP = (6,) * 10
"""Nine layers."""
PAIRS = {(4, 4, 4): 500, (20, 20, 20): 100}
"""Random pairs of start and target, by widths."""
EPS = float(np.finfo(np.float64).eps)


def runge_kutta(field: Callable[[State], State], state: State, steps: int) -> State:
    """Steps of length ``STEP`` of the classical method of fourth order.

    Args:
      field: from a tree of arrays to its derivative in time.
      state: where to start.
      steps: how many.
    """

    def moved(state: State, slope: State, time: Array) -> State:
        shifted: State = jax.tree.map(lambda s, k: s + time * k, state, slope)
        return shifted

    def step(state: State, _: None) -> tuple[State, None]:
        def stage(carry: tuple[State, State], times: Array) -> tuple[tuple[State, State], None]:
            slope, end = carry
            slope = field(moved(state, slope, times[0]))
            return (slope, moved(end, slope, times[1])), None

        ahead, share = [0, 0.5, 0.5, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]
        times = STEP * jnp.asarray([ahead, share]).T
        start = jax.tree.map(jnp.zeros_like, state)
        (_, end), _ = jax.lax.scan(stage, (start, state), times)
        return end, None

    end: State = jax.lax.scan(step, state, None, length=steps)[0]
    return end


@jax.jit
def unit_of_time(weights: list[Array], data: Moments) -> list[Array]:
    """The factors after one unit of time of the flow along ``natural_gradient``."""
    return runge_kutta(lambda ws: [-g for g in natural_gradient(ws, data)], weights, 100)


def within_reach(problem: Problem, seed: int) -> Problem:
    """The same network with targets that the straight line from W reaches without a singularity.

    W* is W R + noise, where the symmetric part of R is positive definite, so that of every matrix
    between I and R is.
    """
    rng = np.random.default_rng(seed)
    outputs = problem.y.shape[1]
    root, skew = rng.standard_normal((2, outputs, outputs))
    turn = root @ root.T / outputs + np.eye(outputs) / 5 + (skew - skew.T) / 2
    noise = 0.1 * rng.standard_normal(problem.y.shape)
    return replace(problem, y=problem.x @ jnp.asarray(problem.product @ turn) + noise)


@check(
    "BE-Eq18",
    "The loss decays exponentially, at the same rate for every network",
    claim=(
        "Under the natural gradient in continuous time dW/dt = W* - W with the least-squares map "
        "W* = <y x^T> Sigma^-1 (Eq. 18), so L(t) - L_min = e^(-2t) (L(0) - L_min), provided that "
        "the network does not start at a saddle point."
    ),
    setting=f"widths {SQUARE} and {WIDE}, Runge-Kutta with dt = {STEP} to t = 4, targets x W R + "
    "0.1 noise where the symmetric part of R is positive definite (W then meets no singular "
    f"matrix); {SETTING}. Ours: 500 pairs of random networks of widths (4, 4, 4), 100 "
    "of widths (20, 20, 20)",
    origin="ours",
    fast=True,
    kind="too general",
    remark=(
        "The paper asks that the start is no saddle point. In square networks that is not enough:"
        " W(t) runs on a straight line from W(0) to W*, and where a matrix on it is singular, so "
        "is a factor, and its speed is infinite. Two layers of one unit with W(0) = 1 and W* = -1"
        " run into the saddle W_1 = W_2 = 0 at t = log 2. Most random pairs have such a point; "
        "the more units, the likelier it is. Where the line meets none, the law holds as printed."
        " Finite steps and damping pass the point."
    ),
)
@in_float64
def eq_18(report: Report) -> Outcome:
    """The flow of all factors against the closed forms of W and of the loss."""
    products, losses, explicit = [], [], []
    for widths in (SQUARE, WIDE):
        report(f"flows of widths {widths}")
        for seed, drawn in enumerate(draws(widths)):
            problem = within_reach(drawn, seed)
            start, weights = jnp.asarray(problem.product), problem.weights
            excess = float(excess_loss(start, problem.data))
            explicit.append(abs(problem.excess(problem.product) / excess - 1))
            for time in range(1, 5):
                weights = unit_of_time(weights, problem.data)
                product = product_of(weights)
                law = flow_product(start, jnp.asarray(problem.optimum), time)
                products.append(relative_error(product, law))
                now = problem.excess(product)
                losses.append(abs(now / (math.exp(-2 * time) * excess) - 1))
    report("looking for singular matrices on the way")
    shares = {widths: _share_of_singular(widths, pairs) for widths, pairs in PAIRS.items()}
    # one unit, two layers of weight w = sqrt(2 e^-t - 1): w -> 0 at t = log 2
    scalar = [jnp.ones((1, 1))] * 2
    opposite = Moments(jnp.ones((1, 1)), -jnp.ones((1, 1)), jnp.ones((1, 1)))
    near = [jnp.full((1, 1), math.sqrt(2 * math.exp(-0.69) - 1))] * 2
    speeds = [float(jnp.abs(natural_gradient(ws, opposite)[0])[0, 0]) for ws in (scalar, near)]
    return Outcome(
        (
            below("W(t) of the factors against flow_product(), relative", max(products), 1e-6),
            below("(L(t) - L_min) / (e^(-2t) (L(0) - L_min)) - 1", max(losses), 1e-6),
            below("excess_loss() against the loss above least squares", max(explicit), 1e-10),
            *(
                between(f"share of random pairs with a singular W between, {w}", share, low, 1)
                for (w, share), low in zip(shares.items(), (0.75, 0.9), strict=True)
            ),
            above(
                "two layers of one unit, W(0) = 1, W* = -1: speed at t = 0.69 / 0",
                speeds[1] / speeds[0],
                5,
            ),
        ),
    )


def _share_of_singular(widths: tuple[int, ...], pairs: int) -> float:
    """Of random pairs W(0), W* of a shape, those with a singular matrix between them."""
    ends = [product_of(random_linear_network(widths, seed)) for seed in range(2 * pairs)]
    found = [_meets_singular(*ends[i : i + 2]) for i in range(0, len(ends), 2)]
    return float(np.mean(found))


def _meets_singular(start: Matrix, end: Matrix) -> bool:
    """Whether a matrix on the line between two square ones has no inverse."""
    # (1 - s) A + s B is singular for an s in (0, 1) where A^-1 B has a negative real eigenvalue
    values = np.linalg.eigvals(np.linalg.solve(start, end))
    return bool(np.any((np.abs(values.imag) < 1e-9 * np.abs(values)) & (values.real < 0)))


@check(
    "BE-discrete",
    "The law of one finite step",
    claim="Not in the paper, which leaves discrete time open. In square networks one step of size "
    "alpha of all factors at once takes W to (I + (alpha / L) (W* W^-1 - I))^L W. One layer at "
    "alpha = 1 is solved in one step; for growing L the step tends to exp(alpha (W* W^-1 - I)) W.",
    setting=f"widths (3, 3), {SQUARE} and nine layers of width 6, alpha = 0.3 and 1; {SETTING}. "
    "Nine layers with all entries from N(0, 1/6) as well, which are worse conditioned",
    origin="ours",
    fast=True,
)
@in_float64
def discrete(report: Report) -> Outcome:
    """``euler_product`` against the product of the moved factors."""
    errors, scaled, solved = [], [], []
    for widths in ((3, 3), SQUARE, DEEP):
        report(f"steps of widths {widths}")
        for problem in draws(widths):
            for rate in (0.3, 1.0):
                moved, law = _step_and_law(problem, rate)
                errors.append(relative_error(moved, law))
            if widths == (3, 3):
                solved.append(relative_error(moved, problem.optimum))
    report("Gaussian factors")
    raw, limits = [], []
    for seed, drawn in enumerate(draws(DEEP)):
        factors = [jnp.asarray(w) for w in random_linear_network(DEEP, seed)]
        problem = replace(drawn, weights=factors)
        raw.append(relative_error(*_step_and_law(problem, 1.0)))
        limits.append(EPS * float(np.linalg.cond(problem.product)))
        scaled.append(raw[-1] / limits[-1])
    report("many layers")
    problem = draw((4, 4), 0)
    start, target = problem.product, problem.product + (problem.optimum - problem.product) / 5
    limit = scipy.linalg.expm(target @ np.linalg.inv(start) - np.eye(4)) @ start
    gaps = [
        relative_error(euler_product(jnp.asarray(start), jnp.asarray(target), depth, 1.0), limit)
        for depth in (512, 1024, 2**20)
    ]
    return Outcome(
        (
            below(
                "product of the moved factors against euler_product(), relative", max(errors), 1e-12
            ),
            below("the same for Gaussian factors, over eps cond(W)", max(scaled), 100),
            below("L = 1, alpha = 1: one step against W*, relative", max(solved), 1e-12),
            below("2^20 layers against the matrix exponential, relative", gaps[2], 1e-5),
            between(
                "gap to the exponential at 512 layers over that at 1024",
                gaps[0] / gaps[1],
                1.9,
                2.1,
            ),
        ),
        notes=(
            "Both sides are rounded by about eps cond(W), so a bound of 1e-12 holds for W of "
            f"moderate condition alone. With nine Gaussian factors they differ by {max(raw):.0e} "
            f"where eps cond(W) is {max(limits):.0e}.",
        ),
    )


def _step_and_law(problem: Problem, rate: float) -> tuple[Matrix, Array]:
    """W after a step of all factors, and after ``euler_product``."""
    steps = natural_gradient(problem.weights, problem.data)
    moved = product_of(w - rate * g for w, g in zip(problem.weights, steps, strict=True))
    start, target = jnp.asarray(problem.product), jnp.asarray(problem.optimum)
    return moved, euler_product(start, target, problem.depth, rate)
