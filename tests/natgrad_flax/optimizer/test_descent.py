"""The optax transformation: composition, schedules, damping, no retracing, scan."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import made
from flax import nnx

import natgrad_flax as ng

MSE = ng.MeanSquaredError()


def setup(widths=(6, 16, 16, 1), n=5, **settings):
    model = ng.MLP(widths, activation="tanh", rngs=nnx.Rngs(0), **settings)
    x = jax.random.normal(jax.random.key(1), (n, widths[0]))
    y = jax.random.normal(jax.random.key(2), (n, widths[-1]))
    return model, x / jnp.linalg.norm(x, axis=1, keepdims=True), y


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def one_step(tx, model, x, y):
    """Parameters before and after one step through nnx.Optimizer."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = leaves(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda m: MSE(m(x), y))(model)
    optimizer.update(model, grads, module=model, x=x, y=y)
    return before, leaves(nnx.state(model, nnx.Param))


def test_a_step_is_minus_the_rate_times_the_natural_gradient():
    model, x, y = setup()
    direction = leaves(ng.natural_gradient(model, x, y, structure=ng.BlockDiagonal(), loss=MSE))
    tx = ng.natural_gradient_descent(1 / 3, structure=ng.BlockDiagonal(), loss=MSE)
    before, after = one_step(tx, model, x, y)
    for a, b, d in zip(before, after, direction, strict=True):
        # two programs, whose undamped solves round differently
        np.testing.assert_allclose(b, a - d / 3, atol=1e-5)
        assert b.dtype == a.dtype


def test_clipping_momentum_and_decay_act_on_the_natural_gradient():
    model, x, y = setup()
    direction = leaves(
        ng.natural_gradient(model, x, y, structure=ng.Exact(), loss=MSE, damping=0.01)
    )
    norm = np.sqrt(sum(np.sum(d**2) for d in direction))
    tx = optax.chain(
        ng.natural_gradient_descent(1.0, structure=ng.Exact(), loss=MSE, damping=0.01),
        optax.clip_by_global_norm(float(norm) / 2),
        optax.trace(0.9),
        optax.add_decayed_weights(-0.1),
    )
    before, after = one_step(tx, model, x, y)
    for a, b, d in zip(before, after, direction, strict=True):
        np.testing.assert_allclose(b, 0.9 * a - d / 2, atol=1e-5)


def test_schedules_of_rate_and_damping():
    model, x, y = setup()
    tx = ng.natural_gradient_descent(
        lambda t: 0.5 / (1 + t), structure=ng.KFAC(), loss=MSE, damping=lambda t: 0.1 * 0.5**t
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for count in range(2):
        step, state = tx.update(params, state, params, module=model, x=x, y=y)
        expected = ng.natural_gradient(
            model, x, y, structure=ng.KFAC(), loss=MSE, damping=0.1 * 0.5**count
        )
        for a, b in zip(leaves(step), leaves(expected), strict=True):
            np.testing.assert_allclose(a, -0.5 / (1 + count) * b, atol=1e-5)
        assert state.steps == count + 1
        np.testing.assert_allclose(state.damping, 0.1 * 0.5**count, rtol=1e-6)


def test_relative_damping_is_relative_to_the_gram_diagonal():
    model, x, y = setup()
    signals = ng.jacobian_signals(model, x)
    mean = float(jnp.mean(jnp.diagonal(signals.gram())))
    settings = {"structure": ng.Exact(), "loss": MSE}
    found = ng.natural_gradient(model, x, y, damping=ng.RelativeDamping(0.02), **settings)
    same = ng.natural_gradient(model, x, y, damping=0.02 * mean / len(x), **settings)
    for a, b in zip(leaves(found), leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", made(3).values(), ids=made(3))
def test_relative_damping_is_invariant_to_the_scale_of_the_network(structure):
    """A network whose outputs are ten times as large takes a tenth of the step, damped too."""
    model, x, y = setup(param_dtype=jnp.float64, bias_variance=0.1)
    x, y = x.astype(jnp.float64), y.astype(jnp.float64)
    signals, residual = ng.fisher_signals(model, x, y, loss=MSE)
    scaled = jax.tree.map(lambda leaf: leaf, signals)
    layers = tuple(
        ng.DenseSignals(a.inputs, 10 * a.derivatives, a.bias_scale, a.path) for a in scaled.layers
    )
    scaled = ng.Signals(layers, signals.outputs)
    small = structure.solve(signals, residual, 1e-2 * structure.damping_scale(signals))
    large = structure.solve(scaled, residual, 1e-2 * structure.damping_scale(scaled))
    for a, b in zip(leaves(small), leaves(large), strict=True):
        np.testing.assert_allclose(b, a / 10, atol=1e-10 * np.abs(a).max())


def test_levenberg_marquardt_follows_the_reduction_ratio():
    """Linear network in its parameters: the quadratic model is exact, so the damping shrinks."""
    model = ng.MLP((6, 1), activation="identity", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (12, 6))
    y = jax.random.normal(jax.random.key(1), (12, 1))
    tx = ng.natural_gradient_descent(
        1.0, structure=ng.Exact(), loss=MSE, damping=ng.LevenbergMarquardt(initial=1e-3)
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    _, after = tx.update(params, state, params, module=model, x=x, y=y)
    np.testing.assert_allclose(after.damping, 1e-3 * 2 / 3, rtol=1e-6)

    adaptive = ng.LevenbergMarquardt()
    value = jnp.asarray(0.5)
    for ratio, factor in ((0.1, 1.5), (0.5, 1.0), (0.9, 2 / 3), (np.nan, 1.5), (-3.0, 1.5)):
        found = adaptive.adapt(value, jnp.asarray(-2.0 * ratio), jnp.asarray(-2.0))
        np.testing.assert_allclose(found, 0.5 * factor, rtol=1e-6)
    tiny = adaptive.adapt(jnp.asarray(1e-12), jnp.asarray(-1.0), jnp.asarray(-1.0))
    assert tiny == pytest.approx(1e-12)
    huge = adaptive.adapt(jnp.asarray(9e5), jnp.asarray(jnp.nan), jnp.asarray(-1.0))
    assert huge == pytest.approx(1e6)


def test_levenberg_marquardt_inside_nnx_optimizer():
    """The trial step of the reduction ratio is the step that is taken."""
    model, x, y = setup(bias_variance=0.1)
    damping = ng.LevenbergMarquardt(initial=0.1)
    tx = ng.natural_gradient_descent(1.0, structure=ng.KFAC(), loss=MSE, damping=damping)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: MSE(m(x), y))(model)
        slopes = ng.natural_gradient(
            model, x, y, structure=ng.KFAC(), loss=MSE, damping=optimizer.opt_state.damping[...]
        )
        inner = sum(
            jnp.sum(a * b)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True)
        )
        optimizer.update(model, grads, module=model, x=x, y=y)
        return value, MSE(model(x), y), -inner / 2

    expected = 0.1
    for _ in range(3):
        before, after, predicted = step(model, optimizer)
        expected = float(damping.adapt(jnp.asarray(expected), after - before, predicted))
        np.testing.assert_allclose(optimizer.opt_state.damping[...], expected, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_predicted_reduction_is_exact_for_a_quadratic_loss():
    """Ratio 1: L(theta - eta d) - L = (-eta + eta^2 / 2) <g, d> + damping terms that vanish."""
    model = ng.MLP((6, 1), activation="identity", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (12, 6), jnp.float64)
    y = jax.random.normal(jax.random.key(1), (12, 1), jnp.float64)
    signals, residual = ng.fisher_signals(model, x, y, loss=MSE)
    update = ng.Exact().solve(signals, residual, 0.0)
    slope = residual.inner(signals.layers, update)
    moved = signals.layers[0].jvp(update[0])
    actual = MSE(signals.outputs - 0.3 * moved, y) - MSE(signals.outputs, y)
    np.testing.assert_allclose((-0.3 + 0.3**2 / 2) * slope, actual, rtol=1e-10)


def test_monte_carlo_draws_new_targets_each_step():
    model, x, _ = setup(widths=(6, 16, 3))
    y = jnp.eye(3)[jnp.arange(5) % 3]
    tx = ng.natural_gradient_descent(
        1.0, structure=ng.Exact(), loss=ng.SoftmaxCrossEntropy(), damping=0.1, fisher="mc"
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    first, state = tx.update(params, state, params, module=model, x=x, y=y)
    second, _ = tx.update(params, state, params, module=model, x=x, y=y)
    again, _ = tx.update(params, tx.init(params), params, module=model, x=x, y=y)
    assert not np.allclose(leaves(first)[0], leaves(second)[0])
    np.testing.assert_array_equal(leaves(first)[0], leaves(again)[0])


def test_jit_traces_once_and_scan_gives_the_same_steps():
    model, x, y = setup()
    tx = ng.natural_gradient_descent(
        0.5, structure=ng.Exact(), loss=MSE, damping=ng.RelativeDamping(1e-2)
    )
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.as_pure(params)
    traces = []

    def step(carry, _):
        traces.append(None)
        params, state = carry
        copy = nnx.merge(graphdef, params)
        updates, state = tx.update(params, state, params, module=copy, x=x, y=y)
        return (optax.apply_updates(params, updates), state), MSE(copy(x), y)

    compiled = jax.jit(step)
    carry = (params, tx.init(params))
    looped = []
    for _ in range(4):
        carry, value = compiled(carry, None)
        looped.append(value)
    assert len(traces) == 1
    (final, state), scanned = jax.jit(lambda c: jax.lax.scan(step, c, length=4))(
        (params, tx.init(params))
    )
    np.testing.assert_allclose(scanned, jnp.stack(looped), rtol=1e-3)
    for a, b in zip(leaves(final), leaves(carry[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert state.steps == 4
    assert scanned[-1] < scanned[0] / 2


def test_training_loop_of_the_readme():
    """The loop that the README shows is at most 15 lines, runs, and converges."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    loop = re.search(r"<!-- training loop -->\n```python\n(.*?)```", text, re.DOTALL)
    assert loop, "README.md has no block after <!-- training loop -->"
    code = loop.group(1)
    assert len(code.strip().splitlines()) <= 15
    model, x, y = setup(widths=(6, 64, 64, 1))
    scope = {"ng": ng, "nnx": nnx, "model": model, "x": x, "y": y}
    exec(code, scope)
    assert MSE(model(x), y) < 1e-3 * MSE(setup(widths=(6, 64, 64, 1))[0](x), y)
