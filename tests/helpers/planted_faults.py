"""One planted fault a check that is run whole: what the check must not pass with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from natgrad_flax import (
    KFAC,
    BlockDiagonal,
    Diagonal,
    Exact,
    LevenbergMarquardt,
    geometry,
)
from natgrad_flax.linear import diagonal_network, logistic, matrix_factorization, references
from ntk_analysis.analytic import AnalyticKernels
from ntk_analysis.reproduce.bernacchia import bottleneck, damping, flow, inverses
from ntk_analysis.reproduce.bernacchia import identities as linear_identities
from ntk_analysis.reproduce.karakida_osawa import (
    classes,
    common,
    cross_entropy,
    identities,
    kernels,
    kfac,
    layer_wise,
    unit_wise,
)
from ntk_analysis.reproduce.kerekes import (
    diagonal,
    invariance,
    matrices,
    parametrisation,
    stable_solve,
    toy,
)
from ntk_analysis.reproduce.kerekes import logistic as logistic_checks
from ntk_analysis.reproduce.natgrad import (
    drift,
    eigenbasis,
    frontier,
    frontier_batches,
    frontier_blocks,
    frontier_mini_block,
    frontier_weights,
    limits,
    sharing,
    theorem,
    width,
)


class Fault(NamedTuple):
    """A wrong function, or a wrong structure, in the place of a right one.

    Attributes:
      what: is wrong.
      where: the module or class that the check takes it from.
      name: of the attribute there.
      wrong: from the right one to the wrong one.
    """

    what: str
    where: Any
    name: str
    wrong: Callable[[Any], Any]

    def plant(self, monkeypatch) -> None:
        monkeypatch.setattr(self.where, self.name, self.wrong(getattr(self.where, self.name)))


def times(factor: float) -> Callable[[Any], Any]:
    """What a function returns, times a number."""

    def wrong(right):
        return lambda *args, **options: jax.tree.map(
            lambda leaf: factor * leaf, right(*args, **options)
        )

    return wrong


def instead(value: Any) -> Callable[[Any], Any]:
    """Something else, whatever the arguments of a class."""
    return lambda right: lambda *args, **options: value


def _without_metric(right):
    return lambda phi, objective, xi, *rest: right(phi, objective, xi)


def _plain_gradient(right):
    return lambda phi, objective, xi, *rest: jax.grad(lambda at: objective(phi(at)))(xi)


def _without_last_layer(right):
    def wrong(*args):
        inside, outside = right(*args)
        return inside - np.eye(len(inside)), outside

    return wrong


PLAIN = Fault(
    "the gradient itself, without G^-", geometry, "natural_parameter_gradient", _plain_gradient
)
NO_METRIC = Fault("the metric is dropped", geometry, "natural_parameter_gradient", _without_metric)
LAST_LAYER = Fault("the last layer is dropped", common, "coefficient_pair", _without_last_layer)
KFAC_LAST = Fault("the last layer's B* is 1", kfac, "KFAC", instead(KFAC("literal")))

NOT_PROJECTED = Fault(
    "the free part of an inverse is not projected",
    geometry,
    "any_generalised_inverse",
    lambda right: lambda matrix, free: jnp.linalg.pinv(matrix) + free,
)
DESCENT = Fault(
    "gradient descent in its place",
    invariance,
    "logistic_field",
    lambda right: logistic.gradient_field,
)


def _large_margin(right):
    return lambda x, y, *start: references.max_margin(x, y).coefficients


FAULTS = {
    "KO-Eq5": Fault(
        "another power of N: the learning rate over N",
        identities,
        "predict_dynamics",
        lambda right: (
            lambda method, model, x, y, rate, *rest, **options: right(
                method, model, x, y, rate / len(x), *rest, **options
            )
        ),
    ),
    "KO-Eq9": Fault(
        "the damping is dropped",
        common,
        "solve_residual",
        lambda right: (
            lambda structure, signals, residual, damping: right(structure, signals, residual, 0.0)
        ),
    ),
    "KO-Eq10": Fault("a unit's inputs are uncoupled", identities, "UnitWise", instead(Diagonal())),
    "KO-Eq22": Fault("Sigma is dropped", identities, "LayerWise", instead(BlockDiagonal())),
    "KO-Thm4.1": Fault("Sigma is dropped", layer_wise, "LayerWise", instead(BlockDiagonal())),
    "KO-Cor4.2": Fault(
        "the last layer stands still",
        layer_wise,
        "solve_residual",
        lambda right: (
            lambda *args: [
                *right(*args)[:-1],
                *jax.tree.map(jnp.zeros_like, right(*args)[-1:]),
            ]
        ),
    ),
    "KO-Eq18": LAST_LAYER,
    "KO-Lem4.3": Fault(
        "the couplings are negative",
        layer_wise.BlockTriDiagonal,
        "coupling",
        lambda right: lambda self, depth: 2 * np.eye(depth) - right(self, depth),
    ),
    "KO-Eq20": KFAC_LAST,
    "KO-KFAC-lowdim": KFAC_LAST,
    "KO-Forster": Fault("the factor of the first layer is dropped", kfac, "KFAC", instead(KFAC())),
    "KO-Thm5.1": LAST_LAYER,
    "KO-Unit-lowdim": Fault(
        "the last layer is dropped", unit_wise, "coefficient_pair", _without_last_layer
    ),
    "KO-SecD": Fault("the sign of a step", cross_entropy, "function_step", times(-1)),
    "KO-SecE": Fault(
        "Theta_l without B_l",
        AnalyticKernels,
        "tangent",
        lambda right: property(lambda self: self.inputs),
    ),
    "KO-NZ": Fault("one entry a parameter", unit_wise, "UnitWise", instead(Diagonal())),
    "BE-Eq7/8": Fault("the sign", linear_identities, "gradient", times(-1)),
    "BE-Eq22": Fault("counted twice", linear_identities, "fisher", times(2)),
    "BE-Eq14/15": Fault("counted twice", linear_identities, "fisher_block", times(2)),
    "BE-Eq10": Fault("1/L is dropped", linear_identities, "natural_gradient", times(3)),
    "BE-Eq16": Fault("1/L is dropped", linear_identities, "natural_gradient", times(3)),
    "BE-Eq23": Fault("1/L^2 is dropped", inverses, "generalised_inverse", times(9)),
    "BE-supp37": Fault("1/L is dropped", inverses, "natural_gradient", times(3)),
    "BE-supp34": NOT_PROJECTED,
    "BE-Eq18": Fault(
        "another rate",
        flow,
        "flow_product",
        lambda right: lambda start, end, time: right(start, end, 2 * time),
    ),
    "BE-discrete": Fault(
        "another exponent",
        flow,
        "euler_product",
        lambda right: lambda start, end, depth, rate: right(start, end, depth + 1, rate),
    ),
    "BE-Eq19": Fault("the sign", bottleneck, "flow_direction", times(-1)),
    "BE-bottleneck": Fault(
        "Eq. 10 in its place",
        bottleneck,
        "tangent_projection",
        lambda right: bottleneck.flow_direction,
    ),
    "BE-Eq20": Fault(
        "lambda in the place of its root",
        damping,
        "natural_gradient",
        lambda right: lambda weights, data, damping=0.0: right(weights, data, damping=damping**2),
    ),
    "BE-Eq21": Fault(
        "more damping where less is due",
        LevenbergMarquardt,
        "adapt",
        lambda right: lambda self, now, *ratio: now**2 / right(self, now, *ratio),
    ),
    "KE-Stmt": Fault("the sign", parametrisation, "diagonal_step", times(-1)),
    "KE-Lem1": Fault(
        "phi(s) for phi(s) phi(-s)",
        logistic_checks,
        "logistic_fisher",
        lambda right: lambda x, beta: x.T @ (expit(x @ beta)[:, None] * x),
    ),
    "KE-Lem2": Fault("the sign", matrix_factorization, "natural_gradient", times(-1)),
    "KE-RemRank": Fault(
        "a ridge",
        logistic_checks,
        "logistic_fisher",
        lambda right: lambda x, beta: right(x, beta) + 1e-6 * np.eye(len(beta)),
    ),
    "KE-Thm1": DESCENT,
    "KE-Thm2": DESCENT,
    "KE-Concl": DESCENT,
    "KE-Thm3/4": Fault(
        "another rate",
        logistic,
        "train_margins",
        lambda right: lambda margins, time: right(margins, 2 * time),
    ),
    "KE-AppD": Fault(
        "the depth is dropped",
        references,
        "max_margin",
        lambda right: lambda x, y, depth=1: right(x, y),
    ),
    "KE-AppG": Fault(
        "a ridge",
        references,
        "least_squares",
        lambda right: lambda x, y: np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y),
    ),
    "KE-NGF-limit": Fault("a large margin", references, "natural_gradient_limit", _large_margin),
    "KE-SVP": Fault(
        "the other answer",
        references,
        "all_support_vectors",
        lambda right: lambda x, y: not right(x, y),
    ),
    "KE-B1": Fault("the sign", stable_solve, "logistic_step", times(-1)),
    "KE-B2": Fault("the sign", diagonal, "diagonal_step", times(-1)),
    "KE-NGD-MF": Fault("1/L is dropped", matrices, "_joint_step", times(2)),
    "KE-Eq51": Fault(
        "a layer's own weight", diagonal_network, "other_products", lambda right: lambda w: w
    ),
    "KE-Fig2": Fault("a large margin", toy, "natural_gradient_limit", _large_margin),
    "KE-Fig3": Fault(
        "a flow for a step",
        matrix_factorization,
        "step_kernel",
        lambda right: (
            lambda factors, entry, kind, **_: matrix_factorization.flow_kernel(
                factors, entry, kind=kind
            )
        ),
    ),
    "VO-Eq2": Fault(
        "the metric is dropped",
        geometry,
        "span_projection",
        lambda right: lambda phi, xi, metric: right(phi, xi),
    ),
    "VO-Eq4": NOT_PROJECTED,
    "VO-Thm1": NO_METRIC,
    "VO-Thm2": PLAIN,
    "VO-Rem1": PLAIN,
    "VO-Ex1": PLAIN,
    "VO-Ex2": PLAIN,
    "VO-Sec3.2": NO_METRIC,
    "VO-A3": PLAIN,
    "VO-traj": PLAIN,
    "VO-Prop1": Fault(
        "every point is proper", geometry, "is_proper", lambda right: lambda *args: True
    ),
    "VO-Prop2": PLAIN,
    "NG-Conv-Thm4.1": Fault("Sigma is dropped", theorem, "LayerWise", instead(BlockDiagonal())),
    "NG-Conv-Readout": Fault("layers are coupled", theorem, "BlockDiagonal", instead(Exact())),
    "NG-Conv-Shift": Fault(
        "a ridge",
        theorem,
        "empirical_layer_kernels",
        lambda right: lambda model, x: [*right(model, x), 1e-3 * np.eye(len(x))],
    ),
    "NG-Conv-Expand": Fault("reduce for expand", sharing, "KFAC", instead(KFAC(sharing="reduce"))),
    "NG-Frontier-Half": Fault(
        "the other half",
        frontier,
        "Foof",
        lambda right: lambda side: right("units" if side == "inputs" else "inputs"),
    ),
    "NG-Frontier-Shampoo": Fault(
        "half the power", frontier, "Shampoo", lambda right: lambda power: right(power / 2)
    ),
    "NG-Frontier-Batches": Fault(
        "a ridge",
        frontier_batches,
        "pseudo_inverse",
        lambda right: (
            lambda matrix, **options: right(matrix + 0.3 * np.eye(len(matrix)), **options)
        ),
    ),
    "NG-Frontier-Weights": Fault(
        "one iteration more",
        frontier_weights,
        "KFOC",
        lambda right: lambda iterations: right(iterations + 1),
    ),
    "NG-Frontier-Projection": Fault(
        "half the block",
        frontier_blocks,
        "UnitBlocks",
        lambda right: lambda size: right(size // 2),
    ),
    "NG-Frontier-MiniBlock": Fault(
        "the outgoing weights",
        frontier_mini_block,
        "MiniBlock",
        lambda right: lambda side: right("units"),
    ),
    "NG-Width-Kink": Fault(
        "a step one per cent short",
        width,
        "_exact_left",
        lambda right: lambda graph, state, x, z, rate=1.0: right(graph, state, x, z, 0.99 * rate),
    ),
    "NG-Drift-Width": Fault(
        "the root of the change",
        drift,
        "kernel_drift",
        lambda right: (
            lambda *args: replace(right(*args), relative_change=right(*args).relative_change ** 0.5)
        ),
    ),
    "NG-Conv-Unit": Fault("one entry a parameter", sharing, "UnitWise", instead(Diagonal())),
}
"""Of every fast check, by its identifier."""

SLOW_FAULTS = {
    "KO-SecD-wide": Fault("half the rate", classes, "natural_gradient", times(0.5)),
    "KO-Eq20-classes": Fault("the last layer's B* is 1", classes, "KFAC", instead(KFAC("literal"))),
    "KO-SecE-MC": Fault("counted twice", kernels, "empirical_layer_kernels", times(2)),
    "NG-EKFAC": Fault("K-FAC in its place", eigenbasis, "EKFAC", instead(KFAC("literal"))),
    "NG-Conv-Kernels": Fault("counted twice", limits, "empirical_layer_kernels", times(2)),
    "NG-Conv-Reduce": Fault("expand for reduce", sharing, "KFAC", instead(KFAC())),
    "NG-Conv-First": Fault("one entry a parameter", sharing, "UnitWise", instead(Diagonal())),
}
"""Of slow checks whose records do not hold what they measured: a minute each at most."""
