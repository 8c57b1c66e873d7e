"""Empirical kernels and coefficient matrices, against explicit Jacobians and theory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na

INPUTS, N, N_TEST = 12, 6, 4


def make_model(activation: str = "tanh", outputs: int = 2, bias: float = 0.3, depth: int = 3):
    widths = (INPUTS, *[24] * (depth - 1), outputs)
    return ng.MLP(widths, activation=activation, bias_variance=bias, rngs=nnx.Rngs(1))


def make_inputs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, INPUTS)).astype(np.float32)


def jacobians(model: ng.MLP, x: np.ndarray) -> list[np.ndarray]:
    """One Jacobian (N C, P_l) a layer, by automatic differentiation in float64."""
    with jax.enable_x64(True):
        graphdef, state = nnx.split(model)
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
        inputs = jnp.asarray(x, jnp.float64)
        tree = jax.jacobian(lambda s: nnx.merge(graphdef, s)(inputs))(state)
        rows = x.shape[0] * model.widths[-1]
        return [
            np.concatenate(
                [np.asarray(leaf).reshape(rows, -1) for leaf in jax.tree.leaves(layer)], axis=1
            )
            for _, layer in sorted(tree["layers"].items())
        ]


@pytest.mark.parametrize(("activation", "outputs", "bias"), [("relu", 1, 0.0), ("tanh", 3, 0.5)])
def test_layer_kernels_against_jacobians(activation, outputs, bias):
    model = make_model(activation, outputs, bias)
    x, x_test = make_inputs(N), make_inputs(N_TEST, 1)
    here, there = jacobians(model, x), jacobians(model, x_test)
    for kernel, jacobian in zip(na.empirical_layer_kernels(model, x), here, strict=True):
        assert kernel.dtype == np.float64
        np.testing.assert_allclose(kernel, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)
    cross = na.empirical_layer_kernels(model, x_test, x)
    for kernel, left, right in zip(cross, there, here, strict=True):
        np.testing.assert_allclose(kernel, left @ right.T, rtol=1e-10, atol=1e-12)


def test_the_global_precision_and_the_model_stay_as_they_are():
    model = make_model()
    na.empirical_layer_kernels(model, make_inputs(N))
    assert not jax.config.jax_enable_x64
    assert jnp.ones(1).dtype == jnp.float32
    assert model.layers[0].kernel.dtype == jnp.float32


def test_exact_coefficient_is_kernel_regression():
    model, x, x_test = make_model(), make_inputs(N), make_inputs(N_TEST, 1)
    kernel = sum(na.empirical_layer_kernels(model, x))
    cross = sum(na.empirical_layer_kernels(model, x_test, x))
    found = na.coefficient_matrix(ng.Exact(), model, x, x_test)
    assert found.shape == (N_TEST * 2, N * 2)
    np.testing.assert_allclose(found, cross @ np.linalg.inv(kernel), rtol=1e-8, atol=1e-9)


def test_gradient_descent_coefficient_is_the_tangent_kernel():
    model, x, x_test = make_model(), make_inputs(N), make_inputs(N_TEST, 1)
    cross = sum(na.empirical_layer_kernels(model, x_test, x))
    found = na.coefficient_matrix(na.GradientDescent(), model, x, x_test)
    np.testing.assert_allclose(found, cross / N, rtol=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_block_diagonal_is_isotropic(depth):
    found = na.coefficient_matrix(ng.BlockDiagonal(), make_model(depth=depth), make_inputs(N))
    np.testing.assert_allclose(found, depth * np.eye(N * 2), atol=1e-8)


def test_layer_wise_theorem_for_random_couplings():
    model, x, x_test = make_model(), make_inputs(N), make_inputs(N_TEST, 1)
    draw = np.random.default_rng(3).normal(size=(3, 3))
    here = na.empirical_layer_kernels(model, x)
    cross = na.empirical_layer_kernels(model, x_test, x)
    for sigma in (draw @ draw.T + 0.1 * np.eye(3), draw + draw.T):
        weights = np.linalg.solve(sigma, np.ones(3))
        structure = ng.LayerWise(sigma)
        on_train = na.coefficient_matrix(structure, model, x)
        np.testing.assert_allclose(on_train, weights.sum() * np.eye(N * 2), atol=1e-7)
        expected = sum(
            w * b @ np.linalg.inv(a) for w, a, b in zip(weights, here, cross, strict=True)
        )
        on_test = na.coefficient_matrix(structure, model, x, x_test)
        np.testing.assert_allclose(on_test, expected, rtol=1e-7, atol=1e-8)


def test_relative_damping_is_a_number_in_disguise():
    model, x = make_model(), make_inputs(N)
    kernel = sum(na.empirical_layer_kernels(model, x))
    rho = 0.01 * np.trace(kernel) / N / len(kernel)
    relative = na.coefficient_matrix(ng.Exact(), model, x, damping=ng.RelativeDamping(0.01))
    np.testing.assert_allclose(
        relative, na.coefficient_matrix(ng.Exact(), model, x, damping=rho), rtol=1e-9, atol=1e-12
    )


def test_bad_arguments():
    model, x = make_model(), make_inputs(N)
    with pytest.raises(ValueError, match="empirical"):
        na.coefficient_matrix(ng.Exact(), model, x, kernels="numeric")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no damping"):
        na.coefficient_matrix(na.GradientDescent(), model, x, damping=0.1)
    with pytest.raises(ValueError, match="damping"):
        na.coefficient_matrix(ng.Exact(), model, x, damping=-1.0)
    with pytest.raises(TypeError, match="fixed damping"):
        na.coefficient_matrix(ng.Exact(), model, x, damping=ng.LevenbergMarquardt())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="instance"):
        na.coefficient_matrix(ng.Exact, model, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes inputs of shape"):
        na.empirical_layer_kernels(model, x[:, :5])
    with pytest.raises(ValueError, match=r"x_train.*NaN"):
        na.empirical_layer_kernels(model, np.full_like(x, np.nan))
    with pytest.raises(ValueError, match=r"x_test of \(6, 5\)"):
        na.empirical_layer_kernels(model, x, x[:, :5])
    with pytest.raises(ValueError, match="the batch is empty: x_test"):
        na.coefficient_matrix(ng.Exact(), model, x, x[:0])
