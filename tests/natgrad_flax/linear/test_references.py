"""The solutions that descents of linear models converge to (Kerekes et al. 2021)."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natgrad_datasets.low_rank import low_rank_matrix, observed_mask
from natgrad_datasets.separable import planar, sparse_classification
from scipy.optimize import linprog

from natgrad_flax.linear import logistic
from natgrad_flax.linear import references as rf
from natgrad_flax.linear.descent import descend

pytestmark = pytest.mark.usefixtures("x64")


def draw(num, dim, seed=0):
    """Separable data."""
    rng = np.random.default_rng([seed, num, dim])
    x, teacher = rng.normal(size=(num, dim)), rng.normal(size=dim)
    return x, np.sign(x @ teacher)


def angle(b):
    return np.degrees(np.arctan2(b[1], b[0]))


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@given(shape=st.sampled_from([(3, 5), (8, 3), (20, 4)]), seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_separation_of_separable_data(shape, seed):
    x, y = draw(*shape, seed)
    found = rf.separation(x, y)
    assert found.separable
    assert np.abs(found.direction).max() <= 1 + 1e-9
    np.testing.assert_allclose(np.min(y * (x @ found.direction)), found.margin, atol=1e-8)
    # the dual proves that no direction does better
    assert np.all(found.multipliers >= 0)
    np.testing.assert_allclose(found.multipliers.sum(), 1, atol=1e-9)
    dual = np.abs((found.multipliers * y) @ x).sum()
    np.testing.assert_allclose(dual, found.margin, atol=1e-8)


def test_certificate_of_data_that_are_not_separable():
    x, _ = draw(20, 3)
    y = np.resize([1.0, -1.0], 20)
    found = rf.separation(x, y)
    assert not found.separable
    np.testing.assert_allclose(found.multipliers.sum(), 1, atol=1e-9)
    np.testing.assert_allclose((found.multipliers * y) @ x, 0, atol=1e-9)


@given(shape=st.sampled_from([(1, 1), (4, 9), (15, 4)]), seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_l2_max_margin_satisfies_its_conditions(shape, seed):
    x, y = draw(*shape, seed)
    found = rf.max_margin(x, y, depth=1)
    b, margins = found.coefficients, y * (x @ found.coefficients)
    np.testing.assert_allclose(margins.min(), 1, rtol=1e-9)
    np.testing.assert_allclose(found.objective, b @ b)
    # b is a non-negative combination of the support vectors: a proof, the problem being convex
    support = margins < 1 + 1e-7
    multipliers = np.linalg.lstsq((y[:, None] * x)[support].T, b, rcond=None)[0]
    np.testing.assert_allclose((y[:, None] * x)[support].T @ multipliers, b, atol=1e-7)
    if support.sum() <= shape[1]:
        assert np.all(multipliers > -1e-7)


@pytest.mark.parametrize("shape", [(7, 12), (12, 4)])
def test_l1_max_margin_against_its_dual(shape):
    x, y = draw(*shape)
    z = y[:, None] * x
    found = rf.max_margin(x, y, depth=2)
    assert np.min(z @ found.coefficients) > 1 - 1e-7
    # max sum of multipliers >= 0 with |z^T multipliers|_inf <= 1
    dual = linprog(-np.ones(len(z)), A_ub=np.vstack([z.T, -z.T]), b_ub=np.ones(2 * shape[1]))
    np.testing.assert_allclose(found.objective, -dual.fun, rtol=1e-7)
    np.testing.assert_allclose(found.objective, np.abs(found.coefficients).sum())


def test_planar_separators():  # KE-Fig2
    x, y = planar(3)
    np.testing.assert_allclose(angle(rf.max_margin(x, y).coefficients), 24.62, atol=0.01)
    np.testing.assert_allclose(angle(rf.natural_gradient_limit(x, y)), 19.65, atol=0.01)
    half = rf.max_margin(x, y, depth=4)
    assert half.is_global
    np.testing.assert_allclose(angle(half.coefficients), 0, atol=1e-6)
    np.testing.assert_allclose(half.objective, 1.054, atol=1e-3)


def test_reweighting_reaches_the_global_minimum_of_the_search(monkeypatch):
    x, y = draw(6, 3, 2)
    exact = rf.max_margin(x, y, depth=3)
    monkeypatch.setattr(rf, "SYSTEMS", 0)
    found = rf.max_margin(x, y, depth=3)
    assert exact.is_global
    assert not found.is_global
    np.testing.assert_allclose(found.objective, exact.objective, rtol=1e-6)


def test_transformed_data_move_the_max_margin():  # KE-AppD, KE-Remark
    a, x, y = np.array([[1.0, 2], [-1, 0]]), np.array([[2.0, -3]]), np.ones(1)
    plain = rf.max_margin(x, y).coefficients
    transformed = rf.max_margin(x @ a.T, y).coefficients
    # the paper prints (0, -1/3) and (-1/4, 0), which are the l_1 solutions
    np.testing.assert_allclose(plain, np.array([2, -3]) / 13)
    np.testing.assert_allclose(transformed, np.array([-4, -2]) / 20)
    np.testing.assert_allclose(a.T @ transformed, [-0.1, -0.4])
    assert np.abs(a.T @ transformed - plain).max() > 0.1
    l1 = [rf.max_margin(data, y, depth=2).coefficients for data in (x, x @ a.T)]
    np.testing.assert_allclose(l1, [[0, -1 / 3], [-1 / 4, 0]], atol=1e-9)
    assert np.abs(a.T @ l1[1] - l1[0]).max() > 0.1


@pytest.mark.parametrize("shape", [(4, 9), (6, 6), (15, 4)])
def test_least_squares_invariance(shape):  # KE-AppG
    x, y = draw(*shape)
    a = np.random.default_rng(1).normal(size=(shape[1],) * 2)
    b, transformed = rf.least_squares(x, y), rf.least_squares(x @ a.T, y)
    np.testing.assert_allclose(x @ a.T @ transformed, x @ b, atol=1e-9)
    if shape[0] <= shape[1]:
        np.testing.assert_allclose(x @ b, y, atol=1e-9)
        np.testing.assert_allclose(b, np.linalg.pinv(x) @ y, atol=1e-9)
    else:
        np.testing.assert_allclose(a.T @ transformed, b, atol=1e-9)


def test_natural_gradient_flow_converges_to_the_program():  # KE-NGF-limit
    x, y = draw(30, 4)
    field = logistic.natural_gradient_field(x, y)
    for start in (np.zeros(4), np.array([0.5, -0.2, 0.3, 0.1])):
        limit = rf.natural_gradient_limit(x, y, start)
        np.testing.assert_allclose(np.min(y * (x @ limit)), 1, rtol=1e-6)
        run = descend(field, start, step_size=0.05, steps=1200, integrator="rk4")
        assert cosine(np.asarray(run.final), limit) > 0.9999
    # with few samples it is the interpolant, whatever the start
    x, y = draw(3, 5)
    limit = rf.natural_gradient_limit(x, y, np.ones(5))
    np.testing.assert_allclose(limit, np.linalg.pinv(x) @ y, rtol=1e-9)


def test_interpolants_that_are_max_margin_solutions():  # KE-SVP
    proliferation = []
    for seed in range(4):
        data = sparse_classification(12, 1, 600, 20, seed)
        proliferation.append(rf.all_support_vectors(data.x_train, data.y_train))
        if proliferation[-1]:
            margin = rf.max_margin(data.x_train, data.y_train).coefficients
            np.testing.assert_allclose(
                rf.least_squares(data.x_train, data.y_train), margin, atol=1e-9
            )
    assert sum(proliferation) >= 3
    data = sparse_classification(100, 1, 200, 20, 0)
    assert not rf.all_support_vectors(data.x_train, data.y_train)
    different = rf.max_margin(data.x_train, data.y_train).coefficients
    assert cosine(different, rf.least_squares(data.x_train, data.y_train)) < 0.9999


@pytest.mark.parametrize(
    ("num", "expected"), [(100, 0.58), (250, 0.62), (500, 0.66), (900, 0.62), (990, 0.54)]
)
def test_accuracy_of_the_interpolant(num, expected):  # KE-Fig4, the theory curve
    found = rf.interpolant_accuracy(num, 1000)
    np.testing.assert_allclose(found, expected, atol=0.006)


def test_theory_curve_against_samples():  # KE-Fig4
    data = sparse_classification(200, 1, 400, 8, seed=0)
    accuracy = rf.gaussian_accuracy(rf.least_squares(data.x_train, data.y_train), data.teacher)
    assert abs(accuracy - rf.interpolant_accuracy(200, 400)) < 0.03


def test_accuracy_for_gaussian_inputs():
    data = sparse_classification(1, 40_000, 3, 1, seed=0)
    b = np.array([1.0, 2.0, -0.5])
    sampled = np.mean(np.sign(data.x_test @ b) == data.y_test)
    # five standard errors
    assert abs(rf.gaussian_accuracy(b, data.teacher) - sampled) < 5 * 0.5 / 200
    assert rf.gaussian_accuracy(-data.teacher, data.teacher) == 0


def test_min_nuclear_norm_recovers_low_rank():  # KE-Fig5
    target, mask = low_rank_matrix(15, 1, seed=0), observed_mask((15, 15), 150, seed=0)
    found, gap = rf.min_nuclear_norm(target, mask)
    np.testing.assert_array_equal(found[mask], target[mask])
    assert gap <= 1e-4
    assert np.abs(found - target).max() < 1e-2
    norm = np.linalg.norm(target, "nuc")
    assert norm * (1 - 1e-4) <= np.linalg.norm(found, "nuc") <= norm * (1 + 1e-4)


def test_min_nuclear_norm_in_closed_form():
    # of [[a, b], [c, ?]] with b c <> 0: the rank-one completion b c / a where |b c / a| is at most
    # |a|, as here
    target, mask = np.array([[2.0, 1], [1, 0]]), np.array([[1, 1], [1, 0]])
    found, _ = rf.min_nuclear_norm(target, mask, tolerance=1e-8)
    np.testing.assert_allclose(found[1, 1], 0.5, atol=1e-4)
    np.testing.assert_array_equal(rf.min_nuclear_norm(0 * target, mask)[0], np.zeros((2, 2)))


X, Y = draw(6, 3)
UNSEPARABLE = np.vstack([X, -X]), np.concatenate([Y, Y])
M, MASK = low_rank_matrix(5, 1, 0), observed_mask((5, 5), 10, 0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_max_margin_of_data_that_are_not_separable(depth):
    with pytest.raises(ValueError, match=r"not linearly separable: non-negative weights of sum 1"):
        rf.max_margin(*UNSEPARABLE, depth=depth)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rf.natural_gradient_limit(*UNSEPARABLE),
            ValueError,
            r"not linearly separable: .* on \d+ samples \(\d+, .* zero",
        ),
        (lambda: rf.check_separable(*UNSEPARABLE), ValueError, "not linearly separable"),
        (lambda: rf.separation(X, 0.5 * Y), ValueError, "labels"),
        (lambda: rf.separation(X[0], Y), ValueError, "features"),
        (lambda: rf.max_margin(X, Y, depth=0), ValueError, "depth must be an integer"),
        (lambda: rf.max_margin(X, Y, seed=-1), ValueError, "seed"),
        (lambda: rf.least_squares(X[:, [0, 0]], Y), ValueError, "rank 1 in float64"),
        (lambda: rf.natural_gradient_limit(X[:, [0, 0]], Y), ValueError, "rank 1"),
        (lambda: rf.natural_gradient_limit(X, Y, [0.0]), ValueError, r"shape \(D,\) = \(3,\)"),
        (lambda: rf.natural_gradient_limit(X, Y, [np.nan] * 3), ValueError, "start must be"),
        (lambda: rf.all_support_vectors(X, Y), ValueError, "needs N <= D, got N = 6"),
        (lambda: rf.gaussian_accuracy(Y[:3], 0 * Y[:3]), ValueError, "norm above 0"),
        (lambda: rf.gaussian_accuracy(Y[:3], Y[:4]), ValueError, "one size"),
        (lambda: rf.interpolant_accuracy(5, 5), ValueError, "dim must be an integer of at least 6"),
        (lambda: rf.min_nuclear_norm(M, MASK & False), ValueError, "observes no entry"),
        (lambda: rf.min_nuclear_norm(M, MASK, tolerance=0.0), ValueError, "tolerance"),
        (lambda: rf.min_nuclear_norm(M, MASK, max_steps=0), ValueError, "max_steps"),
        (
            lambda: rf.min_nuclear_norm(M, MASK, max_steps=1, tolerance=1e-12),
            RuntimeError,
            "within .* of its minimum after 1 steps",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_data_beyond_memory(monkeypatch):
    monkeypatch.setattr("natgrad_flax.linear.descent.available_memory", lambda: 8)
    with pytest.raises(ValueError, match=r"constraint matrix \(6 x 3\) needs"):
        rf.max_margin(X, Y)
    with pytest.raises(ValueError, match=r"the matrix \(5 x 5\) needs"):
        rf.min_nuclear_norm(M, MASK)


def test_jax_arrays_are_taken():
    np.testing.assert_allclose(
        rf.least_squares(jnp.asarray(X), jnp.asarray(Y)), rf.least_squares(X, Y)
    )
