"""Training of every structure on real data, beside what its coefficient matrix predicts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from natgrad_flax import MLP, RelativeDamping, Structure
from ntk_analysis.coefficient import Damping, coefficient_pair
from ntk_analysis.dynamics import linearised_dynamics, squared_losses
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.reproduce.natgrad.common import condition_number, dense_net, digits_pair
from ntk_analysis.reproduce.natgrad.frontier_map import STRUCTURES
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    check,
)
from ntk_analysis.training import Trainer

_SAMPLES, _WIDTH = 32, 256
_GOAL, _MOST = 1e-3, 1000
_DAMPING = RelativeDamping(1e-3)
_DAMPED = ("diagonal", "blocks of 8", "units of rank 40", "unit-wise")
_OTHERS = (
    "gradient descent", "Shampoo 1/4", "Shampoo 1/2", "Shampoo 1", "KFOC", "A alone", "B alone",
    "mini-block", "mini-block, outgoing", "EKFAC", "K-FAC", "block-diagonal", "block-tri-diagonal",
    "Nystroem", "exact",
)  # fmt: skip
_ISOTROPIC = (
    "exact", "Nystroem", "block-diagonal", "block-tri-diagonal", "K-FAC", "A alone", "B alone",
    "mini-block", "EKFAC", "unit-wise", "units of rank 40",
)  # fmt: skip


@check(
    "NG-Frontier-Training",
    "Training follows the coefficient matrix",
    claim="At the learning rate 1/lambda_max(Theta-bar) a wide network needs about as many steps "
    "as the linearised one: a few where Theta-bar is nearly isotropic, dozens to hundreds where it "
    "is not, which on real data is gradient descent, the diagonals and Shampoo, but not its "
    "square. Unit-wise Fishers and their blocks need a damping where there are kinks: without one "
    "a ReLU network leaves its linearisation in the first steps, since units with few active "
    "samples move as far as others in function space, and so very far.",
    setting="digits 0 and 7 of 8 x 8 pixels, standardised, of norm 8, N = 32, targets +-0.5; two "
    "hidden layers of 256 units, tanh and ReLU, one output, no biases, one seed, float64, full "
    "batch; steps to a thousandth of the first loss; no damping, but 1e-3 of the mean diagonal for "
    "the unit-wise Fisher, its blocks and the diagonal",
    origin="ours",
)
@in_float64
def training(report: Report) -> Outcome:
    """Steps to a thousandth of the loss, predicted and measured, by activation and structure."""
    x, y = digits_pair(_SAMPLES)
    data: dict[str, Any] = {"goal": _GOAL, "rows": {}}
    measurements: list[Measurement] = []
    for activation in ("tanh", "relu"):
        model = dense_net((x.shape[1], _WIDTH, _WIDTH, 1), activation, param_dtype=jnp.float64)
        here = Problem(model, initial_signals(model, x), x, y)
        found: dict[str, Run] = {}
        for name in (*_OTHERS, *_DAMPED):
            report(f"{activation}, {name}")
            found[name] = _train(STRUCTURES[name], _DAMPING if name in _DAMPED else 0.0, here)
        data["rows"][activation] = [
            {"name": name, "structure": STRUCTURES[name].name, **one.as_json()}
            for name, one in found.items()
        ]
        slow = found["gradient descent"].measured
        measurements += [
            below(
                f"{activation}: largest (steps - 2) over those predicted",
                max((one.measured - 2) / one.predicted for one in found.values()),
                1.5,
            ),
            above(
                f"{activation}: smallest (steps + 2) over those predicted",
                min((one.measured + 2) / one.predicted for one in found.values()),
                0.7,
            ),
            below(
                f"{activation}: most steps of what is nearly isotropic",
                max(found[name].measured for name in _ISOTROPIC),
                5,
            ),
            above(f"{activation}: steps of gradient descent", slow, 100),
            above(
                f"{activation}: steps of Shampoo over those of its square",
                found["Shampoo 1/4"].measured / found["Shampoo 1/2"].measured,
                3,
            ),
        ]
    for name in ("unit-wise", "blocks of 8"):
        report(f"relu, {name}, no damping")
        peak = _train(STRUCTURES[name], 0.0, here).peak
        measurements.append(
            above(f"relu, {name}, no damping: largest loss over the first", peak, 3)
        )
    return Outcome(tuple(measurements), data)


class Run(NamedTuple):
    """One structure on one network.

    Attributes:
      condition: condition number of Theta-bar.
      predicted: steps of the linearised network to the goal.
      measured: those of the network, infinite where it does not come there.
      peak: its largest loss over the first, infinite where one is no number.
    """

    condition: float
    predicted: float
    measured: float
    peak: float

    def as_json(self) -> dict[str, float]:
        """For figures."""
        return self._asdict()


class Problem(NamedTuple):
    """A network, its signals on N samples, inputs and targets."""

    model: MLP
    signals: InitialSignals
    x: Matrix
    y: Matrix


def _train(structure: Structure, damping: Damping, problem: Problem) -> Run:
    """At 1 / lambda_max, for twice as many steps as predicted and a few more."""
    model, signals, x, y = problem
    matrix, _ = coefficient_pair(structure, signals, damping)
    rate = 1 / np.linalg.eigvalsh(matrix)[-1]
    nowhere = np.zeros((0, len(matrix)))
    linear = linearised_dynamics(matrix, nowhere, signals.outputs, y, rate, _MOST).train_losses
    predicted = _steps(linear)
    steps = int(min(_MOST, 2 * predicted + 8))
    losses = squared_losses(
        Trainer(model, structure, x, y, x[:1], damping).run(rate, steps).outputs_train, y
    )
    peak = float(np.max(losses / losses[0])) if np.isfinite(losses).all() else np.inf
    return Run(condition_number(matrix), predicted, _steps(losses), peak)


def _steps(losses: Matrix) -> float:
    """The first step at which the loss is the goal or less."""
    there = losses <= _GOAL * losses[0]
    return float(np.argmax(there)) if there.any() else np.inf
