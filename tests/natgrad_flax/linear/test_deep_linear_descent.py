"""The transformations of Bernacchia et al. (2018): steps, damping, estimates and training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from natgrad_datasets.linear_teacher import (
    LINEAR_TEACHER_SETTINGS,
    linear_teacher,
    random_linear_network,
)

import natgrad_flax as ng
from natgrad_flax import linear
from natgrad_flax.linear import deep_linear
from natgrad_flax.linear.inverse_moments import woodbury

MSE = ng.MeanSquaredError()


def linear_mlp(widths=(4, 4, 4), **settings):
    settings = {"activation": "identity", "param_dtype": jnp.float64} | settings
    return ng.MLP(widths, rngs=nnx.Rngs(0), **settings)


def sequential(widths, weights=None):
    layers = [
        nnx.Linear(a, b, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(i))
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    for layer, weight in zip(layers, weights or [], strict=False):
        layer.kernel[...] = jnp.asarray(weight)
    return nnx.Sequential(*layers)


def batch(inputs, outputs, n=30):
    x = jax.random.normal(jax.random.key(1), (n, inputs), jnp.float64)
    return x, jax.random.normal(jax.random.key(2), (n, outputs), jnp.float64)


def one_update(tx, model, x, y):
    """The step, and the state after it."""
    params = nnx.as_pure(nnx.state(model, nnx.Param))

    @jax.jit
    def update(params):
        return tx.update(params, tx.init(params), params, module=model, x=x, y=y)

    return update(params)


def kernels(tree):
    return [np.asarray(layer["kernel"]) for _, layer in sorted(tree["layers"].items())]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("model", "scales"),
    [
        (lambda: linear_mlp((4, 4, 4), weight_variance=2.0), [0.5**0.5] * 2),
        (lambda: sequential((3, 5, 2)), [1.0, 1.0]),
    ],
)
def test_undamped_steps_are_the_exact_natural_gradient(model, scales):
    model = model()
    weights = [s * p.kernel[...] for s, p in zip(scales, model.layers, strict=True)]
    x, y = batch(weights[0].shape[0], weights[-1].shape[1])
    expected = deep_linear.natural_gradient(weights, deep_linear.moments(x, y))
    step, state = one_update(linear.deep_linear_descent(0.5), model, x, y)
    for found, wanted, scale in zip(kernels(step), expected, scales, strict=True):
        np.testing.assert_allclose(scale * found, -0.5 * wanted, rtol=1e-7, atol=1e-9)
    assert (int(state.steps), float(state.damping)) == (1, 0.0)


@pytest.mark.usefixtures("x64")
def test_it_steps_in_function_space_like_the_exact_fisher():
    model, (x, y) = linear_mlp(), batch(4, 4)
    step, _ = one_update(linear.deep_linear_descent(1.0), model, x, y)
    exact = ng.natural_gradient(model, x, y, structure=ng.Exact(), loss=MSE)
    graphdef, params = nnx.split(model)

    def outputs(kernels):
        state = nnx.state(model, nnx.Param)
        for index, kernel in enumerate(kernels):
            state["layers"][index]["kernel"] = state["layers"][index]["kernel"].replace(kernel)
        return nnx.merge(graphdef, state)(x)

    here = kernels(nnx.as_pure(params))
    push = jax.jit(lambda tangent: jax.jvp(outputs, (here,), (tangent,))[1])
    expected = -push(kernels(nnx.as_pure(exact)))
    np.testing.assert_allclose(push(kernels(step)), expected, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variance", [1.0, 0.01])
def test_damped_steps(variance):  # BE-Eq20 in the coordinates of the kernels
    widths = (3, 5, 2)
    model, (x, y) = linear_mlp(widths, weight_variance=2.0), batch(3, 2)
    tx = linear.deep_linear_descent(
        lambda t: 0.5 / (t + 1), damping=lambda t: 0.04 * 0.5**t, output_variance=variance
    )
    step, state = one_update(tx, model, x, y)
    np.testing.assert_allclose(state.damping, 0.04, rtol=1e-6)
    signals, residual = ng.fisher_signals(model, x, y, loss=MSE)
    for index, (layer, found) in enumerate(zip(signals.layers, kernels(step), strict=True)):
        a, flat = np.asarray(layer.inputs), np.asarray(layer.flat_derivatives())
        slope = a.T @ np.asarray(residual.cotangent(layer, index)) / len(x)
        # errors and gradient of the loss that is weighted by 1 / variance
        errors = flat.T @ flat / len(x) / variance
        left = np.linalg.inv(a.T @ a / len(x) + 0.2 * np.eye(a.shape[1]))
        right = np.linalg.inv(errors + 0.2 * np.eye(len(errors)))
        np.testing.assert_allclose(found, -0.25 * left @ (slope / variance) @ right, rtol=1e-8)


class Recorder(ng.LevenbergMarquardt):
    """Keeps rho = (L_new - L_old) / predicted where the next damping would be."""

    def adapt(self, damping, actual, predicted):
        return actual / predicted


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make", [linear.deep_linear_descent, linear.online_natural_gradient_descent]
)
def test_adaptive_damping(make):  # BE-Eq21 with the update of the footnote at alpha = 1
    model, (x, y) = linear_mlp((3, 4, 2)), batch(3, 2)
    rate = 0.5
    step, state = one_update(make(rate, damping=Recorder(0.3)), model, x, y)
    graphdef, params = nnx.split(model)
    slopes = nnx.as_pure(nnx.grad(lambda m: MSE(m(x), y))(model))
    inner = sum(-np.sum(g * d / rate) for g, d in zip(kernels(slopes), kernels(step), strict=True))
    pure = nnx.as_pure(params)
    new, old = (
        MSE(nnx.merge(graphdef, tree)(x), y) for tree in (optax.apply_updates(pure, step), pure)
    )
    ratio = (new - old) / ((-rate + rate**2 / 2) * inner)
    np.testing.assert_allclose(state.damping, ratio, rtol=1e-6)
    assert 0 < ratio < 2


@pytest.mark.parametrize(("ratio", "factor"), [(0.2, 1.5), (0.5, 1.0), (0.8, 2 / 3), (np.nan, 1.5)])
def test_the_rule_of_damping(ratio, factor):  # BE-Eq21
    adapted = ng.LevenbergMarquardt().adapt(jnp.ones(()), -ratio * jnp.ones(()), -jnp.ones(()))
    np.testing.assert_allclose(adapted, factor, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("activation", "bias", "loss", "split"),
    [
        ("identity", 0.0, MSE, "plain"),
        ("identity", 0.0, MSE, "pi"),
        ("tanh", 0.5, ng.SoftmaxCrossEntropy(), "plain"),
    ],
)
def test_sampled_errors_estimate_eq_20(activation, bias, loss, split):
    model = linear_mlp((3, 4, 2), activation=activation, bias_variance=bias)
    x, y = batch(3, 2)
    y = y if loss is MSE else jax.nn.softmax(y)
    # inputs of another size than errors, which is what the split is for
    x = 2 * x if split == "pi" else x
    tx = linear.online_natural_gradient_descent(
        1.0, loss=loss, damping=0.01, mc_samples=2000, split=split
    )
    step, _ = one_update(tx, model, x, y)
    signals, residual = ng.fisher_signals(model, x, y, loss=loss)
    for index, layer in enumerate(signals.layers):
        a = np.asarray(layer.augmented_inputs())
        flat = np.asarray(layer.flat_derivatives())
        slope = a.T @ np.asarray(residual.cotangent(layer, index)) / len(x)
        inputs, errors = a.T @ a / len(x), flat.T @ flat / len(x)
        pi = 1.0
        if split == "pi":
            pi = np.sqrt(np.trace(inputs) / len(inputs) / (np.trace(errors) / len(errors)))
            assert abs(pi - 1) > 0.1
        left = np.linalg.inv(inputs + 0.1 * pi * np.eye(len(inputs)))
        right = np.linalg.inv(errors + 0.1 / pi * np.eye(len(errors)))
        expected = -left @ slope @ right / len(signals.layers)
        found = step["layers"][index]
        rows = [found["kernel"], *([found["bias"][None]] if bias else [])]
        error = np.abs(np.concatenate(rows) - expected).max()
        assert error < 0.03 * np.abs(expected).max()


@pytest.mark.usefixtures("x64")
def test_randomness_is_that_of_the_seed():
    model, (x, y) = linear_mlp((3, 2)), batch(3, 2)
    params = nnx.as_pure(nnx.state(model, nnx.Param))

    @jax.jit
    def update(state):
        tx = linear.online_natural_gradient_descent()
        return tx.update(params, state, params, module=model, x=x, y=y)

    states = [linear.online_natural_gradient_descent(seed=s).init(params) for s in (0, 0, 1)]
    (first, state), (same, _), (other, _) = map(update, states)
    second, _ = update(state)
    first, same, other, second = (kernels(t)[0] for t in (first, same, other, second))
    np.testing.assert_array_equal(first, same)
    for different in (other, second):
        assert np.abs(first - different).max() > 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 5])
def test_woodbury(count):
    rng = np.random.default_rng(0)
    moment = np.cov(rng.standard_normal((8, 50)))
    rows = rng.standard_normal((count, 8))
    found = woodbury(jnp.asarray(np.linalg.inv(moment)), jnp.asarray(rows), 0.9)
    expected = np.linalg.inv(0.9 * moment + 0.1 * rows.T @ rows)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_moving_inverse_follows_the_damped_second_moment():
    rows = jax.random.normal(jax.random.key(0), (40, 6), jnp.float64) @ jnp.diag(jnp.arange(1.0, 7))
    rows = rows / 40**0.5
    moving = linear.MovingInverse(decay=0.98, rows=20)

    def step(carry, key):
        inverse, first = carry
        _, inverse = moving.solve(inverse, rows, jnp.eye(6), jnp.asarray(4.0), key, first)
        return (inverse, jnp.asarray(False)), inverse

    start = (moving.init(6, rows.dtype), jnp.asarray(True))
    _, inverses = jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 600))
    average = np.mean(np.linalg.inv(np.asarray(inverses[200:])), axis=0)
    expected = np.asarray(rows.T @ rows) + 4 * np.eye(6)
    assert np.abs(average - expected).max() < 0.1 * expected.max()


@pytest.mark.usefixtures("x64")
def test_moving_inverse_without_chance_is_the_recursion():
    rows = jax.random.normal(jax.random.key(0), (10, 4), jnp.float64)
    moving = linear.MovingInverse(decay=0.7, rows=10)
    inverse, moment, solve = moving.init(4, rows.dtype), None, jax.jit(moving.solve)
    for count in range(3):
        batch_rows = (count + 1) * rows
        second = np.asarray(batch_rows.T @ batch_rows)
        if moment is None:
            moment = np.trace(second) / 4 * np.eye(4)
        moment = 0.7 * moment + 0.3 * second
        first = jnp.asarray(count == 0)
        solution, inverse = solve(
            inverse, batch_rows, jnp.eye(4), jnp.asarray(0.0), jax.random.key(1), first
        )
    np.testing.assert_allclose(solution, np.linalg.inv(moment), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_randomised_svd():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((60, 30)))[0]
    axes = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    values = np.concatenate([2.0 ** -np.arange(5), 1e-3 * np.ones(25)])
    rows, rhs = jnp.asarray((left * np.sqrt(values)) @ axes.T), jnp.asarray(axes[:, ::7])
    method = linear.RandomisedSVD(5, oversampling=3)
    found, vectors = method.eigenvectors(rows, jax.random.key(0))
    np.testing.assert_allclose(found, values[:5], rtol=1e-6)
    overlap = np.abs(axes[:, :5].T @ np.asarray(vectors))
    np.testing.assert_allclose(overlap, np.eye(5), atol=1e-3)
    # all of the tail is one eigenvalue, which the mean of the rest is
    solution, _ = method.solve(
        method.init(30, rows.dtype), rows, rhs, jnp.asarray(0.01), jax.random.key(0), True
    )
    expected = np.linalg.solve(rows.T @ rows + 0.01 * np.eye(30), rhs)
    np.testing.assert_allclose(solution, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.usefixtures("x64")
def test_randomised_svd_of_full_rank_is_exact_and_without_damping_the_pseudo_inverse():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((20, 3)) @ rng.standard_normal((3, 7)))
    rhs, key = jnp.asarray(rng.standard_normal((7, 2))), jax.random.key(0)
    for rank, shift in ((7, 0.1), (3, 0.0)):
        method = linear.RandomisedSVD(rank)
        found, _ = method.solve(jnp.zeros(0), rows, rhs, jnp.asarray(shift), key, True)
        expected = np.linalg.pinv(rows.T @ rows + shift * np.eye(7), rcond=1e-10) @ rhs
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def train(setting, tx, steps, seed=0):
    """log10 of the mean squared test error after each step on a batch of 1000."""
    data = linear_teacher(setting, 10_000, 1000, seed)
    model = sequential(setting, random_linear_network(setting, seed + 1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    x, y, x_test, y_test = map(jnp.asarray, (data.x_train, data.y_train, data.x_test, data.y_test))

    @jax.jit
    def run(state):
        def step(state, start):
            model, optimizer = nnx.merge(graphdef, state)
            inputs, targets = (jax.lax.dynamic_slice_in_dim(a, start, 1000) for a in (x, y))
            slopes = nnx.grad(lambda m: MSE(m(inputs), targets))(model)
            optimizer.update(model, slopes, module=model, x=inputs, y=targets)
            error = jnp.log10(jnp.mean((model(x_test) - y_test) ** 2))
            return nnx.split((model, optimizer))[1], error

        return jax.lax.scan(step, state, jnp.arange(steps) % 10 * 1000)[1]

    return np.asarray(run(state))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["exact", "online"])
def test_the_square_network_of_figure_1_is_recovered(kind):  # BE-Fig1A
    tx = linear.online_natural_gradient_descent()
    if kind == "exact":
        tx = linear.deep_linear_descent(damping=ng.LevenbergMarquardt())
    errors = train(LINEAR_TEACHER_SETTINGS["BE-Fig1A"].widths, tx, 80)
    assert errors[-1] <= -5.8
    assert errors[19] > -3  # and not at once


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("figure", "steps"), [("BE-Fig1B", 80), ("BE-Fig1C", 200)])
def test_the_other_networks_of_figure_1_are_recovered(figure, steps):
    widths = LINEAR_TEACHER_SETTINGS[figure].widths
    assert train(widths, linear.online_natural_gradient_descent(), steps)[-1] <= -5.8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "inverse", [linear.RandomisedSVD(6, oversampling=1), linear.MovingInverse(0.5, rows=50)]
)
def test_the_other_inverses_train(inverse):
    tx = linear.online_natural_gradient_descent(inverse=inverse)
    errors = train((8, 8, 8), tx, 40)
    assert errors[-1] <= -5.5


@pytest.mark.usefixtures("x64")
def test_a_random_network_of_one_width_is_solved_in_one_step_at_depth_one():
    assert train((6, 3), linear.deep_linear_descent(1.0), 1)[0] < -5.9


@pytest.mark.parametrize(
    "make", [linear.deep_linear_descent, linear.online_natural_gradient_descent]
)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
        ({"damping": -1.0}, ValueError, "damping must be 0 or positive"),
        ({"damping": ng.RelativeDamping(0.1)}, TypeError, "damping must be a number, a schedule"),
        ({"output_variance": 0.0}, ValueError, "output_variance must be positive"),
    ],
)
def test_bad_settings(make, settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, "sampled second moments need a positive damping"),
        ({"mc_samples": 0}, ValueError, "mc_samples must be an integer of at least 1"),
        ({"inverse": "svd"}, TypeError, "inverse must be DirectInverse"),
        ({"loss": "mse"}, TypeError, "loss must be one of .*ng.MeanSquaredError"),
        ({"split": "half"}, ValueError, 'split must be "plain" or "pi"'),
        ({"split": "pi", "output_variance": 2.0}, ValueError, "takes the place"),
    ],
)
def test_bad_settings_of_the_online_algorithm(settings, error, message):
    with pytest.raises(error, match=message):
        linear.online_natural_gradient_descent(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear.MovingInverse(decay=1.0), "decay must lie between 0 and 1"),
        (lambda: linear.MovingInverse(rows=0), "rows must be an integer of at least 1"),
        (lambda: linear.RandomisedSVD(0), "rank must be an integer of at least 1"),
    ],
)
def test_bad_inverses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_modules_and_batches():
    x, y = jnp.ones((5, 3), jnp.float32), jnp.ones((5, 2), jnp.float32)
    tx = linear.deep_linear_descent()

    def update(model, **arguments):
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        tx.update(
            params, tx.init(params), params, **({"module": model, "x": x, "y": y} | arguments)
        )

    narrow = {"param_dtype": jnp.float32}
    with pytest.raises(ValueError, match="deep_linear_descent needs the batch"):
        update(linear_mlp((3, 2), **narrow), x=None)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(N, 3\), got x of \(5, 4\)"):
        update(linear_mlp((3, 2), **narrow), x=jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="needs a linear network, got activation='tanh'"):
        update(linear_mlp((3, 2), activation="tanh", **narrow))
    with pytest.raises(ValueError, match="layer 1 has a bias"):
        update(linear_mlp((3, 2), bias_variance=1.0, **narrow))
    with pytest.raises(TypeError, match="got Linear; use online_natural_gradient_descent"):
        update(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"needs linear layers only, got .* at layer 2"):
        update(nnx.Sequential(nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)), nnx.relu))
    singular = linear_mlp((3, 3, 3), **narrow)
    singular.layers[1].kernel[...] = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"W_2 is singular \(rank 0 of 3\)"):
        update(singular, y=jnp.ones((5, 3)))
