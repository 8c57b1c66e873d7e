"""Ten classes of Karakida & Osawa (2020) on wide networks: the margin law, and K-FAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Flow(NamedTuple):
    """A network along the exact natural-gradient flow of the cross-entropy.

    Attributes:
      margins: after every step, shape (T, N).
      changed: share of the pairs of a hidden unit and a sample whose sign changed.
      again: how often signs changed that had done so before, over the number of pairs.
    """

    margins: Matrix
    changed: float
    again: float


def network_flows(model: MLP, data: Dataset, step_sizes: Sequence[float]) -> list[Flow]:
    """Runge-Kutta steps of fourth order up to t = 1; the Jacobian follows the parameters."""
    graphdef, start = nnx.split(model)
    samples = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    targets = np.asarray(data.y_train, np.float64)
    structure, loss = Exact(), SoftmaxCrossEntropy()

    @jax.jit
    def seen(at: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        *hidden, outputs = nnx.merge(graphdef, at).pre_activations(x)
        return outputs, jnp.concatenate(hidden, axis=1) > 0

    def velocity(at: nnx.State, x: jax.Array, y: jax.Array) -> Any:
        network = nnx.merge(graphdef, at)
        return natural_gradient(network, x, y, structure=structure, loss=loss, damping=0.0)

    def moved(at: nnx.State, slope: Any, time: Any) -> nnx.State:
        return jax.tree.map(lambda p, u: p - jnp.asarray(time, p.dtype) * u, at, slope)

    @jax.jit
    def step(at: nnx.State, size: Any, x: jax.Array, y: jax.Array) -> nnx.State:
        slopes = [velocity(at, x, y)]
        for part in (0.5, 0.5, 1.0):
            slopes.append(velocity(moved(at, slopes[-1], part * size), x, y))
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, *slopes)
        return moved(at, mean, size)

    def flow(step_size: float) -> Flow:
        state, found, positive = start, [], []
        for _ in range(round(_TIME / step_size) + 1):
            outputs, signs = seen(state, samples[0])
            found.append(margins(np.asarray(outputs, np.float64), targets))
            positive.append(np.asarray(signs))
            state = step(state, step_size, *samples)
        changes = np.sum(np.diff(positive, axis=0), axis=0)
        again = np.mean(np.maximum(changes - 1, 0))
        return Flow(np.stack(found), float(np.mean(changes > 0)), float(again))

    return [flow(step_size) for step_size in step_sizes]


@check(
    "KO-SecD-wide",
    "Softmax cross-entropy on wide networks",
    claim=(
        "Under the exact natural-gradient flow the margin z of every sample obeys e^z(t) + 1 = e^t "
        "(e^z(0) + 1), in a wide network as in its linearisation."
    ),
    setting=(
        "MNIST, ten classes, N = 50, L = 3, tanh, M = 64 and 1024, and ReLU, M = 64 and 256, no "
        f"biases, seed 0, float32, t = 0 to 1 by steps of {_STEP:g}, ReLU by {_STEP / 2:g} and "
        "half of it"
    ),
    origin="ours",
)
def run_margins(report: Report) -> Outcome:
    """Margins of networks that move, beside the law."""
    data = images("mnist", _CLASSES, 50, 1)

    def flows(activation: str, width: int, *step_sizes: float) -> list[Flow]:
        report(f"{activation}, width {width}")
        sizes = (data.input_dim, width, width, data.output_dim)
        model = MLP(sizes, activation=activation, rngs=nnx.Rngs(0))
        return network_flows(model, data, step_sizes)

    def ahead(found: Flow, time: float = _TIME) -> Matrix:
        """Of the law, relative, at the end."""
        law = margin_law(np.array([time]), found.margins[0])[0]
        ratio: Matrix = (np.exp(found.margins[-1]) + 1) / (np.exp(law) + 1) - 1
        return ratio

    (narrow,), (wide,) = flows("tanh", 64, _STEP), flows("tanh", 1024, _STEP)
    kinks, finer = flows("relu", 64, _STEP / 2, _STEP / 4)
    (wider,) = flows("relu", 256, _STEP / 2)
    error = float(np.abs(ahead(wide)).max())
    lag, with_finer, with_wider = (float(-ahead(f).mean()) for f in (kinks, finer, wider))
    times = np.linspace(0, _TIME, len(wide.margins))
    predicted = margin_law(times, wide.margins[0])
    curves = [
        {"sample": n, "theory": predicted[:, n].tolist(), "network": wide.margins[:, n].tolist()}
        for n in range(5)
    ]
    return Outcome(
        (
            below("tanh, M = 1024: (e^z + 1) / (e^t (e^z(0) + 1)) - 1 at t = 1, max", error, 2e-3),
            below("the same over that at M = 64", error / np.abs(ahead(narrow)).max(), 1.0),
            between("ReLU, M = 64: how far behind the law on average", lag, 0.0, 0.15),
            above(
                "the same with half the step, over it (an error of the step: 1/2)",
                with_finer / lag,
                0.7,
            ),
            above("the same at M = 256, over it (an error of 1/M: 1/4)", with_wider / lag, 0.4),
            between(
                "signs of units that change again, with half the step over it (sliding: 2)",
                finer.again / kinks.again,
                1.4,
                2.6,
            ),
            above(
                "control, M = 1024, the law at half its rate: smallest deviation",
                float(ahead(wide, _TIME / 2).min()),
                0.3,
            ),
        ),
        {"time": times.tolist(), "curves": curves},
        (
            f"ReLU networks fall behind by {100 * lag:.1f} %, with half the step by "
            f"{100 * with_finer:.1f} %, at M = 256 by {100 * with_wider:.1f} %. It is the kink: "
            "the law holds on both sides of one, but not on it. Where the velocities v- and v+ on "
            "both sides push a pre-activation u with gradient a towards 0, the flow slides along "
            "u = 0 at their mean with a . v = 0. There df/dt falls short of the law by "
            "c |a . v-| |a . v+| / (|a . v-| + |a . v+|), c the jump of df/du, whatever the step. "
            "In steps, such a sign changes nearly every time. c and a . v are O(1/sqrt(M)), and so "
            "is the share of units that reach a kink; M of them make a lag of O(1/sqrt(M)) once "
            f"that share is small. Here it is {100 * kinks.changed:.0f} % at M = 64 and "
            f"{100 * wider.changed:.0f} % at M = 256.",
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
