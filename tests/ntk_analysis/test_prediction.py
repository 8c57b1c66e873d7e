"""Where training ends, against NumPy formulas, sampled Gaussians and long linearised training."""

from __future__ import annotations

import natgrad_datasets
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis.prediction import Prediction
from ntk_analysis.prior import initial_outputs

N, TEST, INPUTS = 12, 7, 20
WEIGHT, BIAS = 2.0, 0.3


def make_model(inputs: int = INPUTS, outputs: int = 2, hidden=(8, 8), bias=BIAS, activation="relu"):
    return ng.MLP(
        (inputs, *hidden, outputs),
        activation=activation,
        weight_variance=WEIGHT,
        bias_variance=bias,
        rngs=nnx.Rngs(0),
    )


def make_data(inputs: int = INPUTS, outputs: int = 2, train: int = N, test: int = TEST):
    rng = np.random.default_rng(0)
    x, outside = rng.normal(size=(train, inputs)), rng.normal(size=(test, inputs))
    return x, rng.normal(size=(train, outputs)), outside


def relu_kernels(first, second, depth: int = 3, bias: float = BIAS):
    """Q_l and B_l of a ReLU network by the arc-cosine formulas."""
    same = first is second
    inputs, slopes = [], []
    forward = first @ second.T / first.shape[1]
    left, right = (np.sum(x**2, axis=1) / x.shape[1] for x in (first, second))
    for _ in range(depth):
        gram = WEIGHT * forward + bias
        left, right = WEIGHT * left + bias, WEIGHT * right + bias
        inputs.append(gram)
        norms = np.sqrt(np.outer(left, right))
        cosine = np.clip(gram / norms, -1, 1)
        if same:
            np.fill_diagonal(cosine, 1)
        angle = np.arccos(cosine)
        forward = norms * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
        slopes.append((np.pi - angle) / (2 * np.pi))
        left, right = left / 2, right / 2
    derivatives = [np.ones_like(forward)]
    for slope in reversed(slopes[:-1]):
        derivatives.insert(0, WEIGHT * slope * derivatives[0])
    return inputs, derivatives


def tangents(first, second, **settings):
    return [q * b for q, b in zip(*relu_kernels(first, second, **settings), strict=True)]


def matrix_of(structure, x, outside, damping: float = 0.0) -> np.ndarray:
    """K^ of exact, block-diagonal, and block tri-diagonal at L = 3."""
    inner, cross = tangents(x, x), tangents(outside, x)
    shift = len(x) * damping * np.eye(len(x))
    if isinstance(structure, ng.Exact):
        return sum(cross) @ np.linalg.inv(sum(inner) + shift)
    if isinstance(structure, ng.BlockTriDiagonal):
        return cross[1] @ np.linalg.inv(inner[1])
    parts = [c @ np.linalg.inv(k + shift) for c, k in zip(cross, inner, strict=True)]
    return sum(parts) / len(parts)


ANALYTIC = [ng.Exact(), ng.BlockDiagonal(), ng.BlockTriDiagonal(), ng.KFAC(), na.GradientDescent()]
NAMES = [structure.name for structure in ANALYTIC]


@pytest.mark.parametrize("structure", ANALYTIC[:3], ids=NAMES[:3])
def test_analytic_mean_is_the_formula(structure):
    x, y, outside = make_data()
    found = na.predict(structure, make_model(), x, y, outside).mean
    np.testing.assert_allclose(found, matrix_of(structure, x, outside) @ y, rtol=1e-9, atol=1e-11)


def test_gradient_descent_ends_where_the_exact_gradient_does():
    x, y, outside = make_data()
    ends = [
        na.predict(s, make_model(), x, y, outside).mean for s in (ng.Exact(), na.GradientDescent())
    ]
    np.testing.assert_allclose(*ends, rtol=1e-8, atol=1e-10)


def kfac_parts(x, outside, leverage) -> list[np.ndarray]:
    """(B' B^{-1}) . (A' A^{-1}) of each layer; of the first with the given input factor."""
    inner, cross = relu_kernels(x, x, bias=0.0), relu_kernels(outside, x, bias=0.0)
    ratios = [
        [c @ np.linalg.pinv(k) for c, k in zip(*pair, strict=True)]
        for pair in zip(cross, inner, strict=True)
    ]
    (_, *inputs), (*units, _) = ratios
    return [u * a for u, a in zip([*units, 1.0], [leverage, *inputs], strict=True)]


def test_kfac_is_equation_21():
    x, y, outside = make_data()
    leverage = outside @ np.linalg.pinv(x)
    expected = sum(kfac_parts(x, outside, leverage)) / 3 @ y
    found = na.predict(ng.KFAC(), make_model(bias=0.0), x, y, outside).mean
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("first_layer", ["scaled", "literal"])
def test_kfac_after_a_forster_transform(first_layer):
    raw, y, more = make_data(inputs=5)
    fitted = natgrad_datasets.forster_transform(raw, more)
    x, outside = fitted.x_train, fitted.x_test
    # Z^T Z = (N / M_0) I, so that Z' (Z^T Z)^{-1} Z^T is Z' Z^T up to a factor; the factor stays
    # in alpha unless the first layer is scaled
    factor = 1.0 if first_layer == "scaled" else 5 / N
    parts = kfac_parts(x, outside, factor * outside @ x.T)
    expected = sum(parts) / (2 + factor) @ y
    structure = ng.KFAC(first_layer=first_layer)
    found = na.predict(structure, make_model(inputs=5, bias=0.0), x, y, outside).mean
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("structure", [ng.Exact(), ng.BlockDiagonal()], ids=NAMES[:2])
def test_damping_and_ridge(structure):
    x, y, outside = make_data()
    rho, ridge = 0.01, 0.2
    alpha = 3 if isinstance(structure, ng.BlockDiagonal) else 1
    inner, cross = (alpha * matrix_of(structure, x, there, rho) for there in (x, outside))
    found = na.predict(structure, make_model(), x, y, outside, damping=rho, ridge=ridge)
    expected = cross @ np.linalg.solve(inner + ridge * np.eye(N), y)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", ANALYTIC[2:4], ids=NAMES[2:4])
def test_damped_coupled_structures(structure):
    x, y, outside = make_data()
    rho = 5e-3
    inner, cross = (
        na.coefficient_matrix(structure, make_model(outputs=1), x, there, rho, "analytic")
        for there in (x, outside)
    )
    found = na.predict(structure, make_model(), x, y, outside, damping=rho).mean
    np.testing.assert_allclose(found, cross @ np.linalg.solve(inner, y), rtol=1e-6, atol=1e-8)


def test_gradient_descent_with_ridge_is_kernel_ridge_regression():
    x, y, outside = make_data()
    inner, cross = sum(tangents(x, x)), sum(tangents(outside, x))
    found = na.predict(na.GradientDescent(), make_model(), x, y, outside, ridge=0.1).mean
    expected = cross @ np.linalg.solve(inner + N * 0.1 * np.eye(N), y)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("structure", ANALYTIC[:2], ids=NAMES[:2])
def test_covariance_of_sampled_gaussians(structure, ridge):
    x, y, outside = make_data()
    everything = np.concatenate([x, outside])
    prior = relu_kernels(everything, everything)[0][-1]
    rng = np.random.default_rng(1)
    start = rng.multivariate_normal(np.zeros(len(prior)), prior, size=200_000)
    alpha = 3 if isinstance(structure, ng.BlockDiagonal) else 1
    matrix = matrix_of(structure, x, outside) * alpha / (alpha + ridge)
    ends = (y[:, 0] - start[:, :N]) @ matrix.T + start[:, N:]
    found = na.predict(structure, make_model(), x, y, outside, ridge=ridge, covariance="full")
    deviations = np.sqrt(np.outer(*[np.diagonal(found.covariance)] * 2))
    np.testing.assert_allclose(
        np.cov(ends.T) / deviations, found.covariance / deviations, atol=0.015
    )
    np.testing.assert_allclose(
        ends.mean(axis=0), found.mean[:, 0], atol=0.015 * np.sqrt(found.variance.max())
    )


@pytest.mark.parametrize("structure", ANALYTIC, ids=NAMES)
def test_variance_is_the_diagonal_of_the_covariance(structure):
    x, y, outside = make_data()
    full = na.predict(structure, make_model(), x, y, outside, covariance="full", ridge=0.01)
    only = na.predict(structure, make_model(), x, y, outside, covariance="variance", ridge=0.01)
    np.testing.assert_allclose(only.variance, np.diagonal(full.covariance), rtol=1e-9)
    np.testing.assert_array_equal(full.variance, np.diagonal(full.covariance))
    np.testing.assert_allclose(full.covariance, full.covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(full.covariance)[0] > 0
    assert only.covariance is None
    assert only.samples is None


def test_variance_vanishes_at_the_training_inputs():
    x, y, _ = make_data()
    found = na.predict(ng.BlockDiagonal(), make_model(), x, y, x, covariance="variance")
    assert np.abs(found.variance).max() < 1e-6
    assert na.predict(ng.Exact(), make_model(), x, y, x + 1, covariance="variance").variance[0] > 1


def test_a_sample_moves_only_what_its_initialisation_moves():
    x, y, outside = make_data()
    model = make_model()
    found = na.predict(ng.Exact(), model, x, y, outside, initialisations=2, seed=5)
    start = initial_outputs(model, np.concatenate([x, outside]), range(5, 7))
    matrix = matrix_of(ng.Exact(), x, outside)
    for sample, outputs in zip(found.samples, start, strict=True):
        expected = matrix @ (y - outputs[:N]) + outputs[N:]
        np.testing.assert_allclose(sample, expected, rtol=1e-8, atol=1e-10)
    network = ng.MLP(model.widths, activation="relu", bias_variance=BIAS, rngs=nnx.Rngs(6))
    np.testing.assert_allclose(start[1, :N], network(x.astype(np.float32)), rtol=1e-5, atol=1e-6)


def test_samples_follow_their_gaussian_law():
    x, y, outside = make_data()
    draws = 60
    found = na.predict(
        ng.BlockDiagonal(), make_model(hidden=(512, 512), outputs=2), x, y, outside,
        initialisations=draws, covariance="variance",
    )  # fmt: skip
    assert found.samples.shape == (draws, TEST, 2)
    error = (found.samples.mean(axis=0) - found.mean) / np.sqrt(found.variance[:, None] / draws)
    assert np.abs(error).max() < 4
    ratio = np.mean((found.samples - found.mean) ** 2, axis=(0, 2)) / found.variance
    assert ratio.min() > 0.6
    assert ratio.max() < 1.5


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_expected_accuracy_is_that_of_its_gaussian_law(outputs):
    rng = np.random.default_rng(outputs)
    mean, variance = rng.normal(size=(30, outputs)), rng.uniform(0.05, 2, size=30)
    draws = mean + np.sqrt(variance)[:, None] * rng.normal(size=(20_000, 30, outputs))
    if outputs == 1:
        targets = rng.choice([-0.5, 0.5], size=(30, 1))
        right = np.sign(draws) == np.sign(targets)
    else:
        classes = rng.integers(outputs, size=30)
        targets = np.eye(outputs)[classes]
        right = np.argmax(draws, axis=2) == classes
    found = Prediction(mean, variance, samples=draws[:50])
    assert found.expected_accuracy(targets) == pytest.approx(right.mean(), abs=3e-3)
    sampled = found.sampled_accuracies(targets)
    np.testing.assert_allclose(sampled, right[:50].reshape(50, -1).mean(axis=1))


def test_expected_accuracy_without_spread_is_the_accuracy_of_the_mean():
    rng = np.random.default_rng(0)
    mean, targets = rng.normal(size=(40, 3)), np.eye(3)[rng.integers(3, size=40)]
    found = Prediction(mean, np.zeros(40))
    assert found.expected_accuracy(targets) == pytest.approx(found.accuracy(targets))
    assert 0 < found.accuracy(targets) < 1


EMPIRICAL = {
    "gd": (na.GradientDescent(), 20_000),
    "exact": (ng.Exact(), 200),
    "block-diagonal": (ng.BlockDiagonal(), 200),
    "diagonal": (ng.Diagonal(), 20_000),
}


@pytest.mark.parametrize("name", EMPIRICAL)
def test_empirical_is_where_linearised_training_ends(name):
    structure, steps = EMPIRICAL[name]
    x, y, outside = make_data(train=4, test=3)
    model = make_model(hidden=(16, 16), activation="tanh")
    rate = 1 / na.isotropy(structure, model, x).eigenvalues[-1]
    curve = na.predict_dynamics(structure, model, x, y, rate, steps, x_test=outside)
    found = na.predict(structure, model, x, y, outside, kernels="empirical")
    assert curve.train_losses[-1] < 1e-14
    np.testing.assert_allclose(found.mean, curve.outputs_test[-1], rtol=1e-5, atol=1e-7)
    assert found.variance is None


def test_empirical_gradient_descent_and_exact_agree():
    x, y, outside = make_data(train=4)
    model = make_model(hidden=(16, 16), activation="tanh")
    ends = [
        na.predict(s, model, x, y, outside, kernels="empirical").mean
        for s in (na.GradientDescent(), ng.Exact())
    ]
    np.testing.assert_allclose(*ends, rtol=1e-7, atol=1e-9)


def test_empirical_ridge_shrinks_the_fit_by_its_share():
    x, y, _ = make_data(train=4)
    model = make_model(hidden=(16, 16), activation="tanh")
    found = na.predict(ng.BlockDiagonal(), model, x, y, x, kernels="empirical", ridge=1.5)
    start = np.asarray(model(x.astype(np.float32)), np.float64)
    np.testing.assert_allclose(found.mean, start + (y - start) * 3 / 4.5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["analytic", "empirical"])
@pytest.mark.parametrize("structure", ANALYTIC, ids=NAMES)
def test_training_targets_are_met(structure, kernels):
    x, y, _ = make_data()
    model = make_model(hidden=(40, 40))
    found = na.predict(structure, model, x, y, x, kernels=kernels)
    np.testing.assert_allclose(found.mean, y, atol=1e-5)


def test_kernels_of_an_earlier_call_are_used(tmp_path):
    x, y, outside = make_data()
    first, second = [], []
    for calls in (first, second):
        found = na.predict(
            ng.Exact(), make_model(), x, y, outside, covariance="variance", store=tmp_path,
            progress=lambda done, total, calls=calls: calls.append((done, total)),
        )  # fmt: skip
    assert first
    assert not second
    plain = na.predict(ng.Exact(), make_model(), x, y, outside, covariance="variance")
    np.testing.assert_array_equal(found.mean, plain.mean)
    np.testing.assert_array_equal(found.variance, plain.variance)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"structure": ng.Diagonal()}, ValueError, "no infinite-width kernel"),
        ({"structure": ng.UnitWise()}, ValueError, "only between training inputs"),
        ({"structure": "exact"}, TypeError, "structure must be"),
        ({"structure": na.GradientDescent(), "damping": 0.1}, ValueError, "no damping"),
        ({"ridge": -0.1}, ValueError, "ridge must be 0 or positive"),
        ({"ridge": np.nan}, ValueError, "ridge must be 0 or positive"),
        ({"ridge": "much"}, ValueError, "ridge must be a number"),
        ({"covariance": "all"}, ValueError, "covariance must be none, variance or full"),
        ({"kernels": "finite"}, ValueError, "kernels must be"),
        ({"kernels": "empirical", "initialisations": 3}, ValueError, "one initialisation"),
        ({"kernels": "empirical", "covariance": "full"}, ValueError, "one initialisation"),
        ({"initialisations": -1}, ValueError, "initialisations must be an integer"),
        ({"initialisations": 1, "seed": -1}, ValueError, "seed must be an integer"),
        ({"y": np.zeros((N, 3))}, ValueError, "y must have shape"),
        ({"y": np.zeros(N)}, ValueError, "y must have shape"),
        ({"y": np.full((N, 2), np.nan)}, ValueError, "NaN"),
        ({"x_test": np.zeros((3, 4))}, ValueError, "x_test must have shape"),
        ({"model": nnx.Linear(INPUTS, 2, rngs=nnx.Rngs(0))}, TypeError, "MLP"),
    ],
)
def test_bad_arguments(settings, kind, words):
    x, y, outside = make_data()
    good = {"structure": ng.Exact(), "model": make_model(), "x": x, "y": y, "x_test": outside}
    with pytest.raises(kind, match=words):
        na.predict(**(good | settings))


def test_what_was_not_computed_is_refused():
    found = Prediction(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="no initialisations were drawn"):
        found.sampled_accuracies(np.eye(2)[[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="no variance"):
        found.expected_accuracy(np.eye(2)[[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="shape"):
        found.accuracy(np.zeros((4, 1)))
