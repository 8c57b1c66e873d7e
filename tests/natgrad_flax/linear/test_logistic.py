"""Exact natural gradient of logistic regression: Kerekes et al. 2021, Appendix B.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import expit

from natgrad_flax.linear import descent, logistic
from natgrad_flax.linear.descent import descend

pytestmark = pytest.mark.usefixtures("x64")


def draw(num, dim, seed=0):
    """Inputs, labels, coefficients and an invertible matrix."""
    rng = np.random.default_rng([seed, num, dim])
    y = rng.choice([-1.0, 1.0], num)
    return rng.normal(size=(num, dim)), y, rng.normal(size=dim), rng.normal(size=(dim, dim))


def dense_natural_gradient(x, y, b):
    """pinv(F) grad from the definitions, without any care for small numbers."""
    s = x @ b
    p = np.asarray(expit(s))
    gradient = -x.T @ (y * np.asarray(expit(-y * s)))
    return np.linalg.pinv((x.T * (p * (1 - p))) @ x, rcond=1e-12) @ gradient


def test_gradient_and_fisher_are_those_of_the_likelihood():  # KE-Lem1
    x, y, b, _ = draw(7, 3)
    gradient = logistic.gradient_field(x, y)(jnp.asarray(b))
    np.testing.assert_allclose(gradient, jax.grad(lambda b: logistic.loss(x, y, b))(b), rtol=1e-12)
    # the Fisher of the logits is the Hessian of the loss, whatever the labels
    expected = jax.hessian(lambda b: logistic.loss(x, y, b))(b)
    np.testing.assert_allclose(logistic.fisher(x, jnp.asarray(b)), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 9), (6, 6), (12, 5)])
def test_rank_of_the_fisher(shape):  # KE-RemRank
    x, _, b, _ = draw(*shape)
    assert np.linalg.matrix_rank(logistic.fisher(x, jnp.asarray(b))) == min(shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 5), (11, 4)])
def test_against_the_dense_pseudo_inverse(shape):
    x, y, b, _ = draw(*shape)
    found = logistic.natural_gradient(x, y, b)
    np.testing.assert_allclose(found, dense_natural_gradient(x, y, b), rtol=1e-7)


def test_float32():
    x, y, b, _ = draw(20, 4)
    found = logistic.natural_gradient(*(a.astype(np.float32) for a in (x, y, b)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, dense_natural_gradient(x, y, b), rtol=1e-4)


@given(num=st.integers(1, 6), extra=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=3)
def test_margins_are_invariant_for_few_samples(num, extra, seed):  # KE-Thm1, discrete
    x, y, b, a = draw(num, num + extra, seed)
    transformed = np.linalg.solve(a.T, b)
    for _ in range(3):
        b = b - 0.1 * logistic.natural_gradient(x, y, b)
        transformed = transformed - 0.1 * logistic.natural_gradient(x @ a.T, y, transformed)
    np.testing.assert_allclose(x @ a.T @ transformed, x @ b, rtol=1e-8, atol=1e-8)
    # the coefficients themselves are not: the theorem is about the logits
    assert np.abs(a.T @ transformed - b).max() > 1e-6


@given(dim=st.integers(1, 4), extra=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=3)
def test_coefficients_are_equivariant_for_many_samples(dim, extra, seed):  # KE-Thm2, KE-Concl
    x, y, b, a = draw(dim + extra, dim, seed)
    transformed = np.linalg.solve(a.T, b)
    for _ in range(3):
        b = b - 0.1 * logistic.natural_gradient(x, y, b)
        transformed = transformed - 0.1 * logistic.natural_gradient(x @ a.T, y, transformed)
    np.testing.assert_allclose(a.T @ transformed, b, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(x @ a.T @ transformed, x @ b, rtol=1e-8, atol=1e-8)


def test_any_full_rank_jacobian_gives_the_same_natural_gradient():  # KE-Stmt
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(4, 9))
    x, _, b, _ = draw(12, 4)
    fisher = np.asarray(logistic.fisher(x, jnp.asarray(b)))
    found = jacobian @ np.linalg.pinv(jacobian.T @ fisher @ jacobian, rcond=1e-11) @ jacobian.T
    np.testing.assert_allclose(found, np.linalg.inv(fisher), rtol=1e-10, atol=1e-10)
    # with a singular Fisher it does depend on the Jacobian
    singular = np.asarray(logistic.fisher(x[:2], jnp.asarray(b)))
    found = jacobian @ np.linalg.pinv(jacobian.T @ singular @ jacobian, rcond=1e-11) @ jacobian.T
    assert np.abs(found - np.linalg.pinv(singular, rcond=1e-11)).max() > 1e-2


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_margins_follow_the_closed_form(start):  # KE-Thm3, KE-Thm4
    x, y, b, _ = draw(6, 10)
    field = logistic.natural_gradient_field(x, y)
    run = descend(field, start * b, step_size=0.01, steps=500, record_every=100, integrator="rk4")
    times = 0.01 * run.steps[:, None]
    np.testing.assert_allclose(
        run.recorded @ (x * y[:, None]).T,
        logistic.train_margins(y * (x @ (start * b)), times),
        atol=2e-6,
    )


def test_margins_grow_with_slope_one_towards_least_squares():  # KE-Thm4, N < D
    x, y, _, _ = draw(6, 10)
    run = descend(
        logistic.natural_gradient_field(x, y),
        jnp.zeros(10),
        step_size=0.05,
        steps=1020,
        record_every=20,
    )
    margins = y * np.asarray(run.recorded[-2:] @ x.T)
    assert np.abs(margins[1] - margins[0] - 1).max() < 0.02
    interpolant = np.linalg.pinv(x) @ y
    cosine = run.final @ interpolant / np.linalg.norm(run.final) / np.linalg.norm(interpolant)
    assert cosine > 1 - 1e-12


def test_margins_of_a_network_follow_the_same_law():  # KE-Thm4, Jacobian of a nonlinear model
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2)), np.array([1.0, -1, 1])
    parameters = jnp.asarray(rng.normal(size=(4, 5)))

    def logits(w):
        return jnp.tanh(x @ w[:2] + w[2]) @ w[3]

    def natural_gradient(w):  # (J^T F J)^+ J^T grad = J^+ F^{-1} grad, J of full row rank
        jacobian = jax.jacobian(logits)(w).reshape(3, -1)
        wanted = -y * logistic.inverse_probability(y * logits(w))
        return (jnp.linalg.pinv(jacobian) @ wanted).reshape(w.shape)

    run = descend(jax.tree_util.Partial(natural_gradient), parameters, step_size=1e-3, steps=1500)
    expected = logistic.train_margins(y * logits(parameters), 1.5)
    np.testing.assert_allclose(y * logits(run.final), expected, atol=1e-2)


def test_inside_jit():
    for shape in ((3, 6), (7, 2)):
        x, y, b, _ = draw(*shape)
        found = jax.jit(logistic.natural_gradient)(x, y, b)
        np.testing.assert_allclose(found, logistic.natural_gradient(x, y, b), rtol=1e-9)


def test_closed_form_of_the_margins():
    np.testing.assert_array_equal(logistic.train_margins(jnp.asarray([-3.0, 2.0]), 0.0), [-3, 2])
    np.testing.assert_allclose(logistic.train_margins(0.0, 1.5), np.log(2 * np.exp(1.5) - 1))
    # where exp would overflow
    np.testing.assert_allclose(logistic.train_margins(0.0, 2000.0), 2000 + np.log(2))


def test_the_gradient_decays_at_rate_one():  # KE-NGF-limit: many samples, Newton's flow
    x, _, b, _ = draw(14, 3)
    y = np.sign(x @ b)
    run = descend(
        logistic.natural_gradient_field(x, y),
        jnp.zeros(3),
        step_size=0.02,
        steps=150,
        integrator="rk4",
    )
    gradient = logistic.gradient_field(x, y)
    np.testing.assert_allclose(gradient(run.final), np.exp(-3) * gradient(jnp.zeros(3)), rtol=1e-6)


def test_natural_gradient_far_along_the_run():  # KE-B1: both sides over exp(-u_min)
    x, _, b, _ = draw(14, 3)
    y = np.sign(x @ b)
    field = logistic.natural_gradient_field(x, y)
    # with equal margins the problem is the same at every scale; at 2000 exp(-u) is zero
    equal = logistic.TrainNaturalGradient(jnp.ones((5, 1)), None)
    np.testing.assert_allclose(equal(jnp.asarray([2000.0])), [-1.0], rtol=1e-12)
    assert np.isfinite(field(jnp.asarray(4000 * b))).all()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_population_fisher(norm, normalised):
    x, y, b, _ = draw(5, 3)
    b = norm * b / np.linalg.norm(b)
    # E phi'(s) x x^T is an integral over the plane of beta and one orthogonal direction
    nodes, weights = np.polynomial.hermite_e.hermegauss(180)
    variance = np.asarray(expit(norm * nodes) * expit(-norm * nodes)) * weights / weights.sum()
    unit = b / norm if norm else b
    across, along = variance.sum(), (variance * nodes**2).sum()
    fisher = 5 * (across * np.eye(3) + (along - across) * np.outer(unit, unit))
    gradient = jax.grad(lambda b: logistic.loss(x, y, b))(b)
    expected = np.linalg.solve(fisher, gradient)
    if normalised:
        expected = expected / logistic.loss(x, y, b)
    field = logistic.natural_gradient_field(x, y, data="population", normalised=normalised)
    np.testing.assert_allclose(field(jnp.asarray(b)), expected, rtol=1e-7)


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 50.0, 1e5])
def test_population_moments(norm):
    across, along = logistic.population_moments(jnp.asarray(norm))
    # brute force: a fine grid over the width of the integrand
    z, spacing = np.linspace(-12, 12, 4_000_001, retstep=True)
    with np.errstate(over="ignore"):
        variance = 1 / (2 + np.exp(norm * z) + np.exp(-norm * z))
    density = variance * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * spacing
    np.testing.assert_allclose(across, density.sum(), rtol=1e-8)
    np.testing.assert_allclose(along, (density * z**2).sum(), rtol=1e-8)


def test_normalised_gradient():
    x, y, b, _ = draw(8, 3)
    plain, scaled = (logistic.gradient_field(x, y, normalised=n) for n in (False, True))
    expected = plain(jnp.asarray(b)) / logistic.loss(x, y, b)
    np.testing.assert_allclose(scaled(jnp.asarray(b)), expected, rtol=1e-12)
    # far out the sample of smallest margin is all that is left: gradient over loss is -y x of it
    y = np.sign(x @ b)
    nearest = np.argmin(y * (x @ b))
    far = logistic.gradient_field(x, y, normalised=True)(jnp.asarray(1e6 * b))
    np.testing.assert_allclose(far, -y[nearest] * x[nearest], rtol=1e-9)


def test_descend_records_and_integrates():
    decay = jax.tree_util.Partial(lambda p: p)
    run = descend(decay, (jnp.ones(2),), step_size=0.1, steps=6, record_every=3)
    np.testing.assert_array_equal(run.steps, [0, 3, 6])
    np.testing.assert_allclose(run.recorded[0][:, 0], 0.9 ** np.array([0, 3, 6]))
    np.testing.assert_array_equal(run.recorded[0][-1], run.final[0])
    flow = descend(decay, (jnp.ones(2),), step_size=0.1, steps=6, integrator="rk4")
    np.testing.assert_allclose(flow.final[0], np.exp(-0.6), rtol=1e-6)


X, Y, B, _ = draw(4, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: logistic.gradient_field(X[0], Y), ValueError, r"\(N, features\)"),
        (lambda: logistic.gradient_field(X[:, :, None], Y), ValueError, r"shape \(N, D\)"),
        (lambda: logistic.gradient_field(X, Y[:3]), ValueError, r"\(N,\) = \(4,\)"),
        (lambda: logistic.gradient_field(X, Y > 0), ValueError, "labels must be -1 or \\+1"),
        (lambda: logistic.gradient_field(X.astype(int), Y), TypeError, "floating"),
        (lambda: logistic.gradient_field(X * np.nan, Y), ValueError, "NaN"),
        (lambda: logistic.natural_gradient(X, Y, B[:5]), ValueError, r"\(D,\) = \(6,\)"),
        (lambda: logistic.natural_gradient(X, Y, B * np.inf), ValueError, "6 NaN or infinite"),
        (lambda: logistic.natural_gradient_field(X, Y, data="test"), ValueError, '"population"'),
        (
            lambda: logistic.natural_gradient_field(X, Y, normalised=True),
            ValueError,
            "for the population Fisher",
        ),
        (
            lambda: logistic.natural_gradient_field(X[[0, 1, 1]], Y[[0, 1, 1]]),
            ValueError,
            "rank 2 in float64, below min",
        ),
        (
            lambda: logistic.natural_gradient_field(X[:, [0, 1, 0]], Y),
            ValueError,
            "rank 2 in float64, below min",
        ),
        (
            lambda: descend(logistic.gradient_field(X, Y), B, step_size=0.1, steps=0),
            ValueError,
            "steps must be an integer",
        ),
        (
            lambda: descend(
                logistic.gradient_field(X, Y), B, step_size=0.1, steps=5, record_every=2
            ),
            ValueError,
            "record_every=2 must divide steps=5",
        ),
        (
            lambda: descend(logistic.gradient_field(X, Y), B, step_size=-1.0, steps=5),
            ValueError,
            "positive",
        ),
        (
            lambda: descend(
                logistic.gradient_field(X, Y), B, step_size=0.1, steps=5, integrator="rk"
            ),
            ValueError,
            '"euler" or "rk4"',
        ),
        (
            lambda: descend(
                logistic.gradient_field(X, Y),
                jnp.zeros(10**5),
                step_size=0.1,
                steps=10**7,
                record_every=1,
            ),
            ValueError,
            "record of the descent .* needs .* GiB .* record fewer steps",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_matrices_beyond_memory(monkeypatch):
    monkeypatch.setattr(descent, "available_memory", lambda: 2 * 8 * 15)
    with pytest.raises(ValueError, match=r"the Gram matrix of the inputs \(4 x 4\) needs"):
        logistic.natural_gradient_field(X, Y)
    with pytest.raises(ValueError, match=r"the Fisher \(6 x 6\) needs"):
        logistic.fisher(X, jnp.asarray(B))
