"""Natural gradient under the logistic loss: lemmas, closed forms and limits of Kerekes et al."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy.optimize import linprog
from scipy.special import expit

from natgrad_flax import MLP, Exact, SoftmaxCrossEntropy, natural_gradient
from natgrad_flax.linear import logistic, references
from natgrad_flax.linear import matrix_factorization as factorization
from natgrad_flax.linear.descent import descend
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.kerekes.common import (
    Case,
    cosine,
    draw,
    draws,
    expected_fisher,
    gradient,
    logistic_field,
    logistic_fisher,
    negative_log_likelihood,
    product_jacobian,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check, close
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

SEEDS = 4
"""Random draws of every shape; the worst counts."""


@check(
    "KE-Lem1",
    "Gradient and Fisher of the logits",
    claim="grad_s L = -y phi(-y s), and the Fisher of the logits is diagonal with entries "
    "phi(s) phi(-s) (Lemma 1); so F(beta) = X^T diag(phi(s) phi(-s)) X (Eq. 19).",
    setting="logits of N = 6 samples; (N, D) = (6, 6), (5, 3) and (3, 6); the expectation over "
    f"labels by all 2^N label vectors; {SEEDS} draws each, float64",
    origin="ours",
    fast=True,
)
@in_float64
def lemma_1(report: Report) -> Outcome:
    """The library at X = I, where beta is s, and at random X."""
    report("summing over all labels")
    slopes, printed, diagonal, fishers, losses = [], [], [], [], []
    for case in draws(((6, 6), (5, 3), (3, 6)), SEEDS):
        beta = jnp.asarray(case.start)
        found = logistic.gradient_field(case.x, case.y)(beta)
        slopes.append(relative_error(found, gradient(case.x, case.y, case.start)))
        fishers.append(
            relative_error(logistic_fisher(case.x, beta), expected_fisher(case.x, case.start))
        )
        value = negative_log_likelihood(beta, jnp.asarray(case.x), jnp.asarray(case.y))
        losses.append(relative_error(logistic.loss(case.x, case.y, beta), value))
        if case.x.shape == (6, 6):
            eye, s = np.eye(6), 3 * case.start
            found = logistic.gradient_field(eye, case.y)(jnp.asarray(s))
            printed.append(relative_error(found, -case.y * expit(-case.y * s)))
            expected = expected_fisher(eye, s)
            diagonal.append(relative_error(logistic_fisher(eye, s), expected))
            diagonal.append(relative_error(np.diag(expit(s) * expit(-s)), expected))
    return Outcome(
        (
            below("grad_s L against -y phi(-y s), relative", max(printed), 1e-12),
            below("F(s) and diag(phi(s) phi(-s)) against E[grad grad^T], relative",
                  max(diagonal), 1e-12),
            below("gradient of beta against automatic differentiation, relative",
                  max(slopes), 1e-12),
            below("F(beta) against E[grad grad^T], relative", max(fishers), 1e-12),
            below("loss against the likelihood, relative", max(losses), 1e-12),
        )
    )  # fmt: skip


def gaussian_fisher(mean: Matrix, std: float) -> Matrix:
    """E[score score^T] of N(mean, std^2 I), shape (D, D), by a quadrature that is exact here."""

    def log_density(center: Array, sample: Array) -> Array:
        return jnp.sum(jax.scipy.stats.norm.logpdf(sample, center, std))

    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, repeat=len(mean))))
    mass = np.prod(list(itertools.product(weights / weights.sum(), repeat=len(mean))), axis=1)
    samples = jnp.asarray(mean + std * grid)
    scores = np.asarray(jax.vmap(jax.grad(log_density), (None, 0))(jnp.asarray(mean), samples))
    matrix: Matrix = scores.T @ (mass[:, None] * scores)
    return matrix


@check(
    "KE-Lem2",
    "The Fisher of a matrix observed with Gaussian noise",
    claim="With observation noise of standard deviation sigma the Fisher of the product matrix is "
    "I / sigma^2 (Lemma 2); sigma cancels, and natural gradient does not depend on it.",
    setting="4 entries, sigma = 0.3 and 2; two 4 x 4 factors with 7 observed entries, "
    f"{SEEDS} draws, float64",
    origin="ours",
    kind="misread by us",
    remark=(
        "An earlier version of this page took sigma I in N(mu, sigma I) for a covariance. The "
        "paper calls it the standard deviation and has the density of that in Eq. 16; with it the"
        " lemma is right as printed."
    ),
    fast=True,
)
@in_float64
def lemma_2(report: Report) -> Outcome:
    """The Fisher by quadrature, and the library's step beside the dense one for either sigma."""
    report("integrating")
    rng = np.random.default_rng(0)
    errors, steps = [], []
    for std in (0.3, 2.0):
        mean = rng.standard_normal(4)
        errors.append(relative_error(std**2 * gaussian_fisher(mean, std), np.eye(4)))
        for _ in range(SEEDS):
            factors = tuple(rng.standard_normal((4, 4)) + 2 * np.eye(4) for _ in range(2))
            target = rng.standard_normal((4, 4))
            mask = rng.permutation(16).reshape(4, 4) < 7
            residual = np.where(mask, factors[0] @ factors[1] - target, 0).ravel()
            jacobian = product_jacobian(factors)
            fisher = np.eye(16) / std**2
            dense = pseudo_inverse(jacobian.T @ fisher @ jacobian) @ (
                jacobian.T @ residual / std**2
            )
            found = factorization.natural_gradient(target, mask, factors)
            steps.append(relative_error(np.concatenate([np.ravel(step) for step in found]), dense))
    return Outcome(
        (
            below("sigma^2 F against I", max(errors), 1e-12),
            below("natural gradient of the factors against (J^T F J)^+ J^T grad, relative",
                  max(steps), 1e-9),
        )
    )  # fmt: skip


@check(
    "KE-RemRank",
    "The rank of the Fisher",
    claim="The rank of F(beta) is that of X, so min(N, D) for X of full rank; for N < D it is "
    "singular and several natural-gradient flows exist (Remarks of Section 3).",
    setting=f"(N, D) = (1, 3), (4, 9), (6, 6), (12, 5), and X of rank 3 and shape (7, 5); {SEEDS} "
    "draws each, float64",
    origin="ours",
    fast=True,
)
@in_float64
def rank(report: Report) -> Outcome:
    """Numerical ranks, and a gap between what counts and what does not."""
    report("counting singular values")
    wrong, smallest, deficient, rest = [], [], [], []
    for case in draws(((1, 3), (4, 9), (6, 6), (12, 5)), SEEDS):
        values = singular_values(case.x, case.start)
        wrong.append(np.sum(values > 1e-12) != min(case.x.shape))
        smallest.append(values[min(case.x.shape) - 1])
    for case in draws(((7, 5),), SEEDS):
        left, _, right = np.linalg.svd(case.x, full_matrices=False)
        values = singular_values((left[:, :3] * [3.0, 2.0, 1.0]) @ right[:3], case.start)
        deficient.append(np.sum(values > 1e-12) != 3)
        rest.append(values[3])
    return Outcome(
        (
            close("draws whose rank is not min(N, D)", float(np.sum(wrong)), 0, 0),
            above("singular value number min(N, D) over the largest", min(smallest), 1e-6),
            close("X of rank 3: draws whose rank is not 3", float(np.sum(deficient)), 0, 0),
            below("X of rank 3: the fourth singular value over the largest", max(rest), 1e-14),
        )
    )


def singular_values(x: Matrix, beta: Matrix) -> Matrix:
    """Those of the library's Fisher over the largest of them, descending."""
    values = np.linalg.svd(np.asarray(logistic_fisher(x, beta)), compute_uv=False)
    relative: Matrix = values / values[0]
    return relative


_WIDTHS = (4, 16, 2)
"""Two outputs: their difference is the logit of a softmax over two classes."""


def network(seed: int) -> MLP:
    """A tanh network with 96 weights in float64."""
    return MLP(
        _WIDTHS,
        activation="tanh",
        weight_variance=1.0,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(seed),
    )


def network_errors(num: int, seeds: int, rate: float, steps: int) -> list[float]:
    """How far margins of networks under discrete natural gradient are from the closed form.

    Args:
      num: N.
      seeds: networks and data sets.
      rate: eta.
      steps: in all; the margins are looked at ten times.

    Returns:
      The largest difference of each network.
    """
    graphdef, state = nnx.split(network(0))
    _, unravel = ravel_pytree(state)

    def step(x: Array, targets: Array, vector: Array) -> Array:
        model = nnx.merge(graphdef, unravel(vector))
        found = natural_gradient(model, x, targets, structure=Exact(), loss=SoftmaxCrossEntropy())
        return ravel_pytree(found)[0]

    errors = []
    for seed in range(seeds):
        case = draw(seed, num, _WIDTHS[0])
        targets = jnp.asarray(np.stack([case.y > 0, case.y < 0], axis=1), jnp.float64)
        run = descend(
            jax.tree_util.Partial(step, jnp.asarray(case.x), targets),
            ravel_pytree(nnx.split(network(seed))[1])[0],
            step_size=rate,
            steps=steps,
            record_every=steps // 10,
        )
        outputs = np.stack(
            [nnx.merge(graphdef, unravel(vector))(jnp.asarray(case.x)) for vector in run.recorded]
        )
        margins = case.y * (outputs[..., 0] - outputs[..., 1])
        expected = logistic.train_margins(margins[0], rate * run.steps[:, None])
        errors.append(float(np.max(np.abs(margins - np.asarray(expected)))))
    return errors


def printed_margins(initial: Matrix, time: float) -> Matrix:
    """log(e^t (1 + e^u) - 1), as Eq. 68 has it, for moderate u and t."""
    margins: Matrix = np.log(np.exp(time) * (1 + np.exp(initial)) - 1)
    return margins


@check(
    "KE-Thm3/4",
    "With more parameters than samples the logits grow linearly towards the labels",
    claim="Under natural-gradient flow with a Jacobian of full row rank every margin obeys u' = "
    "1 / phi(u), so u(t) = log(e^t (1 + e^u(0)) - 1): the logits grow as t y, for linear models "
    "(Theorem 3) and for every other one with P >= N (Theorem 4, Eq. 68). With the Moore-Penrose "
    "inverse and a start at zero beta has the direction of least squares.",
    setting=f"(N, D) = (6, 10) and (5, 5), flow to t = 50 by Runge-Kutta steps of 0.01, {SEEDS} "
    "draws; a tanh network 4-16-2 on N = 5 samples, softmax, the structure Exact, 2000 discrete "
    "steps of 1e-3, 3 draws; float64, loss and Fisher both sums (or both means)",
    origin="ours",
    fast=True,
)
@in_float64
def theorems_3_and_4(report: Report) -> Outcome:
    """The linear model over a long time, and networks over a short one."""
    slopes, closed, directions, labels = [], [], [], []
    for case in draws(((6, 10), (5, 5)), SEEDS):
        report(f"linear model with N, D = {case.x.shape}")
        field = logistic_field(case.x, case.y)
        for start in (case.start, np.zeros_like(case.start)):
            run = descend(
                field, start, step_size=0.01, steps=5000, record_every=100, integrator="rk4"
            )
            margins = np.asarray(run.recorded) @ case.signed.T
            times = 0.01 * run.steps
            expected = logistic.train_margins(margins[0], times[:, None])
            closed.append(float(np.max(np.abs(margins - np.asarray(expected)))))
            slopes.append(float(np.max(np.abs(margins[-1] - margins[-2] - 1))))
            labels.append(float(np.max(np.abs(margins[-1] / times[-1] - 1))))
            if not start.any():
                directions.append(1 - cosine(run.final, pseudo_inverse(case.x) @ case.y))
    report("networks")
    errors = network_errors(5, 3, 1e-3, 2000)
    initial = np.linspace(-3, 3, 7)
    formula = max(
        relative_error(logistic.train_margins(initial, t), printed_margins(initial, t))
        for t in (0.1, 1, 9)
    )
    return Outcome(
        (
            below("u(50) - u(49) - 1, largest", max(slopes), 0.02),
            below("u(t) against the closed form, largest", max(closed), 1e-6),
            below("u(50) / 50 - 1, largest: the start is forgotten as 1 / t", max(labels), 0.1),
            below("from zero: 1 - cos of beta and X^+ y", max(directions), 1e-12),
            below("the library's closed form against Eq. 68, relative", formula, 1e-12),
            below("tanh networks, eta = 1e-3: u(t) against the closed form up to t = 2",
                  max(errors), 1e-2),
        ),
        notes=("Eq. 2 of the paper averages the Fisher while its loss is a sum; then time runs N "
               "times as fast. Its proofs, and this check, have sums in both.",),
    )  # fmt: skip


def dual_limit(case: Case, start: Matrix) -> tuple[float, Matrix]:
    """The dual of the limiting program, max sum_n l_n subject to Z^T l = c and l >= 0.

    Its multipliers also say how the flow gets there. From Z^T phi(-u) = e^-t c the margins of the
    support vectors tend to t - log l_n, so beta to t b - Z_S^-1 log l_S.

    Returns:
      The optimum, and Z_S^-1 log l_S of shape (D,).
    """
    slope = case.signed.T @ expit(-case.signed @ start)
    result = linprog(-np.ones(len(case.x)), A_eq=case.signed.T, b_eq=slope, bounds=(0, None))
    support = result.x > 1e-9
    offset, *_ = np.linalg.lstsq(case.signed[support], np.log(result.x[support]), rcond=None)
    return -float(result.fun), offset


@check(
    "KE-NGF-limit",
    "The limit of natural-gradient flow with many samples",
    claim="Ours, where the paper states no limit: for N > D the flow is Newton's, so grad L falls "
    "as e^-t, and beta tends in direction to argmin c . b subject to y_n x_n . b >= 1 with "
    "c = -grad L at the start. For N <= D that is X b = y.",
    setting="(N, D) = (30, 4), 5 draws with starts at zero and at random, Runge-Kutta steps of "
    f"0.02 to t = 30, then of 0.18 to t = 300; (N, D) = (4, 9) and (5, 5), {SEEDS} draws; float64",
    origin="ours",
    fast=True,
)
@in_float64
def limit(report: Report) -> Outcome:
    """The law of the gradient, the program beside its dual, and the direction."""
    decay, gaps, early, late, offsets, moved, few = [], [], [], [], [], [], []
    for case in draws(((30, 4),), 5):
        report("following the flow with N = 30, D = 4")
        field = logistic_field(case.x, case.y)
        slope = logistic.gradient_field(case.x, case.y)
        goals = []
        for start in (np.zeros(4), 3 * case.start):
            run = descend(
                field, start, step_size=0.02, steps=1500, record_every=50, integrator="rk4"
            )
            slopes = np.asarray(slope(run.recorded))
            times = 0.02 * run.steps[:, None]
            decay.append(
                relative_error(np.exp(times) * slopes, np.tile(slopes[0], (len(times), 1)))
            )
            goal = references.natural_gradient_limit(case.x, case.y, start)
            goals.append(goal)
            value, offset = dual_limit(case, start)
            gaps.append(abs(float(-slopes[0] @ goal) / value - 1))
            early.append(cosine(run.final, goal))
            run = descend(
                field, run.final, step_size=0.18, steps=1500, record_every=50, integrator="rk4"
            )
            late.append(cosine(run.final, goal))
            offsets.append(relative_error(run.final, 300 * goal - offset))
        moved.append(relative_error(goals[1], goals[0]))
    for case in draws(((4, 9), (5, 5)), SEEDS):
        goal = references.natural_gradient_limit(case.x, case.y, case.start)
        few.append(relative_error(case.x @ goal, case.y))
    return Outcome(
        (
            below("e^t grad_t against grad_0 at t = 1, 2, ..., 30, relative", max(decay), 1e-6),
            below("limit: c . b against the optimum of the dual program, relative",
                  max(gaps), 1e-7),
            above("cos of beta and the limit at t = 30, best draw", max(early), 0.99999),
            above("cos of beta and the limit at t = 30, worst draw", min(early), 0.9995),
            above("cos of beta and the limit at t = 300, worst draw", min(late), 0.99999),
            below("beta at t = 300 against t b - Z_S^-1 log l_S, relative", max(offsets), 1e-6),
            above("limits from the two starts, relative difference, largest: the start counts",
                  max(moved), 0.01),
            below("N <= D: X b - y", max(few), 1e-9),
        ),
        notes=("A cosine of 0.99999 at t = 30 is a matter of the draw: beta = t b - Z_S^-1 log l_S "
               "with the multipliers l of the support vectors, so 1 - cos falls as 1 / t^2, from a "
               "value that grows with the spread of l. By t = 300 every draw is there.",),
    )  # fmt: skip
