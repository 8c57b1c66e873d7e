"""Infinite-width kernels and predictions of equal, parallel and nearly parallel samples."""

from __future__ import annotations

from decimal import Decimal, localcontext

import jax
import numpy as np
import pytest
from fault_harness import Refused, Right, over
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import initial_signals

SLOPES = {"relu": 0.0, "leaky_relu": 0.01, "identity": 1.0}
ANGLES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-9, 1e-10, 1e-12, 0.0)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def make_model(activation="relu", bias=0.0, inputs=2, depth=3, outputs=1):
    widths = (inputs, *[2] * (depth - 1), outputs)
    return ng.MLP(widths, activation=activation, bias_variance=bias, rngs=nnx.Rngs(0))


def arc_tangent(value: Decimal) -> Decimal:
    """The series, after halving the angle six times."""
    for _ in range(6):
        value = value / (1 + (1 + value * value).sqrt())
    total, power = Decimal(0), value
    for k in range(40):
        total += power / (2 * k + 1) * (-1) ** k
        power *= value * value
    return 64 * total


def layer_by_layer(first, second, activation, bias, depth):
    """Q_l and E[phi' phi'] of two samples from cosines, at the precision of the context."""
    a, weight, bias = Decimal(SLOPES[activation]), Decimal(2), Decimal(bias)
    scale = weight / len(first)
    dot = [
        scale * sum((Decimal(p) * Decimal(q) for p, q in zip(*pair, strict=True)), Decimal(0))
        for pair in ((first, first), (second, second), (first, second))
    ]
    q1, q2, q = (value + bias for value in dot)
    covariances, slopes = [q], []
    for _ in range(depth - 1):
        root = (q1 * q2).sqrt()
        sine = max(q1 * q2 - q * q, Decimal(0)).sqrt() / root
        cosine = q / root
        angle = arc_tangent(sine / cosine)
        part = (1 - a) ** 2 / (2 * PI)
        value = root * (part * (sine + (PI - angle) * cosine) + a * cosine)
        slopes.append(part * (PI - angle) + a)
        half = (1 + a * a) / 2
        q1, q2, q = (weight * v + bias for v in (half * q1, half * q2, value))
        covariances.append(q)
    return covariances, slopes


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("activation", SLOPES)
def test_nearly_parallel_samples_have_every_digit(activation, bias):
    # rows of four inputs: an exact binary number and a tiny one beside it, at several lengths
    depth = 4
    rows = [np.array([1.0, 0.0])]
    rows += [length * np.array([1.0, angle]) for angle in ANGLES for length in (1.0, 2.0, 0.7)]
    x = np.stack(rows)
    model = make_model(activation, bias, depth=depth)
    for kernels in (analytic_kernels(model, x), analytic_kernels(model, x, x.copy())):
        for j in range(len(x)):
            with localcontext() as context:
                context.prec = 50
                covariances, slopes = layer_by_layer(
                    x[0].tolist(), x[j].tolist(), activation, bias, depth
                )
            derivative = Decimal(1)
            for layer in range(depth - 1, -1, -1):
                found = kernels.inputs[layer][0, j], kernels.derivatives[layer][0, j]
                wanted = float(covariances[layer]), float(derivative)
                np.testing.assert_allclose(found, wanted, rtol=4e-15)
                if layer:
                    derivative = derivative * 2 * slopes[layer - 1]


def test_precision_of_the_reference():
    with localcontext() as context:
        context.prec = 50
        assert abs(4 * arc_tangent(Decimal(1)) - PI) < Decimal("1e-48")


def repeated(factor=1.0, distinct=12, again=3):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(distinct, 5)), rng.normal(size=(distinct, 1))
    return (
        np.concatenate([x, factor * x[:again]]),
        np.concatenate([y, y[:again] + 1]),
        np.concatenate([np.arange(distinct), np.arange(again)]),
    )


def least_loss(factor, y, owner):
    """1/(2N) |y - f|^2 of the nearest f with f(c x) = c f(x) between the samples of one ray."""
    scale = np.where(np.arange(len(y)) < 12, 1.0, factor)
    fit = np.zeros_like(y)
    for ray in np.unique(owner):
        mine = owner == ray
        unit = scale[mine] / np.linalg.norm(scale[mine])
        fit[mine, 0] = unit * (unit @ y[mine, 0])
    return np.sum((y - fit) ** 2) / (2 * len(y))


STRUCTURES = {
    "exact": ng.Exact(),
    "blocks": ng.BlockDiagonal(),
    "tri-diagonal": ng.BlockTriDiagonal(),
    "K-FAC": ng.KFAC(),
    "descent": na.GradientDescent(),
}
MODELS = {
    (activation, bias): make_model(activation, bias, inputs=5)
    for activation in ("relu", "leaky_relu", "erf")
    for bias in (0.0, 0.1)
}
WIDE = ng.MLP((5, 64, 64, 1), activation="relu", rngs=nnx.Rngs(1))


def training_loss(structure, model, factor, kernels="analytic"):
    x, y, _ = repeated(factor)
    found = na.predict(structure, model, x, y, x, kernels=kernels).mean
    return np.sum((found - y) ** 2) / (2 * len(y))


def report(structure, model, factor, kernels="analytic"):
    x, _, _ = repeated(factor)
    found = na.isotropy(structure, model, x, kernels=kernels)
    return found.alpha, float(np.isinf(found.condition_number)), len(found.failed_conditions) > 0


def expected_loss(factor):
    _, y, owner = repeated(factor)
    return least_loss(factor, y, owner)


assert abs(expected_loss(1.0) - 0.05) < 1e-15

PREDICTIONS = {
    f"{name}, {activation}, bias {bias}": (
        lambda s=structure, m=model: training_loss(s, m, 1.0),
        Right(np.float64(0.05), 1e-9),
    )
    for name, structure in STRUCTURES.items()
    for (activation, bias), model in MODELS.items()
}
PREDICTIONS |= {
    f"{name}, {activation}, x and {factor} x": (
        lambda s=structure, a=activation, f=factor: training_loss(s, MODELS[a, 0.0], f),
        Right(np.float64(expected_loss(factor)), 1e-9),
    )
    for name, structure in STRUCTURES.items()
    for activation in ("relu", "leaky_relu")
    for factor in (2.0, 3.0, 0.1)
}
PREDICTIONS |= {
    f"{name}, of a network, x and {factor} x": (
        lambda s=structure, f=factor: training_loss(s, WIDE, f, "empirical"),
        Right(np.float64(expected_loss(factor)), 1e-7),
    )
    for name, structure in STRUCTURES.items()
    for factor in (1.0, 2.0)
    if name != "tri-diagonal"
}


@over(PREDICTIONS)
def test_training_ends_at_the_means_of_repeated_samples(run, answer):
    answer.check(run)


REPORTS = {
    f"{name}, {activation}, bias {bias}": (
        lambda s=STRUCTURES[name], m=model: report(s, m, 1.0),
        Right((np.float64(alpha * 0.8), 1.0, True), 1e-9),
    )
    for name, alpha in (("exact", 1), ("blocks", 3), ("tri-diagonal", 1))
    for (activation, bias), model in MODELS.items()
}
REPORTS |= {
    "x and 3 x": (
        lambda: report(ng.Exact(), MODELS["relu", 0.0], 3.0),
        Right((np.float64(0.8), 1.0, True), 1e-9),
    ),
    "x and 3 x with biases": (
        lambda: report(ng.Exact(), MODELS["relu", 0.1], 3.0),
        Right((np.float64(1.0), 0.0, False), 1e-9),
    ),
    "of a network": (
        lambda: report(ng.Exact(), WIDE, 2.0, "empirical"),
        Right((np.float64(0.8), 1.0, True), 1e-9),
    ),
}


@over(REPORTS)
def test_reports_of_repeated_samples(run, answer):
    answer.check(run)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("name", ["exact", "blocks", "K-FAC"])
def test_the_condition_that_fails_is_named(name, factor):
    x, _, _ = repeated(factor)
    for model, kernels in ((MODELS["relu", 0.0], "analytic"), (WIDE, "empirical")):
        found = na.isotropy(STRUCTURES[name], model, x, kernels=kernels).failed_conditions
        assert any("samples 0 and 12 (counted from 0) are the same" in text for text in found)


def test_samples_that_are_apart_fail_nothing():
    x, _, _ = repeated()
    for structure in STRUCTURES.values():
        if isinstance(structure, ng.KFAC):
            continue
        found = na.isotropy(structure, MODELS["relu", 0.0], x[:12], kernels="analytic")
        assert found.failed_conditions == ()
        assert found.condition_number < 1e4


def unit_wise(x, activation="relu"):
    return na.coefficient_matrix(
        ng.UnitWise(), make_model(activation, 0.0, x.shape[1]), x, kernels="analytic"
    )


RANKS = {
    "unit-wise, samples twice": (
        lambda: unit_wise(np.repeat(np.eye(5), 2, axis=0)[:5]),
        Refused(r"UnitWise has an infinite-width kernel only .* samples 0 and 1 .* drop one"),
    ),
    "unit-wise, fewer inputs than samples": (
        lambda: unit_wise(repeated()[0]),
        Refused("layer 1: its inputs have rank 5 of the 15"),
    ),
    "unit-wise, independent samples": (
        lambda: unit_wise(np.eye(5)),
        Right((1 + 0.5 * 4) * np.eye(5), 1e-12),
    ),
    "exact, a linear network with more samples than inputs": (
        lambda: (
            na.isotropy(
                ng.Exact(), make_model("identity", inputs=5), repeated()[0], kernels="analytic"
            ).alpha
        ),
        Right(np.float64(1 / 3), 1e-9),
    ),
}


@over(RANKS)
def test_ranks_at_infinite_width(run, answer):
    answer.check(run)


def test_more_outputs_than_parameters():
    # 2 x 2 + 2 parameters for 16 outputs: the least squares of the linearised network
    rng = np.random.default_rng(3)
    model = ng.MLP((2, 2, 1), activation="tanh", rngs=nnx.Rngs(0))
    x, y = rng.normal(size=(16, 2)), rng.normal(size=(16, 1))
    signals = initial_signals(model, x)
    with jax.enable_x64(True):
        jacobian, start = np.asarray(signals.train.to_dense()), signals.outputs
    expected = start + jacobian @ np.linalg.lstsq(jacobian, y - start)[0]
    for structure in (ng.Exact(), na.GradientDescent()):
        found = na.predict(structure, model, x, y, x, kernels="empirical").mean
        np.testing.assert_allclose(found, expected, atol=1e-8)
