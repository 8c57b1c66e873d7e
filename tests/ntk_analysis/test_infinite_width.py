"""The infinite-width limit of a model: what it is made of, and its kernels against quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special, stats

import natgrad_flax as ng
from natgrad_flax.models.activations import ACTIVATIONS
from ntk_analysis.activation_kernels import ACTIVATION_KERNELS, HERMITE_TERMS
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.infinite_width import infinite_width_limit
from ntk_analysis.reproduce.karakida_osawa.kernels import (
    erf_expectations,
    reference_kernels,
    relu_expectations,
)

INPUTS = 5
SLOPE = 0.01


def make_model(activation="relu", depth=3, bias=0.3, weight=2.0, width=2):
    widths = (INPUTS, *[width] * (depth - 1), 1)
    return ng.MLP(
        widths,
        activation=activation,
        weight_variance=weight,
        bias_variance=bias,
        rngs=nnx.Rngs(0),
    )


def quadrature(phi, slope, spacing=0.1, reach=9.0):
    """Two-dimensional trapezoidal rule, pair by pair: exponential convergence."""
    count = round(reach / spacing)
    nodes = spacing * np.arange(-count, count + 1)
    weights = spacing * stats.norm.pdf(nodes)
    grid = np.outer(weights, weights)

    def expectations(covariance, first, second):
        pairs = np.broadcast_arrays(covariance, first, second)
        found = np.empty((2, covariance.size))
        for index, (cov, one, two) in enumerate(zip(*map(np.ravel, pairs), strict=True)):
            u = np.sqrt(one) * nodes[:, None]
            rest = np.sqrt(max(two - cov**2 / one, 0.0))
            v = cov / np.sqrt(one) * nodes[:, None] + rest * nodes[None, :]
            found[:, index] = [np.sum(grid * f(u) * f(v)) for f in (phi, slope)]
        return found.reshape(2, *covariance.shape)

    return expectations


def tanh_slope(u):
    return 1 / np.cosh(u) ** 2


def leaky_relu(covariance, first, second):
    """phi(u) = s u + (1 - s) relu(u), multiplied out."""
    value, slope = relu_expectations(covariance, first, second)
    part = (1 - SLOPE) ** 2
    return SLOPE * covariance + part * value, SLOPE + part * slope


EXPECTATIONS = {
    "relu": relu_expectations,
    "leaky_relu": leaky_relu,
    "erf": erf_expectations,
    "gelu": quadrature(
        lambda u: u * stats.norm.cdf(u), lambda u: stats.norm.cdf(u) + u * stats.norm.pdf(u)
    ),
    "identity": lambda covariance, first, second: (covariance, np.ones_like(covariance)),
    "tanh": quadrature(np.tanh, tanh_slope, spacing=0.05),
}


def test_every_activation_of_the_models_has_a_kernel_and_a_reference_here():
    assert set(ACTIVATION_KERNELS) == set(EXPECTATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", EXPECTATIONS)
@pytest.mark.parametrize("normed", [True, False])
def test_kernels_of_every_activation(activation, normed):
    x = 0.7 * np.random.default_rng(0).normal(size=(7, INPUTS))
    if normed:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    model = make_model(activation, depth=3 if normed else 4, bias=0.1, weight=1.5)
    variances = [(1.5, 0.1)] * model.depth
    for first, second in ((x[:4], None), (x[4:], x[:4])):
        found = analytic_kernels(model, first, second)
        expected = reference_kernels(first, second, variances, EXPECTATIONS[activation])
        for name in ("inputs", "derivatives", "tangent"):
            pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
            for ours, reference in pairs:
                np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-13)


def test_quadrature_of_the_tests_has_converged():
    covariance, variances = np.array([[0.7, -1.1]]), (np.array([[2.0]]), np.array([[1.5]]))
    erf = quadrature(special.erf, lambda u: 2 / np.sqrt(np.pi) * np.exp(-(u**2)))
    expected = erf_expectations(covariance, *variances)
    np.testing.assert_allclose(erf(covariance, *variances), expected, atol=1e-14)
    # and against Gauss-Hermite
    points, weights = special.roots_hermite(300)
    values = np.tanh(np.sqrt(2 * 1.5) * points) ** 2 @ weights / np.sqrt(np.pi)
    same = np.array([[1.5]])
    found = EXPECTATIONS["tanh"](same, same, same)[0]
    np.testing.assert_allclose(found, values, rtol=1e-12)


@pytest.mark.parametrize(("variance", "diagonal"), [(2.0, 1e-12), (4.0, 4e-9), (25.0, 2e-3)])
def test_tanh_series_is_as_good_as_its_docstring_says(variance, diagonal):
    # three inputs of the given variance, correlations 0.9 and 0.1
    x = np.array([[1.0, 0.0], [0.9, np.sqrt(1 - 0.81)], [0.1, -np.sqrt(1 - 0.01)]])
    x = np.sqrt(2) * x
    model = ng.MLP((2, 2, 1), activation="tanh", weight_variance=variance, rngs=nnx.Rngs(0))
    expectations = quadrature(np.tanh, tanh_slope, spacing=0.04)
    found = analytic_kernels(model, x)
    expected = reference_kernels(x, None, [(variance, 0.0)] * 2, expectations)
    apart = np.abs(found.derivatives[0] / expected.derivatives[0] - 1)
    assert np.diag(apart).max() < diagonal
    assert (apart - np.diag(np.diag(apart))).max() < 1e-12


def test_network_is_the_model_in_neural_tangents():
    model = make_model(width=16)
    limit = infinite_width_limit(model)
    with jax.enable_x64(True):
        x = np.random.default_rng(2).normal(size=(3, INPUTS))
        shape, parameters = limit.network[0](jax.random.key(0), (-1, INPUTS))
        assert shape == (-1, 1)
        # its parameters in our model give its outputs: the same parametrisation
        graphdef, state = nnx.split(model)
        for index, (weight, bias) in enumerate(filter(len, parameters)):
            state["layers"][index]["kernel"].set_value(weight)
            state["layers"][index]["bias"].set_value(jnp.ravel(bias))
        ours = nnx.merge(graphdef, state)(x)
        np.testing.assert_allclose(limit.network[1](parameters, x), ours, rtol=1e-12)


def test_description_holds_what_decides_the_kernels():
    limit = infinite_width_limit(make_model("relu", depth=4))
    assert limit.depth == len(limit.widths) == 4
    assert limit.description == {
        "activation": "relu",
        "engine": "neural-tangents",
        "hermite_terms": None,
        "weight_variances": [2.0] * 4,
        "bias_variances": [0.3] * 4,
    }
    tanh = infinite_width_limit(make_model("tanh"))
    assert tanh.description["hermite_terms"] == HERMITE_TERMS
    assert infinite_width_limit(make_model()) is infinite_width_limit(make_model())
    assert infinite_width_limit(make_model(bias=0.0)) is not infinite_width_limit(make_model())


def test_variances_of_single_layers_are_the_models():
    model = make_model(depth=3, bias=0.0)
    model.layers[1] = ng.Dense(2, 2, weight_variance=0.7, bias_variance=0.4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(3).normal(size=(4, INPUTS))
    found = analytic_kernels(model, x)
    expected = reference_kernels(x, None, [(2.0, 0.0), (0.7, 0.4), (2.0, 0.0)], relu_expectations)
    for ours, reference in zip(found.tangent, expected.tangent, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-12)
    averages = [(expected.inputs[1] - 0.4) / 0.7, expected.inputs[2] / 2]
    for ours, reference in zip(found.forward, [x @ x.T / INPUTS, *averages], strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-15)


def test_models_without_a_limit():
    class Other(nnx.Module):
        pass

    with pytest.raises(TypeError, match=r'Other has no infinite-width limit.*kernels="empirical"'):
        infinite_width_limit(Other())
    model = make_model(depth=3)
    model.layers[1] = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layer 2 \(Linear\) has no infinite-width limit"):
        infinite_width_limit(model)
    model = make_model()
    model.activation = "sine"
    with pytest.raises(ValueError, match="layer 1: activation 'sine' has no infinite-width"):
        infinite_width_limit(model)
