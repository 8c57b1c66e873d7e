"""Exact natural gradient of diagonal networks: Kerekes et al. 2021, Appendix B.2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import expit
from natgrad_datasets.separable import planar

from natgrad_flax.linear import diagonal_network as dn
from natgrad_flax.linear import logistic, references
from natgrad_flax.linear.descent import descend

pytestmark = pytest.mark.usefixtures("x64")


def draw(num, dim, depth, seed=0):
    rng = np.random.default_rng([seed, num, dim, depth])
    x, y = rng.normal(size=(num, dim)), rng.choice([-1.0, 1.0], num)
    return x, y, 0.7 * rng.normal(size=(depth, dim))


def dense_solution(x, y, weights):
    """The least-norm solution of F J dw = grad, all layers in one vector, from the definitions."""
    depth, dim = weights.shape
    jacobian = np.hstack(
        [np.diag(np.prod(np.delete(weights, layer, axis=0), axis=0)) for layer in range(depth)]
    )
    s = x @ np.prod(weights, axis=0)
    fisher = (x.T * np.asarray(expit(s) * expit(-s))) @ x
    gradient = -x.T @ (y * np.asarray(expit(-y * s)))
    solution = np.linalg.lstsq(fisher @ jacobian, gradient, rcond=1e-12)[0]
    # the same as the Moore-Penrose natural gradient (J^T F J)^+ J^T grad
    moore_penrose = np.linalg.pinv(jacobian.T @ fisher @ jacobian, rcond=1e-12) @ (
        jacobian.T @ gradient
    )
    np.testing.assert_allclose(moore_penrose, solution, rtol=1e-5, atol=1e-6)
    return solution.reshape(depth, dim)


@given(
    shape=st.sampled_from([(3, 6), (5, 5), (9, 4)]),
    depth=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=5)
def test_joint_least_norm_solution(shape, depth, seed):  # KE-B2
    x, y, weights = draw(*shape, depth, seed)
    expected = dense_solution(x, y, weights)
    found = dn.natural_gradient(x, y, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize(("normalised", "scale"), [(False, 1), (True, 1), (True, 3)])
def test_euclidean_gradient_is_that_of_the_weights(normalised, scale):
    x, y, weights = draw(5, 4, 3)
    weights = scale * weights

    def loss(weights):
        value = logistic.loss(x, y, dn.coefficients(weights))
        return jnp.log(value) if normalised else value

    def expected(weights):
        metric = np.sum(np.asarray(dn.other_products(jnp.asarray(weights))) ** 2, axis=0)
        return jax.grad(loss)(weights) / (max(1, metric.max()) if normalised else 1)

    field = dn.gradient_field(x, y, normalised=normalised)
    np.testing.assert_allclose(field(jnp.asarray(weights)), expected(weights), rtol=1e-10)
    # networks of several depths side by side
    both = field((jnp.asarray(weights), jnp.asarray(weights[:2])))
    np.testing.assert_allclose(both[0], expected(weights), rtol=1e-10)
    np.testing.assert_allclose(both[1], expected(weights[:2]), rtol=1e-10)


def test_other_products_with_a_weight_of_zero():
    weights = jnp.asarray([[0.0, 2.0], [3.0, 5.0], [7.0, 1.0]])
    np.testing.assert_array_equal(dn.other_products(weights), [[21, 5], [0, 2], [0, 10]])
    np.testing.assert_array_equal(dn.other_products(weights[:1]), [[1, 1]])


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_scale_of_the_weights(scale):
    # beta is 0 either way; the gram matrix is of order scale^4
    x, y, weights = draw(3, 5, 3)
    weights[-1] = 0
    small = dn.natural_gradient(x, y, scale * weights)
    np.testing.assert_allclose(
        small * scale**2, dn.natural_gradient(x, y, weights), rtol=1e-9, atol=1e-12
    )


def start(dim, depth):
    """Weights away from zero in all layers but the last: beta is 0 and nothing is stiff."""
    rng = np.random.default_rng([dim, depth])
    weights = rng.choice([-1.0, 1.0], (depth, dim)) * rng.uniform(0.6, 1.2, (depth, dim))
    weights[-1] = 0
    return weights


def test_depth_changes_neither_margins_nor_many_sample_solutions():  # KE-Thm1, KE-Thm2
    for shape in ((4, 8), (12, 3)):
        x, _, _ = draw(*shape, 1)
        y = np.sign(x @ np.arange(1.0, shape[1] + 1))
        betas = []
        for depth in (1, 2, 3):
            run = descend(
                dn.natural_gradient_field(x, y),
                start(shape[1], depth),
                step_size=0.01,
                steps=200,
                integrator="rk4",
            )
            betas.append(np.asarray(dn.coefficients(run.final)))
        margins = np.array([y * (x @ beta) for beta in betas])
        np.testing.assert_allclose(margins[1:], np.tile(margins[0], (2, 1)), atol=1e-6)
        difference = np.abs(betas[1] - betas[0]).max()
        if shape[0] < shape[1]:
            np.testing.assert_allclose(margins[0], logistic.train_margins(0.0, 2.0), atol=1e-6)
            # the paper's "same optimum" is for a definite Fisher: here depth decides
            assert difference > 0.05
        else:
            assert difference < 1e-6


def angle(beta):
    return np.degrees(np.arctan2(beta[1], beta[0]))


def test_separators_in_the_plane():  # KE-Fig2: natural gradients agree across depths
    x, y = planar(0)
    angles = []
    for depth in (1, 2, 4):
        field = dn.natural_gradient_field(x, y)
        run = descend(field, start(2, depth), step_size=0.01, steps=6000)
        angles.append(angle(dn.coefficients(run.final)))
    assert np.ptp(angles) < 0.5
    assert np.abs(angles - angle(references.natural_gradient_limit(x, y))).max() < 1.5


def test_euclidean_descent_goes_to_the_max_margin_of_its_depth():  # KE-Fig2
    x, y = planar(0)
    field = dn.gradient_field(x, y, normalised=True)
    weights = (jnp.asarray([[0.01, 0.01]]), jnp.full((2, 2), 0.1), jnp.full((4, 2), 0.3))
    run = descend(field, weights, step_size=0.02, steps=20_000, record_every=10_000)
    angles = [[angle(dn.coefficients(w)) for w in recorded] for recorded in run.recorded]
    l2, l1 = (references.max_margin(x, y, depth=depth).coefficients for depth in (1, 2))
    assert abs(angles[0][-1] - angle(l2)) < 1
    assert abs(angles[1][-1] - angle(l1)) < 2.5
    # depth 4 heads for the axis, where the l_1/2 solution is
    assert angles[2][-1] < 12
    assert angles[2][-1] < angles[2][1]


def test_population_fisher():
    x, y, weights = draw(6, 4, 2)
    field = dn.natural_gradient_field(x, y, data="population")
    step = np.asarray(field(jnp.asarray(weights)))
    beta = weights[0] * weights[1]
    moved = weights[1] * step[0] + weights[0] * step[1]
    np.testing.assert_allclose(
        moved, logistic.natural_gradient(x, y, beta, data="population"), rtol=1e-9
    )
    # least norm: the step is J^T of something, w_2 : w_1 in the two layers
    np.testing.assert_allclose(step[0] * weights[0], step[1] * weights[1], rtol=1e-9)


def test_initial_weights():
    weights = dn.initial_weights(2000, 3, 0.3, jax.random.key(0))
    assert weights.shape == (3, 2000)
    assert abs(float(jnp.std(weights)) - 0.3) < 0.02
    assert abs(float(jnp.mean(weights > 0)) - 0.5) < 0.05
    zero = dn.initial_weights(5, 3, 0.3, jax.random.key(0), zero_product=True)
    assert not dn.coefficients(zero).any()
    assert dn.other_products(zero)[-1].all()


X, Y, W = draw(4, 6, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dn.natural_gradient(X, Y, W[0]), ValueError, r"\(L, D\) with D = 6"),
        (lambda: dn.natural_gradient(X, Y, W[:, :5]), ValueError, "D = 6"),
        (lambda: dn.natural_gradient(X, Y, W * 0), ValueError, "6 of 6 .* two weights of zero"),
        (lambda: dn.natural_gradient(X, Y, W * np.nan), ValueError, "NaN"),
        (lambda: dn.natural_gradient(X, Y, W.astype(int)), TypeError, "floating"),
        (lambda: dn.natural_gradient_field(X[[0, 0]], Y[:2]), ValueError, "rank 1"),
        (lambda: dn.natural_gradient_field(X, 2 * Y), ValueError, "labels"),
        (lambda: dn.natural_gradient_field(X, Y, data="all"), ValueError, "data must be"),
        (lambda: dn.gradient_field(X, Y[:2]), ValueError, "y must have shape"),
        (lambda: dn.initial_weights(0, 1, 1.0, jax.random.key(0)), ValueError, "dim"),
        (lambda: dn.initial_weights(2, 0, 1.0, jax.random.key(0)), ValueError, "depth"),
        (lambda: dn.initial_weights(2, 1, 0.0, jax.random.key(0)), ValueError, "scale"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
