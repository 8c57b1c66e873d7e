"""Small problems of one difficulty each, with targets that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.workload import Data, Workload

TRAIN, HELD_OUT, INPUTS = 64, 64, 16
FITTED = 1e-6, "a millionth of the variance of the targets, which the network can fit exactly"
"""A training loss, and why it is the target."""

LEAST_SQUARES = 1.085


@cache
def linear(
    seed: int, condition: float, *, rotated: bool = True, rank: int = INPUTS, noise: float = 0.0
) -> Data:
    """Inputs whose second moments have a condition, and targets that are linear in them.

    The largest eigenvalue of the second moments is 16, as of unit-variance inputs of one direction,
    so that learning rates mean the same on all problems. Every direction of the inputs has the same
    part in the targets, whose variance is 1: small directions are not small in them.

    Args:
      seed: of the samples.
      condition: largest over smallest eigenvalue, of the first ``rank`` directions.
      rotated: whether the directions are no axes; else single inputs are in other units.
      rank: the inputs span so many directions.
      noise: standard deviation of what is added to the targets.
    """
    rng = np.random.default_rng(seed)
    count = TRAIN + HELD_OUT
    basis = np.linalg.qr(rng.standard_normal((count, rank)))[0]
    values = np.geomspace(1, condition**-0.5, rank) * np.sqrt(count * INPUTS)
    axes = np.linalg.qr(rng.standard_normal((INPUTS, INPUTS)))[0] if rotated else np.eye(INPUTS)
    x = (basis * values) @ axes[:rank]
    y = basis @ rng.choice([-1.0, 1.0], rank)
    y = y / y.std() + noise * rng.standard_normal(count)
    x, y = x.astype(np.float32), y[:, None].astype(np.float32)
    return Data(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


@cache
def alternating(seed: int, batches: int = 4, ratio: float = 100.0) -> Data:
    """White inputs in batches that see the directions with other curvatures, each its own part.

    A batch has one sample a direction. Its second moments have the same eigenvectors as those of
    all others; on its own part of the directions they are ``ratio`` times as large as on the rest.
    Their mean over the batches is that of the plain problem, so nothing but the order of
    the batches is between this problem and the plain one. Targets are linear, without noise: what
    solves one batch solves all of them.

    Momentum goes on along a direction while the batches pass that hardly see it. A rate can be far
    below what the mean and every batch by itself allow, and yet the error grows over a cycle: the
    product of the steps of its batches has an eigenvalue outside of the unit circle, which is the
    parametric resonance of Hill's and Mathieu's equations. Without momentum the steps commute, and
    so each rate that all batches allow is stable.

    Args:
      seed: of the samples.
      batches: in a cycle; the held-out samples are one more cycle.
      ratio: of curvatures.
    """
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((INPUTS, INPUTS)))[0]
    part = np.arange(INPUTS) * batches // INPUTS == np.arange(batches)[:, None]
    scales = np.sqrt(np.where(part, ratio, 1.0) * batches / (ratio + batches - 1)) * INPUTS
    samples = np.linalg.qr(rng.standard_normal((2 * batches, INPUTS, INPUTS)))[0]
    x = (samples * np.tile(scales, (2, 1))[:, None] @ axes.T).reshape(-1, INPUTS)
    y = x @ axes @ rng.choice([-1.0, 1.0], INPUTS) / INPUTS
    x, y = x.astype(np.float32), y[:, None].astype(np.float32)
    return Data(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


def _linear_model(seed: int) -> nnx.Module:
    return ng.MLP((INPUTS, 1), weight_variance=1e-2, rngs=nnx.Rngs(seed))


def _near_saddle(seed: int) -> nnx.Module:
    """Three linear layers whose product, and each factor, starts near 0."""
    widths = (INPUTS, INPUTS, INPUTS, 1)
    return ng.MLP(widths, activation="identity", weight_variance=1e-3, rngs=nnx.Rngs(seed))


def _unbalanced(seed: int, factor: float = 30.0) -> nnx.Module:
    """A ReLU network, the first layer times a factor and the second over it: the same function."""
    model = ng.MLP((INPUTS, 64, 64, 1), activation="relu", weight_variance=2.0, rngs=nnx.Rngs(seed))
    for layer, by in ((model.layers[0], factor), (model.layers[1], 1 / factor)):
        layer.kernel.set_value(by * layer.kernel[...])
    return model


def _problem(
    name: str,
    title: str,
    question: str,
    data: Callable[[], Data],
    model: Callable[[int], nnx.Module] = _linear_model,
    *,
    fixed_order: bool = False,
    **changes: object,
) -> Workload:
    settings = {"problem": name, "num_train": TRAIN, "inputs": INPUTS}
    settings |= {"order": "fixed"} if fixed_order else {}
    chosen = {"metric": "train", "batch_size": None, "known_target": FITTED} | changes
    return Workload(
        name=f"diagnosis-{name}", title=title, version=1, question=question, settings=settings,
        data=data, model=model, loss=ng.MeanSquaredError(), max_steps=1000, max_seconds=10.0,
        **chosen,  # type: ignore[arg-type]
    )  # fmt: skip


WORKLOADS = (
    _problem(
        "plain", "Linear regression with white inputs",
        "Does it train at all?",
        partial(linear, 0, 1.0),
    ),
    _problem(
        "ill-conditioned", "Linear regression, condition 1e4, directions that are no axes",
        "Does it see curvature that no single parameter shows?",
        partial(linear, 0, 1e4),
    ),
    _problem(
        "units", "Linear regression, inputs in units that differ by 100",
        "Does it see curvature along single parameters?",
        partial(linear, 0, 1e4, rotated=False),
    ),
    _problem(
        "rank-deficient", "Linear regression on inputs that span 8 of 16 directions",
        "Does it stand a Fisher matrix that has no inverse?",
        partial(linear, 0, 1.0, rank=8),
    ),
    _problem(
        "saddle", "Three linear layers that start near the saddle at 0",
        "Does it leave a saddle where the gradient is as small as the weights squared?",
        partial(linear, 0, 1.0), _near_saddle,
    ),
    _problem(
        "reparametrised", "A ReLU network, one layer times 30 and the next over 30",
        "Does it see that the function is the same as that of balanced weights?",
        partial(linear, 0, 1.0), _unbalanced,
        known_target=(1e-3, "a thousandth of the variance of the targets, which the network fits"),
    ),
    _problem(
        "noise", "Linear regression with noise of variance 1, in batches of 8",
        "Does it average over batches, or fit each of them?",
        partial(linear, 0, 1.0, noise=1.0),
        metric="mse", batch_size=8,
        known_target=(LEAST_SQUARES, "1.1 times the held-out error of least squares"),
    ),
    _problem(
        "resonance", "White inputs, four batches in turn, each strong in its quarter of directions",
        "Does what it remembers of earlier batches swing with the order of the batches?",
        partial(alternating, 0), fixed_order=True, batch_size=INPUTS,
        known_target=(FITTED[0], f"{FITTED[1]}: one solution fits all batches"),
    ),
)  # fmt: skip
