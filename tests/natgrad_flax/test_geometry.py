"""The geometry of overparametrised models: van Oostrum, Mueller & Ay (2022)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad_flax import geometry

pytestmark = pytest.mark.usefixtures("x64")


def random_problem(seed, params=5, ambient=4, rank=3):
    """A map of rank ``rank`` with a curved image, a metric and an objective."""
    rng = np.random.default_rng(seed)
    first = jnp.asarray(rng.standard_normal((rank, params)) / 2)
    second = jnp.asarray(rng.standard_normal((ambient, rank)))
    root = jnp.asarray(rng.standard_normal((ambient, ambient)))
    weight = jnp.asarray(rng.standard_normal(ambient))

    def phi(xi):
        return second @ jnp.sin(first @ xi)

    def metric(z):
        return root @ root.T + jnp.eye(ambient) * (1 + z @ z)

    def objective(z):
        return weight @ z + jnp.sum(jnp.cos(z))

    return phi, metric, objective, jnp.asarray(rng.standard_normal(params) / 2), rng


def represent(objective, metric=geometry.euclidean, inverse=None):
    return lambda phi, xi: geometry.natural_parameter_gradient(phi, objective, xi, metric, inverse)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_generalised_inverse_gives_the_projected_gradient(seed):
    phi, metric, objective, xi, rng = random_problem(seed)
    free = jnp.asarray(rng.standard_normal((5, 5)))
    gram = geometry.gram_matrix(phi, xi, metric)
    inverse = geometry.any_generalised_inverse(gram, free)
    np.testing.assert_allclose(gram @ inverse @ gram, gram, atol=1e-9 * jnp.abs(gram).max())
    assert jnp.abs(inverse - inverse.T).max() > 1e-3
    projection = geometry.span_projection(phi, xi, metric)
    expected = projection @ geometry.ambient_gradient(objective, phi(xi), metric)
    for chosen in (None, lambda gram: geometry.any_generalised_inverse(gram, free)):
        vector = geometry.natural_parameter_gradient(phi, objective, xi, metric, chosen)
        moved = geometry.push_forward(phi, xi, vector)
        np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-10)


def test_the_projection_is_one():
    phi, metric, _, xi, _ = random_problem(1)
    projection, matrix = geometry.span_projection(phi, xi, metric), metric(phi(xi))
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-12)
    np.testing.assert_allclose(matrix @ projection, (matrix @ projection).T, atol=1e-11)
    jacobian = jax.jacfwd(phi)(xi)
    np.testing.assert_allclose(projection @ jacobian, jacobian, atol=1e-12)
    assert jnp.trace(projection) == pytest.approx(3)


def test_moore_penrose_is_the_shortest_solution():
    phi, metric, objective, xi, _ = random_problem(2)
    vector = geometry.natural_parameter_gradient(phi, objective, xi, metric)
    gram = geometry.gram_matrix(phi, xi, metric)
    slope = jax.grad(lambda here: objective(phi(here)))(xi)
    np.testing.assert_allclose(vector, jnp.linalg.pinv(gram, rtol=1e-10) @ slope, atol=1e-10)


def test_a_proper_point_has_the_gradient_of_the_model():
    phi, metric, objective, xi, _ = random_problem(3, params=6, rank=4)
    assert geometry.is_proper(phi, xi, 4)
    assert not geometry.is_proper(phi, xi, 5)
    vector = geometry.natural_parameter_gradient(phi, objective, xi, metric)
    np.testing.assert_allclose(
        geometry.push_forward(phi, xi, vector),
        geometry.ambient_gradient(objective, phi(xi), metric),
        atol=1e-10,
    )


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
def test_theorem_2(seed, rank):
    phi, metric, objective, theta, rng = random_problem(seed, rank=rank)
    mix = jnp.asarray(rng.standard_normal((5, 5)) + 3 * np.eye(5))

    def change(here):
        return mix @ here + jnp.tanh(here) / 5

    natural = represent(objective, metric)
    assert geometry.model_violation(natural, phi, change, theta) < 1e-10
    # on the parameter space they differ, by what phi does not see
    assert geometry.parameter_violation(natural, phi, change, theta) > 1e-4
    mine = natural(lambda here: phi(change(here)), theta)
    gap = geometry.push_forward(change, theta, mine) - natural(phi, change(theta))
    np.testing.assert_allclose(
        geometry.push_forward(phi, change(theta), gap), jnp.zeros(4), atol=1e-10
    )

    def plain(phi, xi):
        return jax.grad(lambda here: objective(phi(here)))(xi)

    assert geometry.model_violation(plain, phi, change, theta) > 1e-4


def test_an_immersion_has_no_violation_on_the_parameters():
    phi, metric, objective, theta, rng = random_problem(4, params=3, rank=3)
    mix = jnp.asarray(rng.standard_normal((3, 3)))

    def change(here):
        return mix @ jnp.sinh(here)

    natural = represent(objective, metric)
    assert geometry.parameter_violation(natural, phi, change, theta) < 1e-10


def test_y_theta_is_the_shortest_in_the_norm_of_f():
    phi, metric, objective, theta, rng = random_problem(5, params=4, rank=2)
    mix = jnp.asarray(rng.standard_normal((4, 4)))
    natural = represent(objective, metric)
    moved = mix @ natural(lambda here: phi(mix @ here), theta)
    xi = mix @ theta
    gram = geometry.gram_matrix(phi, xi, metric)
    slope = jax.grad(lambda here: objective(phi(here)))(xi)
    # van Oostrum et al. (2022), Eq. 31, with F the transposed derivative of f
    inner = jnp.linalg.pinv(mix.T @ gram @ mix, rtol=1e-10)
    np.testing.assert_allclose(moved, mix @ inner @ mix.T @ slope, atol=1e-9)
    np.testing.assert_allclose(gram @ moved, slope, atol=1e-10)


def test_example_2_where_the_paper_prints_another_domain():
    def phi(xi):
        return jnp.stack([jnp.sin(2 * xi[0]), jnp.sin(xi[0])])

    def change(theta):
        return jnp.pi - theta

    def psi(theta):
        return phi(change(theta))

    natural = represent(lambda z: z[0] + 3 * z[1])
    zero = jnp.zeros(1)
    here = geometry.push_forward(phi, zero, natural(phi, zero))
    there = geometry.push_forward(psi, zero, natural(psi, zero))
    np.testing.assert_allclose(here, [2, 1], atol=1e-12)
    np.testing.assert_allclose(there, [-0.4, 0.2], atol=1e-12)
    assert geometry.gram_matrix(phi, zero)[0, 0] == pytest.approx(5)
    gap = geometry.parametrisation_dependence(natural, phi, zero, psi, zero)
    assert gap == pytest.approx(np.hypot(2.4, 0.8))
    assert geometry.model_violation(natural, phi, change, zero) < 1e-12
    with pytest.raises(ValueError, match="different points"):
        geometry.parametrisation_dependence(natural, phi, zero, psi, zero + jnp.pi / 2)


def test_example_of_appendix_3():
    def phi(xi):
        return jnp.stack([xi[0] + xi[1], jnp.zeros(())])

    def change(theta):
        return jnp.stack([2 * theta[0], theta[1]])

    def psi(theta):
        return phi(change(theta))

    natural, theta, xi = represent(lambda z: z[0] ** 2), jnp.ones(2), jnp.asarray([2.0, 1.0])
    np.testing.assert_allclose(geometry.gram_matrix(phi, xi), [[1, 1], [1, 1]], atol=1e-12)
    np.testing.assert_allclose(geometry.gram_matrix(psi, theta), [[4, 2], [2, 1]], atol=1e-12)
    np.testing.assert_allclose(natural(phi, xi), [3, 3], atol=1e-12)
    np.testing.assert_allclose(change(natural(psi, theta)), [4.8, 1.2], atol=1e-12)
    for point, parameters in ((phi, xi), (psi, theta)):
        moved = geometry.push_forward(point, parameters, natural(point, parameters))
        np.testing.assert_allclose(moved, [6, 0], atol=1e-12)
    expected = np.hypot(1.8, 1.8)
    assert geometry.parameter_violation(natural, phi, change, theta) == pytest.approx(expected)


def test_a_homeomorphism_is_not_enough():
    def line(xi):
        return jnp.concatenate([xi, 2 * xi])

    def cube(theta):
        return theta**3 + 1.5

    natural = represent(lambda z: z[0] + z[1] ** 2)
    zero = jnp.zeros(1)
    assert geometry.coordinate_rank(lambda theta: line(cube(theta)), zero) == 0
    flat = geometry.push_forward(
        lambda theta: line(cube(theta)), zero, natural(lambda theta: line(cube(theta)), zero)
    )
    np.testing.assert_array_equal(flat, jnp.zeros(2))
    assert jnp.linalg.norm(natural(line, cube(zero))) > 1
    with pytest.raises(ValueError, match="no diffeomorphism"):
        geometry.model_violation(natural, line, cube, zero)


def test_non_proper_points_are_rare():
    def phi(t):
        return t**3

    assert geometry.coordinate_rank(phi, jnp.zeros(1)) == 0
    points = np.random.default_rng(0).uniform(-1, 1, (200, 1))
    assert all(geometry.is_proper(phi, jnp.asarray(point), 1) for point in points)
    with pytest.raises(ValueError, match="at least that dimension"):
        geometry.is_proper(phi, jnp.ones(1), 0)


def test_finite_steps_differ_in_second_order():
    phi, metric, objective, theta, rng = random_problem(6)
    mix = jnp.asarray(rng.standard_normal((5, 5)) + 2 * np.eye(5))

    def change(here):
        return mix @ jnp.sinh(here)

    gap = partial(geometry.finite_step_gap, represent(objective, metric), phi, change, theta)
    assert 3.5 < gap(1e-3) / gap(5e-4) < 4.5


def gaussian(rng, size):
    root = rng.standard_normal((size, size))
    return jnp.concatenate(
        [jnp.asarray(rng.standard_normal(size)), jnp.asarray(root @ root.T + np.eye(size)).ravel()]
    )


def symmetric_change(rng, size):
    change = rng.standard_normal((size, size))
    return jnp.concatenate([jnp.asarray(rng.standard_normal(size)), jnp.ravel(change + change.T)])


def test_fisher_rao_is_the_second_order_of_the_divergence():
    rng, size, t = np.random.default_rng(7), 3, 1e-4
    point, change = gaussian(rng, size), symmetric_change(rng, size)

    def divergence(t):
        (mean, sigma), (mean_t, sigma_t) = (
            np.split(np.asarray(other), [size]) for other in (point, point + t * change)
        )
        sigma, sigma_t = sigma.reshape(size, size), sigma_t.reshape(size, size)
        inverse, gap = np.linalg.inv(sigma_t), mean_t - mean
        log = np.linalg.slogdet(sigma_t)[1] - np.linalg.slogdet(sigma)[1]
        return (np.trace(inverse @ sigma) - size + gap @ inverse @ gap + log) / 2

    measured = (divergence(t) + divergence(-t)) / t**2
    expected = change @ geometry.fisher_rao_gaussian(point) @ change
    assert measured == pytest.approx(float(expected), rel=1e-4)


def test_wasserstein_is_the_second_order_of_the_distance():
    rng, size, t = np.random.default_rng(8), 3, 1e-4
    point, change = gaussian(rng, size), symmetric_change(rng, size)

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values)) @ vectors.T

    def squared(other):
        mean, sigma = np.asarray(point[:size]), np.asarray(point[size:]).reshape(size, size)
        sigma_t = np.asarray(other[size:]).reshape(size, size)
        half = root(sigma)
        bures = np.trace(sigma + sigma_t - 2 * root(half @ sigma_t @ half))
        return np.sum((np.asarray(other[:size]) - mean) ** 2) + bures

    measured = (squared(point + t * change) + squared(point - t * change)) / (2 * t**2)
    expected = change @ geometry.wasserstein_gaussian(point) @ change
    assert measured == pytest.approx(float(expected), rel=1e-4)


def test_metrics_give_different_natural_gradients_of_one_variance():
    def phi(xi):
        return jnp.stack([xi[0], xi[1] ** 2])

    def objective(z):
        return z[0] + z[1]

    xi = jnp.asarray([0.3, 2.0])
    rao = geometry.natural_parameter_gradient(phi, objective, xi, geometry.fisher_rao_gaussian)
    transport = geometry.natural_parameter_gradient(
        phi, objective, xi, geometry.wasserstein_gaussian
    )
    # sigma^2 = 4: Fisher-Rao has diag(1, 2) / sigma^2 in (mu, sigma), Wasserstein the identity
    np.testing.assert_allclose(rao, [4.0, 4.0 * 4 / 2], atol=1e-12)
    np.testing.assert_allclose(transport, [1.0, 4.0], atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda z: jnp.diag(jnp.asarray([1.0, -2.0])), "not positive definite: its smallest .* -2"),
        (lambda z: jnp.asarray([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (lambda z: jnp.eye(3), r"must be \(2, 2\)"),
    ],
)
def test_a_bad_metric_is_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        geometry.gram_matrix(lambda xi: 2 * xi, jnp.ones(2), metric)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="parameters must be a vector"):
        geometry.gram_matrix(lambda xi: xi, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="must return a vector"):
        geometry.gram_matrix(jnp.sum, jnp.ones(2))
    with pytest.raises(ValueError, match="transposed shape"):
        geometry.any_generalised_inverse(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="n \\+ n\\^2 numbers, got 5"):
        geometry.fisher_rao_gaussian(jnp.ones(5))
    with pytest.raises(ValueError, match="not positive definite"):
        geometry.ambient_gradient(jnp.sum, jnp.ones(2), lambda z: jnp.zeros((2, 2)))
