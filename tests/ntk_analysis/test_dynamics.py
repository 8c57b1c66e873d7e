"""Predicted curves against a truly linearised network, trained step by step in parameter space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import natgrad_flax as ng
import ntk_analysis as na

INPUTS, N, N_TEST, OUTPUTS, STEPS = 8, 5, 4, 2, 6
rng = np.random.default_rng(0)
X = rng.normal(size=(N, INPUTS)) / np.sqrt(INPUTS)
Y = rng.normal(size=(N, OUTPUTS))
X_TEST = rng.normal(size=(N_TEST, INPUTS)) / np.sqrt(INPUTS)
Y_TEST = rng.normal(size=(N_TEST, OUTPUTS))


def make_model() -> ng.MLP:
    return ng.MLP((INPUTS, 12, 12, OUTPUTS), activation="tanh", bias_variance=0.2, rngs=nnx.Rngs(2))


def linearised_training(structure, rate, damping):
    """Gradient steps with the dense metric on f_0 + J_0 (theta - theta_0), J_0 by autodiff."""
    with jax.enable_x64(True):
        graphdef, state = nnx.split(make_model())
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
        model = nnx.merge(graphdef, state)
        theta, unravel = ravel_pytree(state)
        inputs = jnp.concatenate([X, X_TEST])

        def function(vector):
            return nnx.merge(graphdef, unravel(vector))(inputs).reshape(-1)

        f0, push = jax.linearize(function, theta)
        signals = ng.jacobian_signals(model, jnp.asarray(X))
        rho = damping
        if isinstance(damping, ng.RelativeDamping):
            rho = damping.ratio * structure.damping_scale(signals)
        metric = np.asarray(structure.to_dense(signals, rho))
        # the signals' own order of parameters -> the order of ravel_pytree, through autodiff
        dense = np.asarray(signals.to_dense())
        jacobian = np.asarray(jax.jacobian(function)(theta))[: N * OUTPUTS]
        order = [
            int(np.flatnonzero((np.abs(dense - column[:, None]) < 1e-12).all(axis=0))[0])
            for column in jacobian.T
        ]
        assert sorted(order) == list(range(len(theta)))
        metric = metric[np.ix_(order, order)]
        undamped = not isinstance(damping, ng.RelativeDamping) and damping == 0
        inverse = np.linalg.pinv(metric, rcond=1e-11) if undamped else np.linalg.inv(metric)
        step, outputs = np.zeros(len(theta)), []
        for _ in range(STEPS + 1):
            moved = np.asarray(f0 + push(jnp.asarray(step))).reshape(-1, OUTPUTS)
            outputs.append(moved)
            gradient = jacobian.T @ (moved[:N] - Y).reshape(-1) / N
            step = step - rate * (inverse @ gradient)
        return np.stack(outputs)


CASES = [
    (na.GradientDescent(), 0.3, 0.0),
    (ng.Exact(), 0.7, 0.0),
    (ng.Exact(), 0.7, 1e-3),
    (ng.BlockDiagonal(), 0.2, 0.0),
    (ng.BlockDiagonal(), 0.2, ng.RelativeDamping(1e-2)),
    (ng.BlockTriDiagonal(), 0.5, 0.0),
    (ng.LayerWise([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]]), 0.4, 1e-2),
    (ng.KFAC(), 0.02, 1e-2),
    (ng.UnitWise(), 0.02, 1e-3),
    (ng.Diagonal(), 1e-3, 1e-2),
    (ng.QuasiDiagonal(), 1e-3, 1e-2),
]


@pytest.mark.parametrize(
    ("structure", "rate", "damping"), CASES, ids=[f"{c[0].name}-{c[2]}" for c in CASES]
)
def test_against_a_linearised_network(structure, rate, damping):
    expected = linearised_training(structure, rate, damping)
    found = na.predict_dynamics(structure, make_model(), X, Y, rate, STEPS, damping, X_TEST)
    scale = np.abs(expected).max()
    # an undamped pseudo-inverse of the dense metric is itself only good to 1e-9
    tolerance = 1e-10 if damping != 0 or isinstance(structure, na.GradientDescent) else 1e-9
    np.testing.assert_allclose(found.outputs_train, expected[:, :N], atol=tolerance * scale)
    assert found.outputs_test is not None
    np.testing.assert_allclose(found.outputs_test, expected[:, N:], atol=tolerance * scale)


@pytest.mark.parametrize("c", [0.25, 0.5, 1.0, 1.5, 1.9, 2.1])
@pytest.mark.parametrize("structure", [ng.Exact(), ng.BlockDiagonal(), ng.BlockTriDiagonal()])
def test_isotropic_residuals_shrink_by_one_minus_c(structure, c):
    model = make_model()
    rate = c * ng.optimal_learning_rate(structure, model, N)
    found = na.predict_dynamics(structure, model, X, Y, rate, STEPS)
    residuals = np.linalg.norm(found.outputs_train - Y, axis=(1, 2))
    np.testing.assert_allclose(
        residuals / residuals[0], np.abs(1 - c) ** np.arange(STEPS + 1), atol=1e-10
    )
    assert found.outputs_test is None


def test_gradient_descent_tends_to_the_exact_solution():
    model = make_model()
    theta = na.coefficient_matrix(na.GradientDescent(), model, X)
    rate = 1 / np.linalg.eigvalsh(theta)[-1]
    slow = na.predict_dynamics(na.GradientDescent(), model, X, Y, rate, 20_000, x_test=X_TEST)
    fast = na.predict_dynamics(ng.Exact(), model, X, Y, 1.0, 1, x_test=X_TEST)
    np.testing.assert_allclose(slow.outputs_test[-1], fast.outputs_test[-1], rtol=1e-6, atol=1e-8)


def test_losses_are_those_of_the_library():
    found = na.predict_dynamics(ng.Exact(), make_model(), X, Y, 0.5, 2, x_test=X_TEST)
    loss = ng.MeanSquaredError()
    with jax.enable_x64(True):
        for t in range(3):
            assert found.train_losses[t] == pytest.approx(float(loss(found.outputs_train[t], Y)))
            assert found.test_losses(Y_TEST)[t] == pytest.approx(
                float(loss(found.outputs_test[t], Y_TEST))
            )


def test_bad_arguments():
    model = make_model()
    with pytest.raises(ValueError, match="mean squared error only"):
        na.predict_dynamics(ng.Exact(), model, X, Y, 1.0, 1, loss=ng.SoftmaxCrossEntropy())
    with pytest.raises(ValueError, match="steps"):
        na.predict_dynamics(ng.Exact(), model, X, Y, 1.0, -1)
    with pytest.raises(ValueError, match="learning_rate"):
        na.predict_dynamics(ng.Exact(), model, X, Y, 0.0, 1)
    with pytest.raises(ValueError, match="y must have shape"):
        na.predict_dynamics(ng.Exact(), model, X, Y[:, :1], 1.0, 1)
    with pytest.raises(ValueError, match="y has NaN"):
        na.predict_dynamics(ng.Exact(), model, X, Y * np.nan, 1.0, 1)
    with pytest.raises(ValueError, match="no test outputs"):
        na.predict_dynamics(ng.Exact(), model, X, Y, 1.0, 1).test_losses(Y_TEST)
    with pytest.raises(ValueError, match="targets must have shape"):
        na.predict_dynamics(ng.Exact(), model, X, Y, 1.0, 1, x_test=X_TEST).test_losses(Y)
