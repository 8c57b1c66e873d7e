"""Flows of the linearised network, against closed forms and fixed small steps in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.linalg import expm
from scipy.special import log_softmax, logsumexp, softmax

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis import flow
from ntk_analysis.flow import predict_flow

INPUTS, N, N_TEST, CLASSES = 8, 5, 3, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(N, INPUTS)) / np.sqrt(INPUTS)
X_TEST = rng.normal(size=(N_TEST, INPUTS)) / np.sqrt(INPUTS)
LABELS = np.array([0, 2, 1, 0, 1])
Y = np.eye(CLASSES)[LABELS]
Y_TEST = np.eye(CLASSES)[[2, 0, 1]]
MSE, CE = ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()


def make_model() -> ng.MLP:
    widths = (INPUTS, 12, 12, CLASSES)
    return ng.MLP(widths, activation="tanh", bias_variance=0.2, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def plain():
    """Float64 signals of training and test samples, f_0 and the dense Jacobian of both."""
    signals = na.empirical.initial_signals(make_model(), X, X_TEST)
    with jax.enable_x64(True):
        return signals, signals.outputs, np.asarray(signals.everything.to_dense())


def runge_kutta(field, start: np.ndarray, last: float, steps: int) -> np.ndarray:
    value, h = start, last / steps
    for _ in range(steps):
        a = field(value)
        b = field(value + h / 2 * a)
        c = field(value + h / 2 * b)
        value = value + h / 6 * (a + 2 * b + 2 * c + field(value + h * c))
    return value


def margins(outputs: np.ndarray) -> np.ndarray:
    """Logit of the true class minus the log-sum-exp of the others."""
    true = np.take_along_axis(outputs, LABELS[:, None], 1)[:, 0]
    others = np.where(Y == 1, -np.inf, outputs)
    return true - logsumexp(others, axis=1)


def step_matrix(mask: np.ndarray, jacobian: np.ndarray, outputs: np.ndarray, rho: float):
    """-J G^{-1} J^T / N with G = mask * J^T H J / N + rho I, all of it explicit."""
    p = softmax(outputs, axis=1)
    hessian = p[:, :, None] * (np.eye(CLASSES) - p[:, None, :])
    rows = jacobian[: N * CLASSES].reshape(N, CLASSES, -1)
    fisher = np.einsum("ncp,ncd,ndq->pq", rows, hessian, rows, optimize=True) / N
    dense = mask * fisher + rho * np.eye(len(fisher))
    inverse = np.linalg.inv(dense) if rho else np.linalg.pinv(dense, rcond=1e-10, hermitian=True)
    return -jacobian @ inverse @ jacobian[: N * CLASSES].T / N


def same_unit(signals) -> np.ndarray:
    """Which parameters belong to the same unit, (P, P), in the order of the dense Jacobian."""
    layers = signals.everything.layers
    owner = [100 * i + np.tile(np.arange(a.num_units), a.fan_in) for i, a in enumerate(layers)]
    unit = np.concatenate(owner)
    return unit[:, None] == unit


@pytest.mark.parametrize(
    ("structure", "damping"),
    [(na.GradientDescent(), 0.0), (ng.KFAC(), 0.3)],
)
def test_squared_error_is_a_matrix_exponential(structure, damping):
    model, times = make_model(), [0.0, 0.5, 4.0]
    found = predict_flow(structure, model, X, Y, times, damping, X_TEST, loss=MSE)
    train = na.coefficient_matrix(structure, model, X, damping=damping)
    test = na.coefficient_matrix(structure, model, X, X_TEST, damping)
    initial = na.predict_dynamics(structure, model, X, Y, 1.0, 0, damping, X_TEST)
    residual = (initial.outputs_train[0] - Y).reshape(-1)
    for t, inside, outside in zip(times, found.outputs_train, found.outputs_test, strict=True):
        decayed = expm(-t * train) @ residual
        np.testing.assert_allclose(inside - Y, decayed.reshape(Y.shape), atol=1e-7)
        moved = test @ np.linalg.solve(train, decayed - residual)
        wanted = initial.outputs_test[0] + moved.reshape(N_TEST, CLASSES)
        np.testing.assert_allclose(outside, wanted, atol=1e-7)
    np.testing.assert_array_equal(found.outputs_train[0], initial.outputs_train[0])


def test_exact_cross_entropy_has_a_closed_form():
    # science 3.6: e^{z(t)} + 1 = e^t (e^{z(0)} + 1), and other logits keep their differences
    times = np.array([0.0, 0.3, 1.0, 3.0])
    found = predict_flow(ng.Exact(), make_model(), X, Y, times, metric="current")
    grown = np.array([np.exp(margins(outputs)) + 1 for outputs in found.outputs_train])
    np.testing.assert_allclose(grown, np.exp(times)[:, None] * grown[0], rtol=1e-6)
    wrong = found.outputs_train[:, Y == 0].reshape(len(times), N, CLASSES - 1)
    np.testing.assert_allclose(
        np.diff(wrong, axis=2)[1:], np.diff(wrong, axis=2)[:1].repeat(3, 0), atol=1e-6
    )
    assert found.outputs_test is None


@pytest.mark.parametrize(
    ("structure", "alpha", "metric"),
    [(ng.BlockDiagonal(), 3, "current"), (ng.BlockTriDiagonal(), 1, "initial")],
)
def test_layer_wise_flow_is_alpha_times_as_fast(structure, alpha, metric):
    times = np.array([0.2, 0.9])
    model = make_model()
    exact = predict_flow(ng.Exact(), model, X, Y, times, metric=metric)
    other = predict_flow(structure, model, X, Y, times / alpha, metric=metric)
    # the Fisher does not see a shift of all logits of a sample, so structures may differ in it
    np.testing.assert_allclose(
        log_softmax(other.outputs_train, axis=2),
        log_softmax(exact.outputs_train, axis=2),
        atol=1e-6,
    )
    assert np.abs(np.diff(exact.outputs_train, axis=0)).max() > 0.1


def test_gradient_descent_follows_the_tangent_kernel(plain):
    _, start, jacobian = plain
    theta = jacobian @ jacobian[: N * CLASSES].T / N

    def field(f):
        return -(theta @ (softmax(f[:N], axis=1) - Y).reshape(-1)).reshape(f.shape)

    wanted = runge_kutta(field, start, 3.0, 3000)
    for metric in ("initial", "current"):
        found = predict_flow(
            na.GradientDescent(), make_model(), X, Y, [3.0], x_test=X_TEST, metric=metric
        )
        np.testing.assert_allclose(found.outputs_train[0], wanted[:N], atol=1e-7)
        np.testing.assert_allclose(found.outputs_test[0], wanted[N:], atol=1e-7)
    # losses are those of cross-entropy
    loss = -(Y * log_softmax(wanted[:N], axis=1)).sum() / N
    assert found.train_losses[0] == pytest.approx(loss, abs=1e-7)
    loss = -(Y_TEST * log_softmax(wanted[N:], axis=1)).sum() / N_TEST
    assert found.test_losses(Y_TEST)[0] == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize("metric", ["initial", "current"])
@pytest.mark.parametrize(("structure", "rho"), [(ng.Exact(), 0.0), (ng.UnitWise(), 0.05)])
def test_against_the_explicit_metric(plain, structure, rho, metric):
    signals, start, jacobian = plain
    mask = same_unit(signals) if isinstance(structure, ng.UnitWise) else np.ones(())
    fixed = step_matrix(mask, jacobian, start[:N], rho)

    def field(f):
        matrix = fixed if metric == "initial" else step_matrix(mask, jacobian, f[:N], rho)
        return (matrix @ (softmax(f[:N], axis=1) - Y).reshape(-1)).reshape(f.shape)

    wanted = runge_kutta(field, start, 0.1, 25)
    found = predict_flow(structure, make_model(), X, Y, [0.1], rho, X_TEST, metric=metric)
    reached = np.concatenate([found.outputs_train[0], found.outputs_test[0]])
    assert np.abs(wanted - start).max() > 0.1
    np.testing.assert_allclose(reached, wanted, atol=1e-6)


def test_parameters_integrated_densely(plain):
    # theta' = -G^{-1} J^T r / N for a damped K-FAC, f' from theta through J
    signals, start, jacobian = plain
    with jax.enable_x64(True):
        seeded = signals.train.mix_directions(CE.factor(jnp.asarray(start[:N])))
        scale = 0.1 * ng.KFAC().damping_scale(seeded)
        inverse = np.linalg.inv(np.asarray(ng.KFAC().to_dense(seeded, scale)))
    rows = jacobian[: N * CLASSES]

    def field(moved):
        f = start[:N] + (rows @ moved).reshape(N, CLASSES)
        return -inverse @ (rows.T @ (softmax(f, axis=1) - Y).reshape(-1)) / N

    moved = runge_kutta(field, np.zeros(len(inverse)), 0.1, 50)
    wanted = start + (jacobian @ moved).reshape(start.shape)
    found = predict_flow(ng.KFAC(), make_model(), X, Y, [0.1], ng.RelativeDamping(0.1), X_TEST)
    np.testing.assert_allclose(found.outputs_train[0], wanted[:N], atol=1e-6)
    np.testing.assert_allclose(found.outputs_test[0], wanted[N:], atol=1e-6)


@pytest.mark.parametrize("metric", ["initial", "current"])
def test_output_damping_acts_in_function_space(plain, metric):
    # science 3.6, "exact plus MSE": f' = -(H + d I)^{-1} (p - y) on the training samples
    start, d = plain[1][:N], 0.2

    def field(f):
        p = softmax(start if metric == "initial" else f, axis=1)
        hessian = p[:, :, None] * (np.eye(CLASSES) - p[:, None, :]) + d * np.eye(CLASSES)
        return -np.linalg.solve(hessian, (softmax(f, axis=1) - Y)[:, :, None])[:, :, 0]

    loss = ng.SoftmaxCrossEntropy(output_damping=d)
    found = predict_flow(ng.Exact(), make_model(), X, Y, [1.0], loss=loss, metric=metric)
    wanted = runge_kutta(field, start, 1.0, 500)
    np.testing.assert_allclose(found.outputs_train[0], wanted, atol=1e-6)


def test_stiff_flows_are_solved_implicitly(monkeypatch):
    # the last time is far beyond the slowest rate: the limit is the interpolation of the targets
    found = predict_flow(na.GradientDescent(), make_model(), X, Y, [1.0, 1e6], loss=MSE)
    theta = na.coefficient_matrix(na.GradientDescent(), make_model(), X)
    initial = na.predict_dynamics(ng.Exact(), make_model(), X, Y, 1.0, 0).outputs_train[0]
    wanted = expm(-theta) @ (initial - Y).reshape(-1)
    np.testing.assert_allclose(found.outputs_train[0] - Y, wanted.reshape(Y.shape), atol=1e-6)
    np.testing.assert_allclose(found.outputs_train[1], Y, atol=1e-7)
    monkeypatch.setattr(flow, "_MAX_STEPS", 10)
    with pytest.raises(RuntimeError, match=r"t = 1e\+06 could not be solved: it reached 10 steps"):
        predict_flow(na.GradientDescent(), make_model(), X, Y, [1.0, 1e6], loss=MSE)


def test_bad_arguments():
    model = make_model()

    def call(structure=ng.Exact(), y=Y, times=(1.0,), damping=0.0, **settings):  # noqa: B008
        return predict_flow(structure, model, X, y, times, damping, **settings)

    for times in ([], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [0.0], [np.nan], 1.0):
        with pytest.raises(ValueError, match="times must"):
            call(times=times)
    with pytest.raises(ValueError, match="metric must be"):
        call(metric="final")
    with pytest.raises(TypeError, match="loss must be"):
        call(loss="cross-entropy")
    with pytest.raises(ValueError, match="rtol and atol"):
        call(rtol=0.0)
    with pytest.raises(ValueError, match="rows of probabilities"):
        call(y=Y - 0.5)
    with pytest.raises(ValueError, match="y must have shape"):
        call(y=Y[:, :2])
    with pytest.raises(ValueError, match="takes no damping"):
        call(na.GradientDescent(), damping=1.0)
    with pytest.raises(TypeError, match="structure"):
        call("exact")
    result = flow.LinearisedFlow(np.ones(1), np.ones((1, N, CLASSES)), None, Y, CE)
    with pytest.raises(ValueError, match="no test outputs"):
        result.test_losses(Y_TEST)
