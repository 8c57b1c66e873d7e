"""How far training moves the tangent kernel: against the width, and for every structure."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from natgrad_flax import MLP, Exact, RelativeDamping
from ntk_analysis.coefficient import Damping, coefficient_pair
from ntk_analysis.drift import kernel_drift
from ntk_analysis.empirical import Matrix, initial_signals
from ntk_analysis.reproduce.natgrad.common import (
    dense_net,
    digits_pair,
    mean_loss,
    natural_step,
    sphere,
)
from ntk_analysis.reproduce.natgrad.frontier_map import STRUCTURES
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
)

# ----- against the width, after one step

_SAMPLES, _FEATURES = 8, 16
_WIDTHS, _SEEDS = (128, 2048), range(10)


@check(
    "NG-Drift-Width",
    "One step moves the kernel by 1/M if smooth, by M^-1/2 with a kink",
    claim="How far the kernel moves says when predictions from initialisation hold. It moves by "
    "sums over units that are odd in the weights of the last layer, where the activation is "
    "smooth, and so by 1/M (Dyer & Gur-Ari 2020). With a kink sqrt(M) of M units flip and leave or "
    "join K = sum_i a_i^2 phi'_i phi'_i, each by 1/M. More flip one way than the other (see "
    "NG-Width-Kink): a mean of order M^-1/2 and a spread of order M^-3/4. Half a step leaves half "
    "of the smooth change and of the mean, and 0.71 of the spread.",
    setting=f"one hidden layer of {', '.join(map(str, _WIDTHS))} units, tanh and ReLU, exact "
    f"Fisher, N = {_SAMPLES} Gaussian inputs of {_FEATURES} features and norm sqrt(M_0), targets "
    f"f_0 + z, z ~ N(0, 1), mean of {len(_SEEDS)} seeds, float64, zero damping",
    origin="ours",
    fast=True,
)
@in_float64
def drift_width(report: Report) -> Outcome:
    """Exponents of the relative change of the kernel, and half a step."""
    x = jnp.asarray(sphere(_SAMPLES, _FEATURES))
    z = np.random.default_rng(5).normal(size=(_SAMPLES, 1))
    measurements: list[Measurement] = []
    for activation, powers, shares in (
        ("tanh", (0.85, 1.25), (0.4, 0.6)),
        ("relu", (0.5, 0.8), (0.5, 0.72)),
    ):
        changes = np.empty((2, len(_WIDTHS), len(_SEEDS)))
        for at, width in enumerate(_WIDTHS):
            report(f"{activation}, width {width}")
            for seed in _SEEDS:
                model = dense_net((_FEATURES, width, 1), activation, seed, jnp.float64)
                graphdef, state = nnx.split(model)
                y = model(x) + z
                for which, rate in enumerate((1.0, 0.5)):
                    moved = nnx.merge(graphdef, natural_step(graphdef, state, x, y, rate, Exact()))
                    changes[which, at, seed] = kernel_drift(model, moved, x).relative_change
        whole, half = np.log(changes).mean(axis=2)
        slope = float(whole[0] - whole[1]) / np.log(_WIDTHS[1] / _WIDTHS[0])
        shrunk = float(np.exp(half[1] - whole[1]))
        name = f"{activation}, M = {_WIDTHS[1]}: change of half a step over that of a whole one"
        measurements += [
            between(f"{activation}: p of M^-p", slope, *powers),
            between(name, shrunk, *shares),
        ]
    return Outcome(tuple(measurements))


# ----- over training, every structure

_TRAIN, _NET, _GOAL, _MOST = 32, 256, 1e-3, 300
_NAMES = (
    "gradient descent", "diagonal", "blocks of 24", "unit-wise", "A alone",
    "K-FAC", "EKFAC", "Shampoo 1/2", "KFOC", "block-diagonal", "block-tri-diagonal", "exact",
)  # fmt: skip
_DAMPED = ("diagonal", "blocks of 24", "unit-wise")


@check(
    "NG-Drift-Structures",
    "Every structure moves the kernel, and the number of steps does not say how far",
    claim="Whatever the structure, training to a thousandth of the loss moves the tangent kernel "
    "of 256 units by 3 to 30 % and hardly turns it. How far has little to do with the number of "
    "steps: gradient descent moves it less in hundreds of steps than K-FAC in two or three. Of "
    "what is isotropic K-FAC moves a tanh network the most, since it inverts the kernel of the "
    "derivatives as well. How it falls with the width is in NG-Drift-Width.",
    setting=f"digits 0 and 7 of 8 x 8 pixels, standardised, of norm 8, N = {_TRAIN}, targets "
    f"+-0.5; two hidden layers of {_NET} units, tanh and ReLU, one output, no biases (so that the "
    "quasi-diagonal is the diagonal), one seed, float64; steps of 1/lambda_max to a thousandth of "
    f"the loss, {_MOST} at most; no damping, but 1e-3 of the mean diagonal for the unit-wise "
    "Fisher, its blocks and the diagonal",
    origin="ours",
)
@in_float64
def structures(report: Report) -> Outcome:
    """Relative change of the kernel after each power of two of steps."""
    x, y = digits_pair(_TRAIN)
    data: dict[str, Any] = {"width": _NET, "curves": {}}
    measurements: list[Measurement] = []
    for activation in ("tanh", "relu"):
        model = dense_net((x.shape[1], _NET, _NET, 1), activation, 0, jnp.float64)
        found: dict[str, dict[str, Any]] = {}
        for name in _NAMES:
            report(f"{activation}, {name}")
            found[name] = _follow(model, name, x, y)
        data["curves"][activation] = {STRUCTURES[name].name: curve for name, curve in found.items()}
        changes = {name: curve["changes"][-1] for name, curve in found.items()}
        slow, fast = found["gradient descent"]["steps"][-1], found["K-FAC"]["steps"][-1]
        measurements += [
            below(f"{activation}: change, largest", max(changes.values()), 0.4),
            above(f"{activation}: change, smallest", min(changes.values()), 0.02),
            above(f"{activation}: CKA, smallest", min(c["cka"] for c in found.values()), 0.9),
            above(f"{activation}: steps of gradient descent over K-FAC's", slow / fast, 50),
            above(
                f"{activation}: change by K-FAC over that by gradient descent",
                changes["K-FAC"] / changes["gradient descent"],
                1,
            ),
        ]
        if activation == "tanh":
            ratio = changes["K-FAC"] / max(changes[name] for name in ("exact", "block-diagonal"))
            measurements.append(above("tanh: K-FAC over exact and block-diagonal", ratio, 2))
    return Outcome(tuple(measurements), data)


def _follow(model: MLP, name: str, x: Matrix, y: Matrix) -> dict[str, Any]:
    """Steps, changes of the kernel after them, and the last CKA, of one training."""
    structure = STRUCTURES[name]
    damping: Damping = RelativeDamping(1e-3) if name in _DAMPED else 0.0
    matrix, _ = coefficient_pair(structure, initial_signals(model, x), damping)
    rate = 1 / float(np.linalg.eigvalsh(matrix)[-1])
    graphdef, state = nnx.split(model)
    goal = _GOAL * float(mean_loss(graphdef, state, x, y))
    steps, changes, done, step = [0], [0.0], False, 0
    while not done:
        state = natural_step(graphdef, state, x, y, rate, structure, damping)
        step += 1
        done = step == _MOST or not float(mean_loss(graphdef, state, x, y)) > goal
        if done or step & (step - 1) == 0:
            found = kernel_drift(model, nnx.merge(graphdef, state), x)
            steps.append(step)
            changes.append(found.relative_change)
    return {"steps": steps, "changes": changes, "cka": found.cka}
