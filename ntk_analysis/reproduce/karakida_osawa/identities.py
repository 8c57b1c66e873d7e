"""Equations of Karakida & Osawa (2020) on gradient descent, exact and layer-wise Fisher."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from natgrad_flax import (
    KFAC,
    BlockDiagonal,
    BlockTriDiagonal,
    Diagonal,
    Exact,
    LayerWise,
    Structure,
    UnitWise,
)
from ntk_analysis.displacement import parameter_displacement
from ntk_analysis.dynamics import predict_dynamics
from ntk_analysis.empirical import Matrix
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.reproduce.karakida_osawa.common import (
    Problem,
    flatten,
    off_identity,
    problem,
    random_coupling,
    theta_bar,
)
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check
from ntk_analysis.reproduce.ruler import max_abs_error, pseudo_inverse, relative_error


@check(
    "KO-Eq5",
    "Gradient descent of the linearised network",
    claim="f_t(x') = Theta(x',x) Theta^-1 (I - (I - eta Theta)^t)(y - f_0) + f_0(x') (Eq. 5), and "
    "the learning rate to take is 1/lambda_max(Theta).",
    setting="tanh 8-12-12-2 with biases, N = 5, N' = 3, 15 steps; jax.linearize at theta_0",
    origin="ours",
    fast=True,
)
def eq_5(report: Report) -> Outcome:
    """The closed form, our recursion and the network of ``jax.linearize``, step by step."""
    case, steps = problem((8, 12, 12, 2), 5, bias_variance=0.2), 15
    theta, cross = case.train.kernel, case.test.jacobian @ case.train.jacobian.T / 5
    largest = float(np.linalg.eigvalsh(theta)[-1])
    report("training the linearised network")
    inside, outside = _linearised_descent(case, 1 / largest, steps)
    start = case.residual
    wanted = np.linalg.solve(theta, np.eye(10))
    closed_inside, closed_outside = [], []
    for t in range(steps + 1):
        power = np.linalg.matrix_power(np.eye(10) - theta / largest, t)
        closed_inside.append(start @ power)
        moved = -cross @ wanted @ (np.eye(10) - power) @ start
        closed_outside.append(moved + case.test.outputs.reshape(-1))
    report("our recursion")
    found = predict_dynamics(
        GradientDescent(), case.model, case.x, case.y, 1 / largest, steps, x_test=case.x_test
    )
    ours = np.concatenate([found.outputs_train, found.outputs_test], axis=1).reshape(steps + 1, -1)
    true = np.concatenate([inside, outside], axis=1)

    def shrinks(c: float) -> float:
        power = np.linalg.matrix_power(np.eye(10) - c / largest * theta, 200)
        return float(np.linalg.norm(power @ start) / np.linalg.norm(start))

    return Outcome(
        (
            below(
                "training outputs: formula against the linearised network",
                max_abs_error(np.stack(closed_inside) + case.y.reshape(-1), inside),
                1e-10,
            ),
            below(
                "test outputs: formula against the linearised network",
                max_abs_error(np.stack(closed_outside), outside),
                1e-10,
            ),
            below("our recursion against the linearised network", max_abs_error(ours, true), 1e-10),
            below("|f_200 - y| / |f_0 - y| at 1/lambda_max", shrinks(1.0), 1.0),
            above("|f_200 - y| / |f_0 - y| at 2.1/lambda_max", shrinks(2.1), 1.0),
        )
    )


def _linearised_descent(case: Problem, rate: float, steps: int) -> tuple[Matrix, Matrix]:
    """Outputs on training and test inputs, (steps + 1, N C) and (steps + 1, N' C)."""
    with jax.enable_x64(True):
        graphdef, state = nnx.split(case.model)
        theta, unravel = ravel_pytree(state)
        inputs = jnp.concatenate([jnp.asarray(case.x), jnp.asarray(case.x_test)])

        def outputs(vector: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, unravel(vector))(inputs).reshape(-1)

        first, push = jax.linearize(outputs, theta)
        pull = jax.jit(jax.linear_transpose(push, theta))
        push = jax.jit(push)
        n, moved, history = case.y.size, jnp.zeros_like(theta), []
        for _ in range(steps + 1):
            history.append(np.asarray(first + push(moved)))
            residual = history[-1][:n] - case.y.reshape(-1)
            padded = jnp.asarray(np.pad(residual, (0, len(first) - n)))
            moved = moved - rate / len(case.x) * pull(padded)[0]
    stacked = np.stack(history)
    return stacked[:, :n], stacked[:, n:]


@check(
    "KO-Eq9",
    "Exact natural gradient through the kernel",
    claim="With fewer samples than parameters the exact natural gradient is J^T (J J^T)^-1 (f - y) "
    "(Eq. 9), which never forms the P x P Fisher.",
    setting="tanh 6-10-10-2 with biases, N = 5, against the pseudo-inverse of J^T J / N",
    origin="ours",
    fast=True,
)
def eq_9(report: Report) -> Outcome:
    """Kernel form, structure and pseudo-inverse; with a damping, the inverse."""
    case = problem((6, 10, 10, 2), 5, bias_variance=0.2)
    jac, r, fisher = case.train.jacobian, case.residual, case.train.fisher()
    true = pseudo_inverse(fisher, symmetric=True) @ jac.T @ r / 5
    report("solving")
    damped = np.linalg.solve(fisher + 0.01 * np.eye(len(fisher)), jac.T @ r / 5)
    return Outcome(
        (
            below(
                "J^T (J J^T)^-1 (f - y) against F^+ J^T (f - y) / N, relative",
                relative_error(jac.T @ np.linalg.solve(jac @ jac.T, r), true),
                1e-8,
            ),
            below(
                "Exact against the same, relative", relative_error(case.update(Exact()), true), 1e-8
            ),
            below(
                "Exact with damping 0.01 against (F + 0.01 I)^-1 J^T (f - y) / N, relative",
                relative_error(case.update(Exact(), 0.01), damped),
                1e-8,
            ),
        )
    )


@check(
    "KO-Eq10",
    "Dynamics in function space (Eqs. 10 to 14)",
    claim="Natural gradient with the Fisher G moves the outputs by Theta-bar = J G^-1 J^T / N; for "
    "the exact Fisher Theta-bar(x',x) = Theta(x',x) Theta^-1 and alpha = 1, and gradient descent "
    "ends at the same parameters as exact natural gradient.",
    setting="tanh 7-12-13-1 with biases, N = 4, N' = 3; gradient descent iterated to its end",
    origin="ours",
    fast=True,
)
def eq_10(report: Report) -> Outcome:
    """Every structure against explicit matrices, and the common end of two methods."""
    case = problem((7, 12, 13, 1), 4, bias_variance=0.2)
    train, test, eye = case.train, case.test, np.eye(3)
    tri = eye + np.eye(3, k=1) + np.eye(3, k=-1)
    metrics: list[tuple[Structure, Matrix]] = [
        (Exact(), train.fisher()),
        (BlockDiagonal(), train.layer_wise(eye)),
        (BlockTriDiagonal(), train.layer_wise(tri)),
        (KFAC(), train.kronecker("scaled")),
        (KFAC(last_layer="literal"), train.kronecker("literal")),
        (UnitWise(), train.unit_wise()),
        (Diagonal(), np.diag(np.diag(train.fisher()))),
        (GradientDescent(), np.eye(len(train.owners()))),
    ]
    worst = 0.0
    for structure, metric in metrics:
        report(structure.name)
        for found, samples in zip(case.ours(structure), (train, test), strict=True):
            worst = max(worst, relative_error(found, theta_bar(metric, train, samples)))
    exact_train, exact_test = case.ours(Exact())
    kernel = test.jacobian @ train.jacobian.T @ np.linalg.inv(train.jacobian @ train.jacobian.T)
    report("gradient descent to its end")
    jac, r = train.jacobian, case.residual
    end = -jac.T @ np.linalg.solve(train.kernel, r) / 4
    rate, moved = 1 / np.linalg.eigvalsh(train.kernel)[-1], np.zeros(jac.shape[1])
    for _ in range(20_000):
        moved -= rate * jac.T @ (r + jac @ moved) / 4
    limit = parameter_displacement(GradientDescent(), case.model, case.x, case.y, rate, math.inf)
    return Outcome(
        (
            below("Theta-bar of 8 structures against J G^+ J^T / N, relative", worst, 1e-8),
            below(
                "exact, test: Theta-bar against Theta(x',x) Theta^-1",
                max_abs_error(exact_test, kernel),
                1e-8,
            ),
            below("exact, training: Theta-bar - I", off_identity(exact_train, 1.0), 1e-10),
            below(
                "20,000 steps of gradient descent against J^T Theta^-1 (y - f_0) / N, relative",
                relative_error(moved, end),
                1e-6,
            ),
            below(
                "one step of exact natural gradient against the same, relative",
                relative_error(-case.update(Exact()), end),
                1e-6,
            ),
            below(
                "parameter_displacement of gradient descent against the same, relative",
                relative_error(flatten(limit), end),
                1e-6,
            ),
        )
    )


@check(
    "KO-Eq22",
    "Parameters at the end of training",
    claim="theta_t - theta_0 = (1 - (1 - alpha eta)^t) / alpha G_0^-1 J_0^T (y - f_0) / N: methods "
    "that fit the training data alike end at different parameters, of least norm in their metric.",
    setting="tanh 6-12-13-1 with biases, N = 4, eta = 0.4 / alpha, t = 1, 3 and infinity",
    origin="ours",
    fast=True,
)
def eq_22(report: Report) -> Outcome:
    """Explicit steps, the formula, its form by layers, our displacement, and least norms."""
    case = problem((6, 12, 13, 1), 4, bias_variance=0.1)
    train, r = case.train, case.residual
    jac, definite = train.jacobian, random_coupling(3, definite=True)
    tri = np.eye(3) + np.eye(3, k=1) + np.eye(3, k=-1)
    cases: list[tuple[Structure, Matrix, Matrix | None]] = [
        (Exact(), train.fisher(), None),
        (BlockDiagonal(), train.layer_wise(np.eye(3)), np.eye(3)),
        (BlockTriDiagonal(), train.layer_wise(tri), tri),
        (LayerWise(definite), train.layer_wise(definite), definite),
        (KFAC(), train.kronecker("scaled"), None),
    ]
    formula, blocks, ours, fit = 0.0, 0.0, 0.0, 0.0
    ends: list[Matrix] = []
    for structure, metric, sigma in cases:
        report(structure.name)
        pull = pseudo_inverse(metric, symmetric=True) @ jac.T / 4
        alpha = float(np.trace(jac @ pull)) / 4
        if sigma is not None:
            weights = np.linalg.solve(sigma, np.ones(3))
            parts = [
                w * j.T @ np.linalg.inv(j @ j.T) for w, j in zip(weights, train.layers, strict=True)
            ]
            blocks = max(blocks, relative_error(pull, np.concatenate(parts)))
        moved, steps = np.zeros(jac.shape[1]), 0
        for t in (1, 3, 200):
            while steps < t:
                moved = moved - 0.4 / alpha * pull @ (r + jac @ moved)
                steps += 1
            limit = -(1 - 0.6**t) / alpha * pull @ r
            formula = max(formula, relative_error(moved, limit))
            found = parameter_displacement(
                structure, case.model, case.x, case.y, 0.4 / alpha, math.inf if t == 200 else t
            )
            ours = max(ours, relative_error(flatten(found), limit))
        fit = max(fit, max_abs_error(jac @ moved, -r))
        ends.append(moved)
    apart = min(
        float(np.linalg.norm(a - b) / np.linalg.norm(a))
        for i, a in enumerate(ends)
        for b in ends[:i]
    )
    report("least norms")
    lam, metric = 0.3, train.layer_wise(np.eye(3))
    ridge = np.linalg.lstsq(train.fisher() + lam * metric, jac.T @ -r / 4, rcond=1e-12)[0]
    least = pseudo_inverse(metric, symmetric=True) @ jac.T @ -r / (4 * (3 + lam))
    return Outcome(
        (
            below("steps against the formula, 5 structures, relative", formula, 1e-8),
            below("parameter_displacement against the formula, relative", ours, 1e-8),
            below("G^+ J^T / N against blocks (Sigma^-1 1)_l J_l^T K_l^-1, relative", blocks, 1e-8),
            below("f_inf - y on the training inputs", fit, 1e-8),
            above("smallest relative distance between the ends of two methods", apart, 0.1),
            below(
                "argmin |y - J th|^2/(2N) + lam/2 th^T G th against G^+ J^T y / (N (alpha + lam)), "
                "block-diagonal, relative",
                relative_error(ridge, least),
                1e-8,
            ),
        ),
        notes=(
            "the least-norm reading needs a positive semi-definite G; the tri-diagonal one is "
            "indefinite",
        ),
    )
