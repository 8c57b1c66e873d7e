"""Exact natural gradient of matrix factorisation: Kerekes et al. 2021, Appendix B.4, Figs. 3, 5."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natgrad_datasets.low_rank import low_rank_matrix, observed_mask

from natgrad_flax.linear import completion
from natgrad_flax.linear import descent as descent_module
from natgrad_flax.linear import matrix_factorization as mf
from natgrad_flax.linear.descent import descend

pytestmark = pytest.mark.usefixtures("x64")

SIZE = 8
TARGET, MASK = low_rank_matrix(SIZE, 2, seed=0), observed_mask((SIZE, SIZE), 30, seed=1)


def draw(sizes, seed=0):
    """Factors of the shapes (sizes[0], sizes[1]), (sizes[1], sizes[2]) ..."""
    rng = np.random.default_rng([seed, *sizes])
    return tuple(rng.normal(size=pair) / np.sqrt(pair[0]) for pair in pairwise(sizes))


def jacobian(factors):
    """d vec(beta) / d (vec W_1 ... vec W_L), by differentiation."""
    blocks = jax.jacobian(lambda *f: mf.product(f), argnums=tuple(range(len(factors))))(*factors)
    size = mf.product(factors).size
    return np.hstack([np.asarray(b).reshape(size, -1) for b in blocks])


def flat(factors):
    return np.concatenate([np.ravel(f) for f in factors])


def test_euclidean_gradient():
    factors = draw([5, 4, 6, 3])
    target, mask = np.ones((5, 3)), observed_mask((5, 3), 7, seed=0)

    def loss(factors):
        return jnp.sum(jnp.where(mask, mf.product(factors) - target, 0) ** 2) / 2

    found = mf.gradient_field(target, mask)(factors)
    np.testing.assert_allclose(flat(found), flat(jax.grad(loss)(factors)), rtol=1e-10)


def test_fisher_of_gaussian_noise():  # KE-Lem2: I / sigma^2 with sigma the standard deviation
    def negative_log_likelihood(beta):
        return jnp.sum((jnp.ones(6) - beta) ** 2) / (2 * 0.3**2)

    hessian = jax.hessian(negative_log_likelihood)(jnp.zeros(6))
    np.testing.assert_allclose(hessian, np.eye(6) / 0.09, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3])
def test_float32_and_jit(depth):
    factors = draw([SIZE] * (depth + 1))
    single = tuple(w.astype(np.float32) for w in factors)
    target = TARGET.astype(np.float32)
    found = jax.jit(lambda f: mf.natural_gradient(target, MASK, f))(single)
    expected = flat(mf.natural_gradient(TARGET, MASK, factors))
    assert all(w.dtype == jnp.float32 for w in found)
    np.testing.assert_allclose(flat(found), expected, atol=2e-3 * np.abs(expected).max())


@given(
    sizes=st.sampled_from([[4, 4], [4, 6, 5], [5, 2, 4], [3, 4, 5, 4], [3, 3, 3, 3, 3]]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6)
def test_joint_solution_is_the_moore_penrose_one(sizes, seed):
    factors = draw(sizes, seed)
    shape = (sizes[0], sizes[-1])
    target, mask = np.ones(shape), observed_mask(shape, 5, seed=seed)
    field = mf.natural_gradient_field(target, mask, factors)
    gradient = mf.residual(factors, field.target, field.mask)
    expected = np.linalg.pinv(jacobian(factors), rcond=1e-10) @ np.ravel(gradient)
    found = flat(field(factors))
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max(), rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_split_solves_the_system_in_the_corrected_order(depth):  # KE-Eq51
    factors = draw([4] * (depth + 1))
    gradient = np.random.default_rng(1).normal(size=(4, 4))
    step = mf.split_step(factors, jnp.asarray(gradient))
    np.testing.assert_allclose(mf.push_forward(factors, step), gradient, atol=1e-10)
    if depth == 1:
        return
    # the order that is printed, B^{T+} G A^+, is no solution
    left, right = mf.neighbours(factors)
    eye = np.eye(4)
    printed = [
        np.linalg.pinv(eye if b is None else b.T)
        @ gradient
        @ np.linalg.pinv(eye if a is None else a)
        / depth
        for a, b in zip(left, right, strict=True)
    ]
    moved = mf.push_forward(factors, [jnp.asarray(p) for p in printed])
    assert np.abs(moved - gradient).max() > 0.1


def test_cutoff_of_the_split():
    factors = draw([4, 4, 4])
    target = np.random.default_rng(1).normal(size=(4, 4))
    field = mf.natural_gradient_field(
        target, np.ones((4, 4)), factors, solution="split", cutoff=0.3
    )
    slope = np.asarray(mf.residual(factors, field.target, field.mask))
    for found, (a, b) in zip(
        field(factors), ((np.eye(4), factors[1]), (factors[0], np.eye(4))), strict=True
    ):
        expected = np.linalg.pinv(a, rcond=0.3) @ slope @ np.linalg.pinv(b, rcond=0.3) / 2
        np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.linalg.matrix_rank(field(factors)[0]) < 4


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_finite_step_of_the_split(depth):  # KE-NGD-MF exact step
    factors = draw([4] * (depth + 1))
    gradient = np.random.default_rng(1).normal(size=(4, 4))
    step = mf.split_step(factors, jnp.asarray(gradient))
    eta = 0.3
    moved = mf.product([w - eta * d for w, d in zip(factors, step, strict=True)])
    beta = np.asarray(mf.product(factors))
    inner = np.eye(4) - eta / depth * np.linalg.solve(beta, gradient)
    expected = beta @ np.linalg.matrix_power(inner, depth)
    np.testing.assert_allclose(moved, expected, atol=1e-9 * np.abs(expected).max())


def test_only_the_observed_entry_moves_at_any_step_size():  # KE-Fig3, column NGD
    factors = draw([6, 6, 6, 6])
    kernel = np.array(mf.step_kernel(factors, (4, 4), kind="split", step_size=0.7, error=-2.0))
    assert abs(kernel[4, 4]) > 0.1
    kernel[4, 4] = 0
    assert np.abs(kernel).max() < 1e-12


def test_flow_kernels():  # KE-Fig3, columns EGF and NGF
    for depth in (1, 2, 3):
        factors = draw([6] * (depth + 1))
        one = np.zeros((6, 6))
        one[2, 3] = 1
        for kind in ("joint", "split"):
            found = mf.flow_kernel(factors, (2, 3), kind=kind)
            np.testing.assert_allclose(found, one, atol=1e-9)
        euclidean = np.asarray(mf.flow_kernel(factors, (2, 3), kind="euclidean"))
        # column (2, 3) of J J^T
        gram = jacobian(factors) @ jacobian(factors).T
        np.testing.assert_allclose(euclidean, gram[:, 2 * 6 + 3].reshape(6, 6), atol=1e-12)
        off_cross = euclidean.copy()
        off_cross[2], off_cross[:, 3] = 0, 0
        assert (np.abs(off_cross).max() > 1e-3) == (depth > 2)
        small = mf.step_kernel(factors, (2, 3), kind="euclidean", step_size=1e-6, error=1.0)
        np.testing.assert_allclose(small, euclidean, atol=1e-4)


@pytest.mark.parametrize(("depth", "drift"), [(2, 0.05), (3, 0.15)])
def test_natural_descent_leaves_unobserved_entries_alone(depth, drift):  # KE-Fig5
    factors = completion.initial_factors(SIZE, depth, 1.0, jax.random.key(1), dtype=jnp.float64)
    eta, steps = 0.005, 400
    run = descend(
        mf.natural_gradient_field(TARGET, MASK, factors), factors, step_size=eta, steps=steps
    )
    before, after = np.asarray(mf.product(factors)), np.asarray(mf.product(run.final))
    ratio = np.linalg.norm((after - TARGET)[MASK]) / np.linalg.norm((before - TARGET)[MASK])
    assert abs(ratio / (1 - eta) ** steps - 1) < 0.1
    change = np.sqrt(np.mean((after - before)[~MASK] ** 2))
    assert change < drift * np.sqrt(np.mean((after - before)[MASK] ** 2))


def test_euclidean_completion_finds_low_rank():  # KE-Fig5 L, small
    target, mask = low_rank_matrix(20, 1, seed=0), observed_mask((20, 20), 200, seed=1)
    ranks, errors = [], []
    for depth in (1, 2, 3):
        factors = completion.initial_factors(20, depth, 1e-3, jax.random.key(0), dtype=jnp.float64)
        found = completion.complete(target, mask, factors, max_steps=30_000, learning_rate=1e-2)
        beta = np.asarray(mf.product(found.factors))
        assert found.loss <= 1e-6 or found.steps == 30_000
        np.testing.assert_allclose(np.mean((beta - target)[mask] ** 2), found.loss, rtol=1e-6)
        ranks.append(completion.effective_rank(beta))
        errors.append(np.mean((beta - target) ** 2))
    assert ranks[2] < ranks[1] < ranks[0]
    assert errors[2] < 1e-2 < errors[0]


def test_first_step_of_the_completion():
    factors = draw([3, 3, 3])
    mask = np.eye(3, dtype=bool)
    found = completion.complete(np.zeros((3, 3)), mask, factors, learning_rate=0.1, max_steps=1)

    def loss(factors):
        return jnp.mean(jnp.diagonal(mf.product(factors)) ** 2)

    gradient = flat(jax.grad(loss)(factors))
    # the bias correction makes the first average the squared norm itself
    expected = flat(factors) - 0.1 * gradient / (np.linalg.norm(gradient) + 1e-4)
    np.testing.assert_allclose(flat(found.factors), expected, rtol=1e-9)
    assert found.steps == 1


def test_initial_factors():
    factors = completion.initial_factors(60, 3, 1e-3, jax.random.key(0), dtype=jnp.float64)
    for w in factors:
        np.testing.assert_allclose(jnp.std(w), 0.1 / np.sqrt(60), rtol=0.05)
    products = completion.initial_factors(9, 2, 0.04, jax.random.key(0), gaussians=3)
    assert products[0].dtype == jnp.float32
    for w in products:
        np.testing.assert_allclose(jnp.linalg.norm(w), 0.2 * 3, rtol=1e-5)


def test_effective_rank():
    np.testing.assert_allclose(completion.effective_rank(np.diag([2.0, 2, 0])), 2)
    np.testing.assert_allclose(completion.effective_rank(np.ones((4, 3))), 1, rtol=1e-6)


SQUARE = draw([SIZE] * 3)
SINGULAR = (SQUARE[0], SQUARE[1][[1, *range(1, SIZE)]])


def natural(target=TARGET, mask=MASK, factors=SQUARE, **choices):
    return mf.natural_gradient(target, mask, factors, **choices)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: natural(mask=MASK & False), ValueError, "observes no entry"),
        (lambda: natural(mask=MASK[:4]), ValueError, "matrices of one shape"),
        (lambda: natural(mask=0.5 * MASK), ValueError, "boolean, or hold 0 and 1"),
        (lambda: natural(target=TARGET * np.inf), ValueError, "NaN"),
        (lambda: natural(target=np.ones((SIZE, SIZE), int)), TypeError, "floating"),
        (lambda: natural(factors=()), ValueError, "at least one factor"),
        (lambda: natural(factors=draw([SIZE, 5])), ValueError, "multiply to shape"),
        (
            lambda: natural(factors=(SQUARE[0], SQUARE[1][:4])),
            ValueError,
            "factor 1 of shape .* does not multiply factor 2",
        ),
        (
            lambda: natural(factors=tuple(w.astype(np.float32) for w in SQUARE)),
            TypeError,
            "one dtype, got float32 and float64",
        ),
        (lambda: natural(solution="pinv"), ValueError, '"joint" or "split"'),
        (
            lambda: mf.natural_gradient_field(TARGET, MASK, SQUARE, cutoff=0.1),
            ValueError,
            "cutoff is a fraction below 1",
        ),
        (
            lambda: natural(factors=SINGULAR, solution="split"),
            ValueError,
            "factor 2 is singular",
        ),
        (
            lambda: natural(factors=draw([SIZE, 3, SIZE]), solution="split"),
            ValueError,
            "factor 1 of shape .* narrower",
        ),
        (
            lambda: natural(factors=draw([SIZE, SIZE, 3, SIZE])),
            ValueError,
            "factor 2 of shape .* narrower",
        ),
        (
            lambda: mf.flow_kernel(SQUARE, (0, SIZE), kind="joint"),
            ValueError,
            r"entry \(0, 8\) is outside",
        ),
        (lambda: mf.flow_kernel(SQUARE, (0, 0), kind="x"), ValueError, "euclidean, joint, split"),
        (
            lambda: mf.step_kernel(SQUARE, (0, 0), kind="joint", step_size=0.1, error=0.0),
            ValueError,
            "error must be finite and not 0",
        ),
        (
            lambda: mf.step_kernel(SQUARE, (0, 0), kind="joint", step_size=-0.1, error=1.0),
            ValueError,
            "step_size must be positive",
        ),
        (lambda: completion.complete(TARGET, MASK, draw([3, 3])), ValueError, "multiply to shape"),
        (
            lambda: completion.complete(TARGET, MASK, SQUARE, learning_rate=0.0),
            ValueError,
            "learning_rate must be positive",
        ),
        (
            lambda: completion.complete(TARGET, MASK, SQUARE, max_steps=0),
            ValueError,
            "max_steps",
        ),
        (
            lambda: completion.initial_factors(3, 2, -1.0, jax.random.key(0)),
            ValueError,
            "scale must be positive",
        ),
        (
            lambda: completion.initial_factors(3, 2, 1.0, jax.random.key(0), gaussians=0),
            ValueError,
            "gaussians",
        ),
        (lambda: completion.effective_rank(np.zeros((2, 2))), ValueError, "other than zero"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_unobserved_entries_of_the_target_are_not_looked_at():
    hidden = np.where(MASK, TARGET, np.nan)
    for found, expected in zip(natural(target=hidden), natural(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_matrices_beyond_memory(monkeypatch):
    monkeypatch.setattr(descent_module, "available_memory", lambda: 8)
    with pytest.raises(ValueError, match=r"Gram matrix of the factors \(8 x 8\) needs"):
        natural()
