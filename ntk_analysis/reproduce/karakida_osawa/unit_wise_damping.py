"""Theorem 5.1 of Karakida & Osawa (2020) under its own damping, and training beside Eq. 24."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from natgrad_flax import MLP, RelativeDamping, UnitWise
from ntk_analysis.coefficient import Damping
from ntk_analysis.dynamics import squared_losses
from ntk_analysis.empirical import Matrix
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.reproduce.images import mnist_pair
from ntk_analysis.reproduce.karakida_osawa.common import Problem, problem
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
    close,
)
from ntk_analysis.training import Trainer

_RATIO = 1e-3
_FACTOR = "factor of the loss a step over 6 steps (Eq. 24: 0.25)"


def dampings(width: int) -> dict[str, Damping]:
    """The theorem's largest damping, as printed and relative to a block, and smaller ones."""
    own = width ** (-1 / 12)
    return {
        "M^(-1/12)": own,
        "1/M": 1 / width,
        "M^(-1/12) of a block's diagonal": RelativeDamping(own),
        "1/M^2": width**-2.0,
        "0": 0.0,
    }


def conditions(case: Problem, names: Collection[str]) -> list[float]:
    """Condition numbers of Theta-bar at some of the dampings, behind that of the tangent kernel."""
    chosen = {name: rho for name, rho in dampings(case.model.widths[1]).items() if name in names}
    matrices = [
        case.ours(GradientDescent())[0],
        *(case.ours(UnitWise(), rho)[0] for rho in chosen.values()),
    ]
    return [float(np.linalg.cond(matrix)) for matrix in matrices]


@dataclass(frozen=True)
class _Run:
    """One network that is trained with the unit-wise Fisher."""

    activation: str
    weight_variance: float
    width: int


@check(
    "KO-Thm5.1-training",
    "Training with the damped unit-wise Fisher",
    claim="Training with the unit-wise Fisher follows Eq. 24 with alpha = gamma M (L - 1).",
    setting="MNIST 0 and 7, N = 50 (100 undamped), L = 3, no biases, seed 0, float32, M = 1024 and "
    "256; relative damping 1e-3, and the theorem's M^(-1/12). Condition numbers: tanh 40-M-M-1, N "
    "= 30, M = 128, 512 and 2048",
    origin="ours",
)
def training(report: Report) -> Outcome:
    """Finite networks beside Eq. 24, what dampings do, and what happens without one."""
    data = _mnist(50)
    narrow, relu, tanh = _Run("relu", 2.0, 256), _Run("relu", 2.0, 1024), _Run("tanh", 1.5, 1024)
    small = RelativeDamping(_RATIO)
    curves: list[dict[str, Any]] = []
    measurements: list[Measurement] = []

    def run(what: _Run, name: str, damping: Damping, factor: float, steps: int) -> Matrix:
        report(f"{what.activation}, width {what.width}, damping {name}, c = {factor:g}")
        losses = _train(what, *data, damping, steps=steps, factor=factor)
        curves.append(
            {
                "activation": what.activation,
                "width": what.width,
                "damping": name,
                "factor": factor,
                "network": losses.tolist(),
                "theory": (losses[0] * (1 - factor) ** (2.0 * np.arange(steps + 1))).tolist(),
            }
        )
        return losses / losses[0]

    name = f"{_RATIO:g} of a block's diagonal"
    first = run(narrow, name, small, 1.0, 3)[1]
    for network in (relu, tanh):
        ratios = run(network, name, small, 1.0, 3)
        half = run(network, name, small, 0.5, 6)
        what = f"{network.activation}, M = 1024"
        measurements += [
            below(f"{what}: loss_1 / loss_0", ratios[1], 0.1),
            below(f"{what}: loss_2 / loss_0", ratios[2], 2e-3),
            close(f"{what}, c = 0.5: {_FACTOR}", half[6] ** (1 / 6), 0.25, 0.06),
        ]
        if network == relu:
            measurements.append(
                above("ReLU: loss_1 / loss_0 at M = 256 over M = 1024", first / ratios[1], 1.0)
            )
    for own in ("M^(-1/12)", "M^(-1/12) of a block's diagonal"):
        ratios = run(tanh, own, dampings(1024)[own], 0.5, 6)
        what = f"tanh, M = 1024, rho = {own}, c = 0.5: {_FACTOR}"
        measurements.append(above(what, ratios[6] ** (1 / 6), 0.4))
    report("without damping")
    bare = _train(relu, *_mnist(100), 0.0, steps=6)
    worst = float(np.nanmax(bare / bare[0])) if np.isfinite(bare).all() else np.inf
    measurements.append(
        above("ReLU, M = 1024, N = 100, no damping: largest loss_t / loss_0, t <= 6", worst, 10.0)
    )
    widths, table = (128, 512, 2048), []
    for width in widths:
        report(f"condition numbers, width {width}")
        table.append(conditions(problem((40, width, width, 1), 30), dampings(width)))
    names = ("tangent kernel", *dampings(1))
    found = dict(zip(names, np.asarray(table).T, strict=True))
    over = found["M^(-1/12)"] / found["tangent kernel"]
    measurements += [
        between(
            "rho = M^(-1/12), M = 128 to 2048: condition number over that of the tangent kernel, "
            "smallest",
            float(over.min()),
            0.95,
            1.05,
        ),
        between(
            "relative to a block's diagonal, M = 2048: condition number",
            float(found["M^(-1/12) of a block's diagonal"][-1]),
            10.0,
            30.0,
        ),
        below(
            "rho = 1/M^2: condition number at M = 2048 over that at M = 128",
            float(found["1/M^2"][-1] / found["1/M^2"][0]),
            0.5,
        ),
        below("rho = 0: condition number, largest", float(found["0"].max()), 1.001),
    ]
    return Outcome(
        tuple(measurements),
        data={"curves": curves, "undamped": bare, "widths": widths, "conditions": found},
        notes=(
            "without a damping the update divides by D_l[n,i], whose inverse has infinite variance",
        ),
    )


def _mnist(num_samples: int) -> tuple[Matrix, Matrix]:
    data = mnist_pair((0, 7), 1, num_samples)
    return data.x_train.astype(np.float64), data.y_train.astype(np.float64)


def _train(
    run: _Run, x: Matrix, y: Matrix, damping: Damping, *, steps: int, factor: float = 1.0
) -> Matrix:
    """Losses (steps + 1,) at eta = c/alpha."""
    model = MLP(
        (x.shape[1], run.width, run.width, 1),
        activation=run.activation,
        weight_variance=run.weight_variance,
        rngs=nnx.Rngs(0),
    )
    fraction = 0.5 if run.activation == "relu" else 1.0
    x, y = x.astype(np.float32), y.astype(np.float32)
    trainer = Trainer(model, UnitWise(), x, y, x[:1], damping)
    outputs = trainer.run(factor / (2 * fraction * run.width + 1), steps).outputs_train
    return squared_losses(outputs, y)
