"""One planted fault a check: what the check must not pass with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_flax import KFAC, BlockDiagonal, Diagonal, geometry
from ntk_analysis.analytic import AnalyticKernels
from ntk_analysis.reproduce.karakida_osawa import (
    common,
    cross_entropy,
    identities,
    kfac,
    layer_wise,
    unit_wise,
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
    "VO-Eq2": Fault(
        "the metric is dropped",
        geometry,
        "span_projection",
        lambda right: lambda phi, xi, metric: right(phi, xi),
    ),
    "VO-Eq4": Fault(
        "the free part is not projected",
        geometry,
        "any_generalised_inverse",
        lambda right: lambda matrix, free: jnp.linalg.pinv(matrix) + free,
    ),
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
}
"""By the identifier of the check."""
