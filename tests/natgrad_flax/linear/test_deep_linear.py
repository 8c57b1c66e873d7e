"""Identities of Bernacchia et al. (2018) on sequences of weights: random shapes, float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad_flax.linear import deep_linear as dl
from natgrad_flax.linear import deep_linear_bottleneck as db
from natgrad_flax.linear import deep_linear_fisher as df

pytestmark = pytest.mark.usefixtures("x64")

SQUARE = (3, 3, 3, 3)
WIDE = (3, 5, 4, 2)
BOTTLENECK = (5, 3, 2, 4, 4)
EXPANDING = (2, 4, 4, 5)


def problem(widths, seed=0):
    """Random weights, and moments with a random covariance of inputs and of outputs."""
    rng = np.random.default_rng(seed)
    weights = [jnp.asarray(rng.standard_normal(pair)) for pair in itertools.pairwise(widths)]
    x = rng.standard_normal((4 * widths[0], widths[0]))
    y = rng.standard_normal((4 * widths[0], widths[-1]))
    spread = rng.standard_normal((widths[-1], 2 * widths[-1]))
    return weights, dl.moments(x, y, spread @ spread.T), x, y


def chain_of(weights):
    """A_i and B_i by plain products."""
    before = [np.eye(weights[0].shape[0])]
    after = [np.eye(weights[-1].shape[1])]
    for w in weights[:-1]:
        before.append(before[-1] @ np.asarray(w))
    for w in weights[:0:-1]:
        after.insert(0, np.asarray(w) @ after[0])
    return before, after


def product_of(weights):
    return chain_of(weights)[0][-1] @ np.asarray(weights[-1])


def push_forward(weights, steps):
    """The change of the product under steps of all factors, to first order."""
    before, after = chain_of(weights)
    return sum(a @ np.asarray(d) @ b for a, d, b in zip(before, steps, after, strict=True))


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def jacobian(weights):
    """d W / d theta, shape (n_0 n_L, P), both flattened row by row: W is linear in each entry."""
    factors, columns = [np.asarray(w) for w in weights], []
    for i, factor in enumerate(factors):
        for entry in np.eye(factor.size):
            swapped = [*factors[:i], entry.reshape(factor.shape), *factors[i + 1 :]]
            columns.append(np.ravel(functools.reduce(np.matmul, swapped)))
    return np.stack(columns, axis=1)


def close(a, b, rtol=1e-9):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-300)


@pytest.mark.parametrize("widths", [SQUARE, WIDE])
def test_gradient_is_that_of_autodiff(widths):  # BE-Eq7/8
    weights, data, x, y = problem(widths)

    def loss(ws):
        error = y - x @ functools.reduce(jnp.matmul, ws)
        return jnp.sum((error @ data.precision) * error) / (2 * len(x))

    close(flat(dl.gradient(weights, data)), flat(jax.jit(jax.grad(loss))(weights)), 1e-10)


def test_excess_loss_is_the_loss_above_least_squares():
    weights, data, x, y = problem(WIDE)

    def loss(w):
        return np.sum(((y - x @ w) @ np.asarray(data.precision)) * (y - x @ w)) / (2 * len(x))

    best = np.linalg.lstsq(x, y, rcond=None)[0]
    product = product_of(weights)
    close(dl.optimum(data), best)
    close(dl.excess_loss(jnp.asarray(product), data), loss(product) - loss(best))


@pytest.mark.parametrize(("widths", "rank"), [(WIDE, 3 * 2), (BOTTLENECK, 2 * (5 + 4 - 2))])
def test_fisher_is_that_of_the_jacobian(widths, rank):  # BE-Eq22
    weights, data, *_ = problem(widths)
    jac = jacobian(weights)
    explicit = jac.T @ np.kron(data.inputs, data.precision) @ jac
    fisher = df.fisher(weights, data)
    close(fisher, explicit, 1e-12)
    assert np.linalg.matrix_rank(fisher, tol=1e-10 * np.abs(fisher).max()) == rank
    ends = np.cumsum([0] + [w.size for w in weights])
    block = np.asarray(fisher)[ends[0] : ends[1], ends[1] : ends[2]]
    close(df.fisher_block(weights, data, 1, 2), block, 1e-12)


def test_blocks_are_second_moments_under_the_model():  # BE-Eq14/15, by Monte Carlo
    weights, data, *_ = problem((3, 3, 3))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((100_000, 3)) @ np.linalg.cholesky(data.inputs).T
    precision = np.asarray(data.precision)
    noise = rng.standard_normal(x.shape) @ np.linalg.cholesky(np.linalg.inv(precision)).T
    before, after = chain_of(weights)
    inputs, errors = x @ before[1], noise @ precision @ after[0].T
    first, second = inputs.T @ inputs / len(x), errors.T @ errors / len(x)
    # the diagonal blocks of the Fisher are Kronecker products, with the identity at the ends
    for layer, expected in ((1, np.kron(data.inputs, second)), (2, np.kron(first, precision))):
        close(df.fisher_block(weights, data, layer, layer), expected, 0.02)


def test_the_forms_of_the_natural_gradient_agree():  # BE-Eq10, BE-Eq16
    weights, data, x, y = problem(SQUARE)
    before, after = chain_of(weights)
    depth = len(weights)
    inverse = dl.natural_gradient(weights, data)
    close(flat(dl.natural_gradient(weights, data, method="pseudo-inverse")), flat(inverse), 1e-8)
    best = np.linalg.lstsq(x, y, rcond=None)[0] - product_of(weights)
    for i, (a, b, slope) in enumerate(zip(before, after, dl.gradient(weights, data), strict=True)):
        left = np.linalg.inv(a.T @ np.asarray(data.inputs) @ a)
        right = np.linalg.inv(b @ np.asarray(data.precision) @ b.T)
        close(inverse[i], left @ np.asarray(slope) @ right / depth, 1e-8)
        close(inverse[i], -np.linalg.inv(a) @ best @ np.linalg.inv(b) / depth, 1e-8)


def test_generalised_inverse():  # BE-Eq23 / supp36
    weights, data, *_ = problem((2, 2, 2, 2))
    fisher = np.asarray(df.fisher(weights, data))
    inverse = np.asarray(df.generalised_inverse(weights, data))
    close(fisher @ inverse @ fisher, fisher, 1e-9)
    close(inverse @ fisher @ inverse, inverse, 1e-9)
    assert np.abs(fisher @ inverse - (fisher @ inverse).T).max() > 0.01
    # block (1, 2) is the inverse of block (2, 1) over L^2
    close(inverse[:4, 4:8], np.linalg.inv(fisher[4:8, :4]) / 9, 1e-9)


def test_every_block_of_a_row_contributes_the_same():  # BE-supp37
    weights, data, *_ = problem((2, 2, 2, 2))
    inverse = np.asarray(df.generalised_inverse(weights, data))
    slopes = [np.ravel(g) for g in dl.gradient(weights, data)]
    updates = dl.natural_gradient(weights, data)
    for i, update in enumerate(updates):
        for j, slope in enumerate(slopes):
            part = inverse[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] @ slope
            close(3 * part, np.ravel(update))
        block = np.asarray(df.fisher_block(weights, data, i + 1, i + 1))
        close(np.linalg.solve(block, slopes[i]), 3 * np.ravel(update))


def test_any_generalised_inverse_moves_the_product_alike():  # BE-supp34
    weights, data, *_ = problem((2, 2, 2))
    fisher = np.asarray(df.fisher(weights, data))
    pseudo = np.linalg.pinv(fisher, rcond=1e-10)
    noise = np.random.default_rng(2).standard_normal(fisher.shape)
    other = pseudo + noise - pseudo @ fisher @ noise @ fisher @ pseudo
    close(fisher @ other @ fisher, fisher)
    jac, slope = jacobian(weights), flat(dl.gradient(weights, data))
    update = flat(dl.natural_gradient(weights, data))
    for inverse in (pseudo, other):
        close(jac @ inverse @ slope, jac @ update)
        assert np.abs(inverse @ slope - update).max() > 0.01 * np.abs(update).max()


def test_the_flow_is_exponential():  # BE-Eq18
    weights, data, *_ = problem((2, 2, 2), seed=3)

    def slope(ws):
        return [-g for g in dl.natural_gradient(ws, data)]

    @jax.jit
    def flow(ws):
        def step(ws, _):
            shift = lambda k, h: [w + h * d for w, d in zip(ws, k, strict=True)]  # noqa: E731
            k1 = slope(ws)
            k2 = slope(shift(k1, 0.005))
            k3 = slope(shift(k2, 0.005))
            k4 = slope(shift(k3, 0.01))
            mean = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)]
            return shift(mean, 0.01), None

        return jax.lax.scan(step, ws, None, length=100)[0]

    start, end = (jnp.asarray(product_of(ws)) for ws in (weights, flow(weights)))
    close(dl.excess_loss(end, data), np.exp(-2) * dl.excess_loss(start, data), 1e-6)
    close(end, dl.flow_product(start, dl.optimum(data), 1.0), 1e-6)


@pytest.mark.parametrize("depth", [1, 4])
def test_law_of_a_step(depth):  # BE-discrete
    weights, data, *_ = problem((3,) * (depth + 1))
    steps = dl.natural_gradient(weights, data)
    product, target = jnp.asarray(product_of(weights)), dl.optimum(data)
    for rate in (0.3, 1.0):
        moved = [w - rate * d for w, d in zip(weights, steps, strict=True)]
        law = dl.euler_product(product, target, depth, rate)
        close(law, product_of(moved), 1e-11)
    if depth == 1:
        close(law, target, 1e-11)


def test_the_law_of_a_step_in_the_limit_of_depth():  # BE-discrete
    rng = np.random.default_rng(4)
    product = np.eye(3) + 0.1 * rng.standard_normal((3, 3))
    target = np.eye(3) + 0.1 * rng.standard_normal((3, 3))
    limit = scipy.linalg.expm(target @ np.linalg.inv(product) - np.eye(3)) @ product
    close(dl.euler_product(jnp.asarray(product), jnp.asarray(target), 2**20, 1.0), limit, 1e-6)


@pytest.mark.parametrize("widths", [WIDE, BOTTLENECK, EXPANDING])
def test_projections_and_the_flow_of_the_product(widths):  # BE-Eq19 / supp45
    weights, data, *_ = problem(widths)
    product, target = product_of(weights), np.asarray(dl.optimum(data))
    for left, right in db.projectors(weights, data):
        close(left @ left, left, 1e-10)
        close(right @ right, right, 1e-10)
        close(left @ product @ right, product, 1e-10)
    steps = dl.natural_gradient(weights, data)
    direction = db.flow_direction(weights, data)
    close(direction, -push_forward(weights, steps))
    if widths == WIDE:
        close(direction, target - product)
    else:
        assert np.abs(direction - target + product).max() > 0.01
    if widths == EXPANDING:  # not in the paper: the Fisher has the rank of W, and yet Eq. 10 is off
        close(db.tangent_projection(weights, data), target - product)


def test_projectors_are_trivial_where_the_paper_says_so():  # BE-Eq19
    contracting, expanding = problem((4, 3, 2)), problem((2, 3, 4))
    for _, right in db.projectors(*contracting[:2]):
        close(right, np.eye(2), 1e-10)
    for left, _ in db.projectors(*expanding[:2]):
        close(left, np.eye(2), 1e-10)


def true_direction(weights, data):
    """P V + V Q - P V Q by explicit projectors onto the columns and rows of the product."""
    product, inputs = product_of(weights), np.asarray(data.inputs)
    rank = min(w.shape[1] for w in weights)
    columns = np.linalg.svd(product)[0][:, :rank]
    rows = np.linalg.svd(product)[2][:rank]
    precision = np.asarray(data.precision)
    p = columns @ np.linalg.solve(columns.T @ inputs @ columns, columns.T @ inputs)
    q = precision @ rows.T @ np.linalg.solve(rows @ precision @ rows.T, rows)
    v = np.asarray(dl.optimum(data)) - product
    return p @ v + v @ q - p @ v @ q


def test_the_natural_gradient_at_a_bottleneck():  # BE-bottleneck
    weights, data, *_ = problem(BOTTLENECK)
    jac = jacobian(weights)
    pseudo = np.linalg.pinv(np.asarray(df.fisher(weights, data)), rcond=1e-10)
    expected = -(jac @ pseudo @ flat(dl.gradient(weights, data))).reshape(5, 4)
    close(true_direction(weights, data), expected)
    close(db.tangent_projection(weights, data), expected)
    steps = dl.bottleneck_natural_gradient(weights, data)
    close(-push_forward(weights, steps), expected)
    # what the paper prints does not hold
    printed = db.flow_direction(weights, data)
    assert np.linalg.norm(printed - expected) > 0.01 * np.linalg.norm(expected)


def test_both_flows_rest_at_a_truncated_optimum():  # BE-bottleneck
    _, data, *_ = problem(BOTTLENECK)
    root, noise = (np.linalg.cholesky(m) for m in (data.inputs, data.precision))
    left, values, right = np.linalg.svd(root.T @ np.asarray(dl.optimum(data)) @ noise)
    head = np.linalg.solve(root.T, left[:, :2] * values[:2])
    tail = np.linalg.solve(noise.T, right[:2].T).T
    weights = [jnp.asarray(head), jnp.asarray(tail)]
    scale = np.abs(dl.optimum(data)).max()
    assert np.abs(db.flow_direction(weights, data)).max() < 1e-10 * scale
    assert np.abs(db.tangent_projection(weights, data)).max() < 1e-10 * scale


@settings(max_examples=4)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 1000))
def test_the_tangent_projection_for_random_widths(widths, seed):
    with jax.enable_x64(True):
        weights, data, *_ = problem(tuple(widths), seed)
        steps = dl.bottleneck_natural_gradient(weights, data)
        expected = true_direction([np.eye(widths[0]), *weights], data)
        close(-push_forward(weights, steps), expected, 1e-7)


def test_without_a_bottleneck_it_is_the_natural_gradient():
    weights, data, *_ = problem(SQUARE)
    steps = dl.bottleneck_natural_gradient(weights, data)
    close(flat(steps), flat(dl.natural_gradient(weights, data)), 1e-8)


@pytest.mark.parametrize("widths", [SQUARE, BOTTLENECK])
def test_damped_form(widths):  # BE-Eq20
    weights, data, *_ = problem(widths)
    before, after = chain_of(weights)
    slopes = dl.gradient(weights, data)
    steps = dl.natural_gradient(weights, data, damping=0.04)
    for a, b, slope, step in zip(before, after, slopes, steps, strict=True):
        left = a.T @ np.asarray(data.inputs) @ a + 0.2 * np.eye(a.shape[1])
        right = b @ np.asarray(data.precision) @ b.T + 0.2 * np.eye(len(b))
        expected = np.linalg.solve(left, np.asarray(slope)) @ np.linalg.inv(right) / len(weights)
        close(step, expected)
    heavy = flat(dl.natural_gradient(weights, data, damping=1e16))
    close(heavy, flat(slopes) / (len(weights) * 1e16), 1e-4)


def test_rank_deficient_inputs_have_a_pseudo_inverse():
    weights, data, x, y = problem((3, 3, 3))
    flat_x = x @ np.diag([1.0, 1.0, 0.0])
    data = dl.moments(flat_x, y)
    steps = dl.natural_gradient(weights, data, method="pseudo-inverse")
    best = np.linalg.lstsq(flat_x, y, rcond=None)[0]
    # to first order the outputs become those of least squares
    moved = product_of(weights) - push_forward(weights, steps)
    close(flat_x @ moved, flat_x @ best, 1e-8)


def test_bad_shapes():
    weights, data, x, y = problem(WIDE)
    with pytest.raises(ValueError, match="needs one weight matrix at least"):
        dl.gradient([], data)
    with pytest.raises(ValueError, match="W_2 takes 4 inputs but W_1 gives 5"):
        dl.natural_gradient([weights[0], weights[2]], data)
    with pytest.raises(ValueError, match=r"inputs must be of shape \(5, 5\), got \(3, 3\)"):
        dl.gradient(weights[1:], data)
    with pytest.raises(ValueError, match="W_1 must be a matrix"):
        df.fisher([weights[0][0]], data)
    with pytest.raises(ValueError, match="W_3 has NaN or infinite entries"):
        dl.gradient([*weights[:2], weights[2].at[0, 0].set(np.nan)], data)
    with pytest.raises(ValueError, match="j must be at most the depth 3, got 4"):
        df.fisher_block(weights, data, 1, 4)
    with pytest.raises(ValueError, match=r"got \(12, 3\) and \(11, 2\)"):
        dl.moments(x, y[1:])
    with pytest.raises(ValueError, match="output_covariance must be 2 x 2"):
        dl.moments(x, y, jnp.eye(3))
    with pytest.raises(ValueError, match="output_covariance must be positive definite"):
        dl.moments(x, y, jnp.diag(jnp.array([1.0, -1.0])))
    with pytest.raises(ValueError, match="the law of a step needs square matrices"):
        dl.euler_product(jnp.ones((2, 3)), jnp.ones((2, 3)), 2, 1.0)


def test_singular_networks_and_inputs():
    weights, data, x, y = problem(SQUARE)
    singular = [weights[0], weights[1].at[0].set(weights[1][1]), weights[2]]
    for call in (dl.natural_gradient, df.generalised_inverse):
        with pytest.raises(ValueError, match=r"W_2 is singular \(rank 2 of 3\)"):
            call(singular, data)
    with pytest.raises(ValueError, match=r"W_1 ... W_2 has rank 2 where its widths allow 3"):
        dl.bottleneck_natural_gradient(singular, data)
    deficient = dl.moments(x[:, [1, 1, 2]], y)
    with pytest.raises(ValueError, match=r"the inputs span 2 of 3 dimensions.*pseudo-inverse"):
        dl.natural_gradient(weights, deficient)
    with pytest.raises(ValueError, match="the product has rank 2 of 3"):
        dl.euler_product(singular[1], jnp.eye(3), 2, 1.0)


def test_bad_settings():
    weights, data, *_ = problem(WIDE)
    with pytest.raises(ValueError, match="method must be one of auto, inverse, pseudo-inverse"):
        dl.natural_gradient(weights, data, method="lu")
    with pytest.raises(ValueError, match=r"needs layers of one width, got \[3, 5, 4, 2\]"):
        dl.natural_gradient(weights, data, method="inverse")
    with pytest.raises(ValueError, match="damping must be 0 or positive"):
        dl.natural_gradient(weights, data, damping=-1.0)
    with pytest.raises(ValueError, match="needs layers of one width"):
        df.generalised_inverse(weights, data)
    indefinite = data._replace(precision=-data.precision)
    with pytest.raises(ValueError, match="precision must be positive definite"):
        dl.natural_gradient(weights, indefinite)
