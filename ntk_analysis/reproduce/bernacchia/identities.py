"""Gradient, Fisher information and natural gradient of deep linear networks as the paper has them.

Equations of Bernacchia et al. (2018), written in our orientation: samples are rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_flax as ng
from natgrad_flax import linear
from natgrad_flax.linear.deep_linear import gradient, natural_gradient
from natgrad_flax.linear.deep_linear_fisher import fisher, fisher_block
from natgrad_flax.structures.base import dense_layer
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.bernacchia.common import (
    BOTTLENECK,
    DRAWS,
    NARROW,
    SETTING,
    SQUARE,
    WIDE,
    Problem,
    draw,
    draws,
    flat,
    kernels,
    update,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check, close
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

SHAPES = (SQUARE, WIDE, BOTTLENECK, NARROW)
MONTE_CARLO = 100_000
"""Samples of the Monte-Carlo check."""
LAYERS = (3, 4, 4, 2)
"""Widths of the Monte-Carlo check."""


def passes(factors: Sequence[Matrix], x: Matrix, seen: Matrix) -> list[tuple[Matrix, Matrix]]:
    """The pairs (x_{i-1}, e_i) of a forward and a backward pass (Eqs. 1 and 8).

    Args:
      factors: W_1..W_L.
      x: inputs, shape (N, n_0).
      seen: e_L = (y - f) S^{-1}, shape (N, n_L).
    """
    activations, errors = [x], [seen]
    for factor in factors[:-1]:
        activations.append(activations[-1] @ factor)
    for factor in factors[:0:-1]:
        errors.append(errors[-1] @ factor.T)
    return list(zip(activations, reversed(errors), strict=True))


@check(
    "BE-Eq7/8",
    "The gradient is a product of activations and errors",
    claim="dL/dW_i is minus the mean outer product of the back-propagated error e_i and the "
    "activation x_(i-1), where L is half the squared error weighted by the inverse output "
    "covariance (Eqs. 6-8).",
    setting=f"widths {', '.join(map(str, SHAPES))}; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_7_8(report: Report) -> Outcome:
    """The library, and the two passes written out, against autodiff of the loss."""
    ours, printed = [], []
    for widths in SHAPES:
        report(f"gradients of widths {widths}")
        for problem in draws(widths):
            expected, x = flat(problem.slopes), np.asarray(problem.x)
            ours.append(relative_error(flat(gradient(problem.weights, problem.data)), expected))
            seen = (np.asarray(problem.y) - x @ problem.product) @ problem.precision
            pairs = passes(problem.factors, x, seen)
            printed.append(relative_error(flat(-a.T @ e / len(x) for a, e in pairs), expected))
    return Outcome(
        (
            below("gradient(), relative to autodiff", max(ours), 1e-10),
            below("- <x^T e> of the two passes, relative to autodiff", max(printed), 1e-10),
        )
    )


@check(
    "BE-Eq22",
    "The Fisher information is made of Kronecker products, and is singular",
    claim="Block (i, j) of the Fisher information is the Kronecker product of the second moments "
    "of activations and of errors, <x_(i-1) x_(j-1)^T> and <e_i e_j^T> (Eq. 22, supplement Eq. "
    "19). Its rank is at most n_L n_0, whatever the number of parameters.",
    setting=f"widths {', '.join(map(str, SHAPES))}; {SETTING}. Ours: the rank where a layer of "
    "width r is narrower than inputs and outputs, r (n_0 + n_L - r)",
    origin="ours",
    fast=True,
)
@in_float64
def eq_22(report: Report) -> Outcome:
    """The library against the mean of J^T S^-1 J, and the eigenvalues of the result."""
    whole, blocks, beyond, within = [], [], [], []
    off: dict[bool, list[int]] = {True: [], False: []}
    for widths in SHAPES:
        report(f"Fisher information of widths {widths}")
        narrowest = min(widths)
        rank = narrowest * (widths[0] + widths[-1] - narrowest)
        for problem in draws(widths):
            ours = np.asarray(fisher(problem.weights, problem.data))
            whole.append(relative_error(ours, problem.fisher))
            values = np.linalg.eigvalsh(ours)[::-1] / np.linalg.norm(ours, 2)
            is_bottleneck = narrowest < min(widths[0], widths[-1])
            off[is_bottleneck].append(abs(int(np.sum(values > 1e-10)) - rank))
            within.append(values[rank - 1])
            beyond.append(np.abs(values[rank:]).max())
        ends = np.cumsum([0, *(w.size for w in problem.weights)])
        for i, j in ((1, 1), (1, 2), (problem.depth, 1)):
            block = problem.fisher[ends[i - 1] : ends[i], ends[j - 1] : ends[j]]
            blocks.append(relative_error(fisher_block(problem.weights, problem.data, i, j), block))
    return Outcome(
        (
            below("fisher() against autodiff, relative", max(whole), 1e-12),
            below("fisher_block() against autodiff, relative", max(blocks), 1e-12),
            close("rank - n_L n_0 without a bottleneck, largest", max(off[False]), 0, 0),
            close("rank - r (n_0 + n_L - r) at a bottleneck, largest", max(off[True]), 0, 0),
            above("least eigenvalue within the rank, over the largest", min(within), 1e-6),
            below("largest eigenvalue beyond the rank, over the largest", max(beyond), 1e-13),
        )
    )


@check(
    "BE-Eq14/15",
    "Second moments of errors and activations under the model",
    claim="With targets drawn from the model, <e_i e_i^T> = B_i^T S^-1 B_i and <x_(i-1) "
    "x_(i-1)^T> = A_i Sigma A_i^T, where A_i is the product of the weights before layer i and "
    "B_i that of the weights behind it (Eqs. 14 and 15).",
    setting=f"widths {LAYERS}, {MONTE_CARLO} samples of x ~ N(0, Sigma) and y ~ N(f, S); {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_14_15(report: Report) -> Outcome:
    """Monte Carlo: our own passes, and the errors that the online algorithm samples."""
    written: list[float] = []
    block: list[float] = []
    sampled: list[float] = []
    for seed, problem in enumerate(draws(LAYERS)):
        report(f"sampling, draw {seed + 1} of {DRAWS}")
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((MONTE_CARLO, LAYERS[0])) @ np.linalg.cholesky(problem.inputs).T
        root = np.linalg.cholesky(np.asarray(problem.covariance))
        noise = rng.standard_normal((MONTE_CARLO, LAYERS[-1])) @ root.T
        formulas = problem.layer_moments()
        for i, (a, e) in enumerate(passes(problem.factors, x, noise @ problem.precision)):
            first, second = a.T @ a / MONTE_CARLO, e.T @ e / MONTE_CARLO
            written += [
                relative_error(first, formulas[i][0]),
                relative_error(second, formulas[i][1]),
            ]
            ours = fisher_block(problem.weights, problem.data, i + 1, i + 1)
            block.append(relative_error(np.kron(first, second), ours))
        sampled += _sampled_errors(problem, x, seed)
    return Outcome(
        (
            below("samples against Eqs. 14 and 15, relative", max(written), 0.02),
            below("their Kronecker product against fisher_block()", max(block), 0.02),
            below("fisher_signals(fisher='mc') against Eq. 14 with S = I", max(sampled), 0.02),
        )
    )


def _sampled_errors(problem: Problem, x: Matrix, seed: int) -> list[float]:
    """How far the second moments of the errors that the library samples are from B_i B_i^T."""
    outputs = jnp.zeros((len(x), problem.y.shape[1]))
    signals, _ = ng.fisher_signals(
        problem.model,
        jnp.asarray(x),
        outputs,
        loss=ng.MeanSquaredError(),
        fisher="mc",
        key=jax.random.key(seed),
    )
    errors = [np.asarray(dense_layer(layer).flat_derivatives()) for layer in signals.layers]
    return [
        relative_error(e.T @ e / len(x), b @ b.T)
        for e, b in zip(errors, problem.after, strict=True)
    ]


@check(
    "BE-Eq10",
    "The natural gradient in closed form",
    claim="One generalised inverse of the Fisher information gives the update (1/L) <e e^T>^-1 "
    "<e x^T> <x x^T>^-1 of each layer, with pseudo-inverses where the inverses do not exist "
    "(Eq. 10).",
    setting=f"widths {SQUARE}, {WIDE} and {BOTTLENECK}; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_10(report: Report) -> Outcome:
    """The formula with dense pseudo-inverses, and the natural gradient by autodiff."""
    printed, exact = [], []
    for widths in (SQUARE, WIDE, BOTTLENECK):
        report(f"natural gradients of widths {widths}")
        for problem in draws(widths):
            ours = natural_gradient(problem.weights, problem.data, method="pseudo-inverse")
            formula = [
                pseudo_inverse(inputs, symmetric=True)
                @ slope
                @ pseudo_inverse(errors, symmetric=True)
                / problem.depth
                for (inputs, errors), slope in zip(
                    problem.layer_moments(), problem.slopes, strict=True
                )
            ]
            printed.append(relative_error(flat(ours), flat(formula)))
            if widths != BOTTLENECK:
                moved = -problem.push_forward(ours)
                exact.append(relative_error(moved, problem.natural_direction))
    report("the optax transformation")
    problem = draw(WIDE, 0)
    step, _ = update(linear.deep_linear_descent(1.0), problem)
    ours = natural_gradient(problem.weights, problem.data)
    descended = relative_error(-flat(kernels(step)), flat(ours))
    return Outcome(
        (
            below("natural_gradient() against Eq. 10, relative", max(printed), 1e-8),
            below("dW/dt against - J F^+ grad, without a bottleneck", max(exact), 1e-8),
            below("deep_linear_descent(1.0) against Eq. 10, relative", descended, 1e-8),
        ),
        notes=("At a bottleneck the formula is no natural gradient any more: see BE-bottleneck.",),
    )


@check(
    "BE-Eq16",
    "In square networks the error goes back through inverses",
    claim="If all layers are square and invertible, Eq. 10 becomes dW_i/dt = (1/L) (W_L ... "
    "W_(i+1))^-1 <(y - x_L) x^T> Sigma^-1 (W_(i-1) ... W_1)^-1 (Eq. 16). The output covariance "
    "drops out, and the update is covariant under linear transformations of the layers.",
    setting=f"widths {SQUARE} and (5, 5, 5); {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_16(report: Report) -> Outcome:
    """The formula with explicit inverses, Eq. 10, and a change of basis in hidden layers."""
    printed, pseudo, covariant = [], [], []
    for widths in (SQUARE, (5, 5, 5)):
        report(f"natural gradients of widths {widths}")
        for problem in draws(widths):
            ours = natural_gradient(problem.weights, problem.data, method="inverse")
            residual = problem.optimum - problem.product
            formula = [
                -np.linalg.inv(a) @ residual @ np.linalg.inv(b) / problem.depth
                for a, b in zip(problem.before, problem.after, strict=True)
            ]
            printed.append(relative_error(flat(ours), flat(formula)))
            other = natural_gradient(problem.weights, problem.data, method="pseudo-inverse")
            pseudo.append(relative_error(flat(other), flat(ours)))
            # the same network with hidden layers in other coordinates
            eye = np.eye(widths[0])
            bases = [eye, *(w + eye for w in problem.factors[1:]), eye]
            changed, expected = (
                [
                    np.linalg.solve(bases[i], matrix) @ bases[i + 1]
                    for i, matrix in enumerate(map(np.asarray, matrices))
                ]
                for matrices in (problem.weights, ours)
            )
            found = natural_gradient([jnp.asarray(w) for w in changed], problem.data)
            covariant.append(relative_error(flat(found), flat(expected)))
    return Outcome(
        (
            below("natural_gradient() against Eq. 16, relative", max(printed), 1e-8),
            below("Eq. 10 with pseudo-inverses against it, relative", max(pseudo), 1e-8),
            below("update in other coordinates of the hidden layers", max(covariant), 1e-8),
        )
    )
