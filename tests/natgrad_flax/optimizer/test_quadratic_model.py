"""Learning rate and momentum from the quadratic model, against dense algebra."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK
from flax import nnx
from jax.flatten_util import ravel_pytree

import natgrad_flax as ng

MSE = ng.MeanSquaredError()
CLASSES = ng.SoftmaxCrossEntropy()


class Net(nnx.Module):
    """Six inputs, a layer of four, and three outputs at each of two positions, or two heads."""

    def __init__(self, rngs, heads=False):
        settings = {"param_dtype": jnp.float64, "rngs": rngs}
        self.hidden, self.readout = nnx.Linear(3, 4, **settings), nnx.Linear(4, 3, **settings)
        self.heads = heads

    def __call__(self, x):
        out = self.readout(jnp.tanh(self.hidden(x)))
        return {"class": out, "number": out[..., 0, :2]} if self.heads else out


def problem(kind):
    """A model, x, y, weights, the loss; loss and dense Fisher as functions of parameters."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (4, 2, 3))
    labels = jax.random.randint(keys[1], (4, 2), 0, 3)
    weights = jax.random.uniform(keys[2], (4, 2))
    model = Net(nnx.Rngs(0), heads=kind == "heads")
    graphdef, params = nnx.split(model)
    flat, tree = ravel_pytree(params)

    def outputs(theta):
        return nnx.merge(graphdef, tree(theta))(x)

    def fisher_of(loss, part, scale):
        """Of rows (R, C) that count by their scale, which sum to 1."""
        jacobian = jax.jacrev(part)
        return lambda theta: jnp.einsum(
            "r,rcp,rcd,rdq->pq",
            scale,
            jacobian(theta),
            loss.fisher(part(theta)),
            jacobian(theta),
        )

    if kind == "heads":
        numbers = jax.random.normal(keys[3], (4, 2))
        loss = ng.Heads({"class": CLASSES, "number": MSE}, weights={"class": 1.0, "number": 0.5})
        y, weights = {"class": labels, "number": numbers}, None
        one = fisher_of(CLASSES, lambda t: outputs(t)["class"].reshape(-1, 3), jnp.full(8, 1 / 8))
        two = fisher_of(MSE, lambda t: outputs(t)["number"], jnp.full(4, 1 / 4))

        def fisher(theta):
            return one(theta) + 0.5 * two(theta)
    else:
        loss, y = CLASSES, labels
        scale = (weights / weights.sum()).reshape(-1)
        fisher = fisher_of(CLASSES, lambda t: outputs(t).reshape(-1, 3), scale)

    def value(theta):
        given = () if weights is None else (weights,)
        return loss(outputs(theta), y, *given)

    return model, x, y, weights, loss, flat, value, fisher


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "microbatches"), [("positions", 2), ("heads", 1)])
def test_the_second_step_minimises_the_damped_model(kind, microbatches):
    model, x, y, weights, loss, flat, value, fisher = problem(kind)
    rho, structure = 0.03, ng.BlockDiagonal()
    settings = {"structure": structure, "loss": loss, "damping": rho}
    tx = ng.natural_gradient_descent(ng.QuadraticModel(), microbatches=microbatches, **settings)
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)
    steps = []
    for _ in range(2):
        direction = ravel_pytree(ng.natural_gradient(model, x, y, weights=weights, **settings))[0]
        theta = flat + sum(steps)
        columns = jnp.stack([-direction, *steps[-1:]], axis=1)
        gradient = jax.grad(value)(theta)
        model_matrix = columns.T @ (fisher(theta) + rho * jnp.eye(len(flat))) @ columns
        expected = -columns @ jnp.linalg.solve(model_matrix, columns.T @ gradient)
        update, state = tx.update(params, state, module=model, x=x, y=y, weights=weights)
        np.testing.assert_allclose(ravel_pytree(update)[0], expected, rtol=1e-9, atol=1e-12)
        steps.append(ravel_pytree(update)[0])
        nnx.update(model, jax.tree.map(jnp.add, nnx.state(model, nnx.Param), update))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gradient", ["batch", "incoming"])
def test_on_a_quadratic_loss_it_is_conjugate_gradients(gradient):
    # which end after as many steps as there are parameters; the gradient alone would take hundreds
    key = jax.random.key(1)
    x = jax.random.normal(key, (9, 5)) * jnp.array([1, 3, 10, 30, 100.0])
    y = jax.random.normal(jax.random.key(2), (9, 1))
    model = nnx.Linear(5, 1, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    tx = ng.natural_gradient_descent(
        ng.QuadraticModel(), structure=ng.Diagonal(), loss=MSE, damping=1e-12, gradient=gradient
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    best = np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[0]
    errors = []
    for _ in range(5):
        grads = nnx.grad(lambda m: MSE(m(x), y))(model)
        optimizer.update(model, grads, module=model, x=x, y=y)
        errors.append(float(np.max(np.abs(model.kernel[...] - best))))
    assert errors[-1] < 1e-9
    assert errors[-2] > 1e-4


def train(steps, **settings):
    """Losses of batches before and after each step of a classifier that ignores most inputs."""
    key = jax.random.key(3)
    x = jax.random.normal(key, (256, 8))
    y = jnp.argmax(x[:, :3] + x[:, 3:6] * x[:, 5:], axis=1)
    model = nnx.Sequential(
        nnx.Linear(8, 24, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(24, 3, rngs=nnx.Rngs(1))
    )
    tx = ng.natural_gradient_descent(loss=CLASSES, **settings)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        before, grads = nnx.value_and_grad(lambda m: CLASSES(m(x), y))(model)
        optimizer.update(model, grads, module=model, x=x, y=y)
        return before, CLASSES(model(x), y)

    pairs = []
    for index in range(steps):
        rows = np.random.default_rng(index).integers(0, 256, 32)
        pairs.append(step(model, optimizer, x[rows], y[rows]))
    return np.asarray(pairs), float(CLASSES(model(x), y))


def test_without_settings_it_trains_and_no_step_raises_the_loss_of_its_batch():
    # one draw a sample and no averages: the structure alone would blow up here
    pairs, final = train(60, structure=ng.Exact(), fisher="mc")
    assert (pairs[:, 1] <= pairs[:, 0]).all()
    assert final < 0.4 * pairs[0, 0]


def test_a_step_that_would_break_the_network_is_left_out():
    # a damping that float32 loses beside the Fisher: without the trial of the step it ends in NaN
    tiny = ng.LevenbergMarquardt(initial=1e-10, minimum=1e-12, decrease=0.5)
    pairs, final = train(
        20, learning_rate=ng.QuadraticModel(), structure=ng.KFAC(), fisher="mc", damping=tiny
    )
    assert np.isfinite(pairs).all()
    assert (pairs[:, 1] <= pairs[:, 0]).all()
    assert np.isfinite(final)


def test_a_batch_of_nan_leaves_the_averages_as_they_are():
    x = jax.random.normal(jax.random.key(3), (12, 3))
    y = jnp.sin(x[:, :1])
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = ng.natural_gradient_descent(
        structure=ng.KFAC(), loss=MSE, average=ng.MovingAverage(0.9), example=(model, x)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(lambda m: MSE(m(x), y))(model)
        optimizer.update(model, grads, module=model, x=x, y=y)
        return value

    losses = [step(model, optimizer, rows, y) for rows in (x, jnp.nan * x, x, x, x)]
    assert losses[2] > losses[3] > losses[4]


def test_settings_that_do_not_fit():
    settings = {"structure": ng.Exact(), "loss": MSE, "damping": 0.1}
    with pytest.raises(TypeError, match="momentum must be True or False"):
        ng.QuadraticModel(momentum=0.9)
    with pytest.raises(ValueError, match="both take the step before along"):
        ng.natural_gradient_descent(ng.QuadraticModel(), momentum=0.5, **settings)
    with pytest.raises(ValueError, match="chooses its own"):
        ng.natural_gradient_descent(
            ng.QuadraticModel(momentum=False), momentum=ng.SPRING(0.5, max_norm=1.0), **settings
        )
    with pytest.raises(TypeError, match="incoming"):
        ng.natural_gradient_descent(structure=ng.Exact(), loss=MSE, gradient="incoming")


def test_frozen_parameters_beside_a_loop_and_gradients_of_another_dtype():
    class Looped(nnx.Module):
        def __init__(self):
            one = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            graphdef, state = nnx.split(one)
            self.layers = nnx.merge(
                graphdef, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
            )

        def __call__(self, x):
            return nnx.scan(
                lambda h, layer: jnp.tanh(layer(h)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )(x, self.layers)

    def only(path, value):
        return isinstance(value, nnx.Param) and path[-1] == "kernel"

    model, x = Looped(), jnp.eye(3)
    tx = ng.natural_gradient_descent(structure=ng.Exact(), loss=MSE, wrt=only)
    params = nnx.state(model, only)
    before = tx.init(params)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    step, after = tx.update(half, before, module=model, x=x, y=jnp.ones((3, 3)))
    assert float(jnp.abs(jax.tree.leaves(step)[0]).max()) > 0
    # so that lax.scan can carry it
    shapes = [jax.tree.map(lambda leaf: leaf.dtype, state.before) for state in (before, after)]
    assert shapes[0] == shapes[1]


def test_one_damping_a_layer_counts_as_none_in_the_model():
    inner = jnp.diag(jnp.array([2.0, 3.0])), jnp.array([-1.0, -1.0])
    ones = {"w": jnp.ones(3)}
    steps = [
        ng.QuadraticModel().step(lambda directions: inner, ones, ones, rho)[0]["w"]
        for rho in (0.0, jnp.array([1.0, 5.0]))
    ]
    np.testing.assert_array_equal(*steps)


def by_reverse_mode(slope):
    """tanh with a rule for its derivative by reverse mode alone."""

    @jax.custom_vjp
    def act(h):
        return jnp.tanh(h)

    act.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: (slope(h, g),))
    return act


@pytest.mark.usefixtures("x64")
def test_a_derivative_by_reverse_mode_alone():
    """J times a direction is the transpose of the backward pass then."""
    x, y = jax.random.normal(jax.random.key(1), (3, 4)), jnp.ones((3, 2))

    def steps(act):
        keys = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        model = nnx.Sequential(nnx.Linear(4, 5, **keys), act, nnx.Linear(5, 2, **keys))
        tx = ng.natural_gradient_descent(structure=ng.Diagonal(), loss=MSE)
        params = nnx.state(model)

        @partial(jax.jit, compiler_options=QUICK)
        def second(params):
            state = tx.init(params)
            for _ in range(2):
                found, state = tx.update(params, state, module=model, x=x, y=y)
            return ravel_pytree(found)[0]

        return second(params)

    found = steps(by_reverse_mode(lambda h, g: g * (1 - jnp.tanh(h) ** 2)))
    np.testing.assert_allclose(found, steps(jnp.tanh), rtol=1e-10)


def test_a_derivative_of_neither_mode():
    def slope(h, g):
        return jax.pure_callback(
            lambda h, g: g * (1 - np.tanh(h) ** 2), g, h, g, vmap_method="expand_dims"
        )

    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), by_reverse_mode(slope))
    tx = ng.natural_gradient_descent(structure=ng.Exact(), loss=MSE)
    params = nnx.state(model)
    with pytest.raises(ValueError, match="QuadraticModel needs J times a direction"):
        tx.update(params, tx.init(params), module=model, x=jnp.eye(3), y=jnp.ones((3, 2)))
