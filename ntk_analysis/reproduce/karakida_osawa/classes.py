"""Ten classes of Karakida & Osawa (2020) on wide networks: the margin law, and K-FAC."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from natgrad_datasets import Dataset

from natgrad_flax import KFAC, MLP, Exact, SoftmaxCrossEntropy, natural_gradient
from ntk_analysis.coefficient import coefficient_pair
from ntk_analysis.dynamics import squared_losses
from ntk_analysis.empirical import Matrix, initial_signals
from ntk_analysis.reproduce.images import images
from ntk_analysis.reproduce.karakida_osawa.cross_entropy import margin_law, margins
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
)
from ntk_analysis.training import Trainer

_CLASSES = tuple(range(10))
_TIME, _STEP = 1.0, 0.1


def network_flow(model: MLP, data: Dataset) -> Matrix:
    """Margins (T, N) of a network under the exact natural-gradient flow of the cross-entropy.

    Runge-Kutta steps of fourth order, of 0.1 in time; the Jacobian follows the parameters.
    """
    graphdef, state = nnx.split(model)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    targets = np.asarray(data.y_train, np.float64)
    structure, loss = Exact(), SoftmaxCrossEntropy()

    @jax.jit
    def outputs(at: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, at)(x)

    def velocity(at: nnx.State, scale: float, base: nnx.State, slope: Any) -> Any:
        moved = jax.tree.map(lambda p, u: p - scale * u, base, slope) if scale else at
        network = nnx.merge(graphdef, moved)
        return natural_gradient(network, x, y, structure=structure, loss=loss, damping=0.0)

    @jax.jit
    def step(at: nnx.State) -> nnx.State:
        slopes = [velocity(at, 0.0, at, None)]
        for part in (0.5, 0.5, 1.0):
            slopes.append(velocity(at, part * _STEP, at, slopes[-1]))
        return jax.tree.map(
            lambda p, a, b, c, d: p - _STEP / 6 * (a + 2 * b + 2 * c + d), at, *slopes
        )

    found = [margins(np.asarray(outputs(state), np.float64), targets)]
    for _ in range(round(_TIME / _STEP)):
        state = step(state)
        found.append(margins(np.asarray(outputs(state), np.float64), targets))
    return np.stack(found)


@check(
    "KO-SecD-wide",
    "Softmax cross-entropy on wide networks",
    claim=(
        "Under the exact natural-gradient flow the margin z of every sample obeys e^z(t) + 1 = e^t "
        "(e^z(0) + 1), in a wide network as in its linearisation."
    ),
    setting=(
        "MNIST, ten classes, N = 50, L = 3, tanh, M = 64 and 1024, and ReLU, M = 64, no biases, "
        "seed 0, float32, t = 0 to 1"
    ),
    origin="ours",
)
def run_margins(report: Report) -> Outcome:
    """Margins of networks that move, beside the law."""
    data = images("mnist", _CLASSES, 50, 1)
    times = np.linspace(0, _TIME, round(_TIME / _STEP) + 1)

    def flow(activation: str, width: int) -> Matrix:
        report(f"{activation}, width {width}")
        sizes = (data.input_dim, width, width, data.output_dim)
        return network_flow(MLP(sizes, activation=activation, rngs=nnx.Rngs(0)), data)

    def ahead(found: Matrix, at: Matrix) -> Matrix:
        """Of the law, relative, in the last row."""
        ratio: Matrix = (np.exp(found[-1]) + 1) / (np.exp(margin_law(at, found[0])[-1]) + 1) - 1
        return ratio

    narrow, wide, kinks = flow("tanh", 64), flow("tanh", 1024), flow("relu", 64)
    error = float(np.abs(ahead(wide, times)).max())
    behind = float(-ahead(kinks, times).mean())
    predicted = margin_law(times, wide[0])
    curves = [
        {"sample": n, "theory": predicted[:, n].tolist(), "network": wide[:, n].tolist()}
        for n in range(5)
    ]
    return Outcome(
        (
            below("tanh, M = 1024: (e^z + 1) / (e^t (e^z(0) + 1)) - 1 at t = 1, max", error, 2e-3),
            below("the same over that at M = 64", error / np.abs(ahead(narrow, times)).max(), 1.0),
            between("ReLU, M = 64: how far behind the law on average", behind, 0.0, 0.15),
            above(
                "control, M = 1024, the law at half its rate: smallest deviation",
                float(ahead(wide, times / 2).min()),
                0.3,
            ),
        ),
        {"time": times.tolist(), "curves": curves},
        (
            "ReLU networks fall behind by about 5 % by t = 1, for widths of 64 to 1024, steps of "
            "0.0125 to 0.1, in float32 and float64. Their flow jumps at kinks, which may be why.",
        ),
    )


@check(
    "KO-Eq20-classes",
    "K-FAC with ten classes: how wide a network has to be",
    claim=(
        "The paper leaves several outputs to future research (after Eq. 21). Ours: Theta-bar = N L "
        "I where M >= N C, as D_l then has the rank N C, and not below; networks that are wider "
        "converge at 1/(N L)."
    ),
    setting=(
        "MNIST, ten classes, N = 20, N C = 200, L = 3, sigma_w^2 = 2, no biases, last layer scaled,"
        " seed 0; Theta-bar of tanh and ReLU in float64, M = 100 to 800; training of ReLU"
    ),
    origin="ours",
)
def run_classes(report: Report) -> Outcome:
    """Condition numbers and training over the width."""
    data = images("mnist", _CLASSES, 20, 1)
    widths = (100, 200, 400, 800)
    numbers: dict[str, list[float]] = {"tanh": [], "relu": []}
    alphas, curves = [], {}
    for width in widths:
        report(f"width {width}")
        for name, found in numbers.items():
            sizes = (data.input_dim, width, width, data.output_dim)
            model = MLP(sizes, activation=name, rngs=nnx.Rngs(0))
            matrix, _ = coefficient_pair(KFAC(), initial_signals(model, data.x_train))
            values = np.linalg.eigvalsh(matrix)
            found.append(float(values[-1] / values[0]))
            alphas.append(float(values[-1]) / (3 * data.num_train))
        trainer = Trainer(model, KFAC(), data.x_train, data.y_train, data.x_test)
        outputs = trainer.run(1 / (3 * data.num_train), 3).outputs_train
        losses = squared_losses(outputs, data.y_train)
        curves[width] = (losses / losses[0]).tolist()
    tanh, relu = numbers["tanh"], numbers["relu"]
    measurements: list[Measurement] = [
        above("tanh, M = N C / 2: condition number", tanh[0], 1.5),
        below("tanh, M = N C: condition number", tanh[1], 1.1),
        above("ReLU, M = N C / 2: condition number", relu[0], 1.5),
        below("both, M = 2 N C and more: largest", max(*tanh[2:], *relu[2:]), 1.001),
        between("largest eigenvalue over N L, M = 4 N C", alphas[-1], 0.999, 1.001),
        below("ReLU, M = 4 N C: loss_1 / loss_0", curves[800][1], 0.3),
        below("the same: loss_2 / loss_0", curves[800][2], 0.02),
        above("ReLU, M = N C / 2: loss_2 / loss_0", curves[100][2], 0.05),
    ]
    return Outcome(
        tuple(measurements),
        {"widths": widths, "conditions": numbers, "losses": list(curves.values())},
        (
            "At M = N C half of the ReLU units are off for a sample, and D_l may lack rank. tanh "
            "networks of these widths take several steps: their first step is far from linear.",
        ),
    )
