"""Section D of Karakida & Osawa (2020): natural gradient with the softmax cross-entropy.

The library's structures, which never build a Jacobian, beside explicit Jacobians, explicit P x P
matrices and explicit (pseudo-)inverses of small networks, all in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy.linalg import block_diag
from scipy.special import logsumexp, softmax

from natgrad_flax import (
    MLP,
    BlockDiagonal,
    BlockTriDiagonal,
    Exact,
    LayerWise,
    SoftmaxCrossEntropy,
    Structure,
    fisher_signals,
    jacobian_signals,
)
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, below, check
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

_WIDTHS = (6, 12, 12, 3)
_NUM_SAMPLES = 5
_SEEDS = (0, 1)
_OUTPUT_DAMPING = 0.1
_DAMPING = 1e-2
_SIGMA = ((2.0, 0.5, 0.0), (0.5, 1.0, 0.3), (0.0, 0.3, 1.5))
_LAYER_WISE: tuple[LayerWise, ...] = (BlockDiagonal(), BlockTriDiagonal(), LayerWise(_SIGMA))
_TIME, _TIME_STEPS = 2.0, 400
_DRAWN = 10


@dataclass(frozen=True, eq=False)
class Problem:
    """A small classification problem and everything dense about it.

    Attributes:
      model: the network, float64.
      x: inputs, shape (N, M_0).
      y: one-hot targets, shape (N, C).
      logits: f, shape (N, C).
      jacobians: J_l = df/dtheta_l by automatic differentiation, L arrays (N C, P_l).
    """

    model: MLP
    x: Array
    y: Array
    logits: Matrix
    jacobians: list[Matrix]

    @property
    def jacobian(self) -> Matrix:
        """J, shape (N C, P)."""
        return np.concatenate(self.jacobians, axis=1)

    @property
    def residual(self) -> Matrix:
        """p - y, shape (N C,)."""
        difference: Matrix = (softmax(self.logits, axis=1) - np.asarray(self.y)).reshape(-1)
        return difference


def make_problem(seed: int) -> Problem:
    """Gaussian inputs, drawn labels and a tanh network with biases whose J_l have full row rank.

    To be called with float64 switched on.
    """
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((_NUM_SAMPLES, _WIDTHS[0])))
    y = jnp.asarray(np.eye(_WIDTHS[-1])[rng.integers(_WIDTHS[-1], size=_NUM_SAMPLES)])
    model = MLP(
        _WIDTHS,
        activation="tanh",
        bias_variance=0.3,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(seed),
    )
    graphdef, state = nnx.split(model)
    # parameters are raveled layer after layer
    flat, unravel = ravel_pytree(state)

    def forward(vector: Array) -> Array:
        return nnx.merge(graphdef, unravel(vector))(x).reshape(-1)

    dense = np.asarray(jax.jacobian(forward)(flat))
    sizes = [(k + 1) * m for k, m in itertools.pairwise(_WIDTHS)]
    jacobians = np.split(dense, np.cumsum(sizes)[:-1], axis=1)
    return Problem(model, x, y, np.asarray(model(x)), jacobians)


def output_fisher(logits: Matrix, damping: float = 0.0) -> Matrix:
    """blockdiag_n(diag(p) - p p^T + damping I), shape (N C, N C)."""
    rows = softmax(logits, axis=1)
    blocks = [np.diag(p) - np.outer(p, p) + damping * np.eye(len(p)) for p in rows]
    matrix: Matrix = block_diag(*blocks)
    return matrix


def function_step(
    problem: Problem, structure: Structure, loss: SoftmaxCrossEntropy, damping: float
) -> Matrix:
    """J G^{-1} J^T r / N by the library: what the linearised outputs fall by at eta = 1, (N C,)."""
    graphdef, state = nnx.split(problem.model)
    settings = {"graphdef": graphdef, "structure": structure, "loss": loss, "damping": damping}
    return np.asarray(_function_step(state, problem.x, problem.y, **settings))


@partial(jax.jit, static_argnames=("graphdef", "structure", "loss", "damping"))
def _function_step(
    state: Any,
    x: Array,
    y: Array,
    *,
    graphdef: Any,
    structure: Structure,
    loss: SoftmaxCrossEntropy,
    damping: float,
) -> Array:
    model = nnx.merge(graphdef, state)
    signals, residual = fisher_signals(model, x, y, loss=loss)
    updates = structure.solve(signals, residual, damping)
    plain = jacobian_signals(model, x)
    parts = [layer.jvp(update) for layer, update in zip(plain.layers, updates, strict=True)]
    return sum(parts[1:], start=parts[0]).reshape(-1)


def dense_step(problem: Problem, metric: Matrix) -> Matrix:
    """J G^+ J^T r / N for an explicit G, shape (N C,)."""
    gradient = problem.jacobian.T @ problem.residual / _NUM_SAMPLES
    step: Matrix = problem.jacobian @ (pseudo_inverse(metric, symmetric=True) @ gradient)
    return step


def layer_wise_metric(problem: Problem, sigma: Matrix, output: Matrix) -> Matrix:
    """S^T (Sigma (x) H) S / N with S = blockdiag(J_1, ..., J_L), shape (P, P)."""
    spread: Matrix = block_diag(*problem.jacobians)
    return spread.T @ np.kron(sigma, output) @ spread / _NUM_SAMPLES


@check(
    "KO-SecD",
    "Softmax cross-entropy",
    claim=(
        "With the metric J^T (H + rho I) J / N a step moves the logits by -eta (H + rho I)^{-1} "
        "(p - y); the layer-wise version with a coupling Sigma moves them alpha times as far. The "
        "damped exact natural gradient needs a system in sample space only. At zero damping only "
        "the logit of the true class moves, by eta / p_k, up to a common shift, and under the flow "
        "its margin z obeys e^z(t) + 1 = e^t (e^z(0) + 1)."
    ),
    setting=(
        "tanh networks 6-12-12-3 with biases, N = 5 Gaussian inputs, float64, seeds 0 and 1; "
        "against automatic Jacobians and explicit pseudo-inverses; the margin by a Runge-Kutta "
        "flow of the linearised network"
    ),
    origin="ours",
    fast=True,
)
def run_cross_entropy(report: Report) -> Outcome:
    """Function-space steps, push-through identities and the margin law."""
    errors: dict[str, float] = {}

    def note(what: str, error: float) -> None:
        errors[what] = max(errors.get(what, 0.0), error)

    with jax.enable_x64(True):
        for seed in _SEEDS:
            report(f"seed {seed}")
            problem = make_problem(seed)
            _isotropic_steps(problem, note)
            _push_through(problem, note)
            _undamped(problem, note)
    report("margins")
    times, found, predicted = margin_flow(problem)
    note("margin law e^z + 1 = e^t (e^z(0) + 1)", relative_error(np.exp(found), np.exp(predicted)))
    measurements: list[Measurement] = [
        below(f"{what}: error", error, 1e-8) for what, error in errors.items()
    ]
    document: dict[str, Any] = {
        "time": times[::_DRAWN].tolist(),
        "curves": [
            {
                "sample": n,
                "theory": predicted[::_DRAWN, n].tolist(),
                "network": found[::_DRAWN, n].tolist(),
            }
            for n in range(_NUM_SAMPLES)
        ],
    }
    return Outcome(tuple(measurements), document)


def _isotropic_steps(problem: Problem, note: Callable[[str, float], None]) -> None:
    """Steps with an output damping: (H + rho I)^{-1} (p - y), times alpha."""
    loss = SoftmaxCrossEntropy(output_damping=_OUTPUT_DAMPING)
    output = output_fisher(problem.logits, _OUTPUT_DAMPING)
    wanted = np.linalg.solve(output, problem.residual)
    jacobian = problem.jacobian
    note("exact + MSE step", relative_error(function_step(problem, Exact(), loss, 0.0), wanted))
    metric = jacobian.T @ output @ jacobian / _NUM_SAMPLES
    note("exact + MSE step, explicit metric", relative_error(dense_step(problem, metric), wanted))
    for structure in _LAYER_WISE:
        sigma = structure.coupling(len(problem.jacobians))
        alpha = float(np.linalg.solve(sigma, np.ones(len(sigma))).sum())
        found = function_step(problem, structure, loss, 0.0)
        note(f"{structure.name} step over alpha", relative_error(found / alpha, wanted))
        explicit = dense_step(problem, layer_wise_metric(problem, sigma, output))
        note(
            f"{structure.name} step over alpha, explicit metric",
            relative_error(explicit / alpha, wanted),
        )


def _push_through(problem: Problem, note: Callable[[str, float], None]) -> None:
    """(F + rho I)^{-1} J^T r / N by systems in sample space."""
    loss, jacobian, residual = SoftmaxCrossEntropy(), problem.jacobian, problem.residual
    kernel, output = jacobian @ jacobian.T, output_fisher(problem.logits)
    fisher = jacobian.T @ output @ jacobian / _NUM_SAMPLES
    damped = fisher + _DAMPING * np.eye(len(fisher))
    wanted = np.linalg.solve(damped, jacobian.T @ residual / _NUM_SAMPLES)
    shift = _DAMPING * np.eye(len(kernel))
    coupled = np.linalg.solve(output @ kernel / _NUM_SAMPLES + shift, residual) / _NUM_SAMPLES
    note("push-through by the system in H K", relative_error(jacobian.T @ coupled, wanted))
    logits = jnp.asarray(problem.logits)
    factor = block_diag(*np.asarray(loss.factor(logits)))
    weights = np.asarray(loss.coefficients(logits, problem.y)).reshape(-1)
    symmetric = factor.T @ kernel @ factor / _NUM_SAMPLES
    symmetric += _DAMPING * np.eye(len(symmetric))
    dual = factor @ np.linalg.solve(symmetric, weights) / _NUM_SAMPLES
    note("push-through by the system in R^T K R", relative_error(jacobian.T @ dual, wanted))
    found = function_step(problem, Exact(), loss, _DAMPING)
    note("damped exact step", relative_error(found, jacobian @ wanted))


def _undamped(problem: Problem, note: Callable[[str, float], None]) -> None:
    """The pseudo-inverse moves the true logit by 1 / p_k, up to a shift common to the classes."""
    target = np.asarray(problem.y)
    wanted = target / softmax(problem.logits, axis=1)
    fisher = problem.jacobian.T @ output_fisher(problem.logits) @ problem.jacobian / _NUM_SAMPLES
    library = function_step(problem, Exact(), SoftmaxCrossEntropy(), 0.0)
    for what, step in (("library", library), ("explicit", dense_step(problem, fisher))):
        found, expected = (
            rows - rows.mean(axis=1, keepdims=True)
            for rows in (-step.reshape(target.shape), wanted)
        )
        note(f"undamped step is e_k / p_k up to a shift, {what}", relative_error(found, expected))


def margin_flow(problem: Problem) -> tuple[Matrix, Matrix, Matrix]:
    """Natural-gradient flow of the linearised network, by Runge-Kutta steps of fourth order.

    Args:
      problem: its Jacobian stays fixed; the Fisher follows the logits.

    Returns:
      Times (T,), the margins z = f_k - log sum_{c != k} exp f_c of all samples (T, N), and what the
      law predicts for them (T, N).
    """
    target = np.asarray(problem.y)
    kernel = problem.jacobian @ problem.jacobian.T

    def velocity(logits: Matrix) -> Matrix:
        # J F^+ J^T r / N with F = A^T A / N, A = R^T J and r = R w is -J A^+ w
        roots = np.sqrt(softmax(logits, axis=1))
        factor = block_diag(*(np.diag(root) - np.outer(root**2, root) for root in roots))
        weights = ((roots**2 - target) / roots).reshape(-1)
        gram = factor.T @ kernel @ factor
        moved = kernel @ (factor @ (pseudo_inverse(gram, symmetric=True) @ weights))
        speed: Matrix = -moved.reshape(target.shape)
        return speed

    times = np.linspace(0, _TIME, _TIME_STEPS + 1)
    step, logits = times[1], problem.logits
    seen = [margins(logits, target)]
    for _ in times[1:]:
        first = velocity(logits)
        second = velocity(logits + step / 2 * first)
        third = velocity(logits + step / 2 * second)
        fourth = velocity(logits + step * third)
        logits = logits + step / 6 * (first + 2 * second + 2 * third + fourth)
        seen.append(margins(logits, target))
    found = np.stack(seen)
    return times, found, margin_law(times, found[0])


def margins(logits: Matrix, target: Matrix) -> Matrix:
    """z = f_k - log sum_{c != k} exp f_c of the true class k of every sample, shape (N,)."""
    others = np.where(target > 0, -np.inf, logits)
    found: Matrix = np.sum(target * logits, axis=1) - logsumexp(others, axis=1)
    return found


def margin_law(times: Matrix, start: Matrix) -> Matrix:
    """z(t) by e^z + 1 = e^t (e^z(0) + 1), shape (T, N)."""
    law: Matrix = np.log(np.exp(times)[:, None] * (np.exp(start) + 1) - 1)
    return law
