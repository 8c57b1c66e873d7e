"""Losses against automatic differentiation and the definition of the Fisher information."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_flax as ng

LOSSES = [ng.MeanSquaredError(), ng.SoftmaxCrossEntropy(), ng.SoftmaxCrossEntropy(0.2)]


def batch(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(3 * rng.normal(size=(6, 4)), dtype)
    return outputs, jnp.asarray(np.eye(4)[rng.integers(0, 4, 6)], dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
class TestAgainstDefinition:
    def test_residual_is_n_times_the_gradient(self, loss):
        outputs, targets = batch()
        slope = jax.grad(loss)(outputs, targets)
        np.testing.assert_allclose(loss.residual(outputs, targets), 6 * slope, atol=1e-12)

    def test_fisher_is_the_hessian_in_the_outputs(self, loss):
        outputs, targets = batch()
        hessian = jax.hessian(loss)(outputs, targets)
        damping = getattr(loss, "output_damping", 0.0) * np.eye(4)
        for n in range(6):
            np.testing.assert_allclose(
                loss.fisher(outputs)[n], 6 * hessian[n, :, n, :] + damping, atol=1e-12
            )

    def test_factor_and_coefficients(self, loss):
        outputs, targets = batch()
        factor = loss.factor(outputs)
        np.testing.assert_allclose(factor @ factor.swapaxes(1, 2), loss.fisher(outputs), atol=1e-12)
        assert np.linalg.matrix_rank(np.asarray(factor)).min() == factor.shape[2]
        w = loss.coefficients(outputs, targets)
        np.testing.assert_allclose(
            jnp.einsum("ncs,ns->nc", factor, w), loss.residual(outputs, targets), atol=1e-12
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES[:2], ids=repr)
def test_sampled_fisher_is_unbiased(loss):
    outputs, _ = batch()
    draws = loss.sample(jax.random.key(0), outputs, 200_000)
    estimate = draws @ draws.swapaxes(1, 2)
    np.testing.assert_allclose(estimate, loss.fisher(outputs), atol=0.02)
    np.testing.assert_allclose(jnp.sum(draws, axis=2) / 200_000**0.5, 0, atol=0.02)


def test_confident_wrong_predictions_stay_finite():
    outputs = jnp.asarray([[300.0, 0.0, -300.0], [0.0, 90.0, 0.0]], jnp.float32)
    targets = jnp.asarray([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], jnp.float32)
    loss = ng.SoftmaxCrossEntropy()
    assert np.isfinite(loss.coefficients(outputs, targets)).all()
    assert np.isfinite(loss.factor(outputs)).all()


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_output_damping_out_of_range(value):
    with pytest.raises(ValueError, match="output_damping"):
        ng.SoftmaxCrossEntropy(output_damping=value)
