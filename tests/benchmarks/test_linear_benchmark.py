"""The benchmark of the linear step measures what it says; nothing here looks at times."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks import linear
from natgrad_flax.linear import deep_linear_descent, online_natural_gradient_descent

SIZES = (6, 3, 200)


def after(optimizer, problem):
    model, x, y = problem
    return nnx.merge(nnx.graphdef(model), linear.prepare(optimizer, model, x, y).natural())


@pytest.mark.parametrize("method", linear.OPTIMIZERS)
def test_a_right_step_passes_closely(method):
    problem = linear.make_problem(*SIZES)
    found = linear.check_step(method, *problem, after(linear.OPTIMIZERS[method](), problem))
    assert found < (0.4 if method == "online" else 1e-3)


def test_problems_are_well_conditioned_float32_and_always_the_same():
    (model, x, y), (again, *batch) = (linear.make_problem(20, 16, 100) for _ in range(2))
    for one, other in zip((x, y), batch, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == jnp.float32
        assert one.shape == (100, 20)
    product = np.eye(20)
    for layer, same in zip(model.layers, again.layers, strict=True):
        np.testing.assert_array_equal(layer.kernel[...], same.kernel[...])
        product = product @ np.asarray(layer.kernel[...])
    values = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(values, np.linspace(3, 1, 20), rtol=1e-4)


def test_reference_is_the_exact_fisher():
    """The undamped defect vanishes for a step that moves outputs like F^+ with F written out."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((3, 3)) for _ in range(2)]
    x, y = (rng.standard_normal((30, 3)) for _ in range(2))

    def outputs(first, second):
        return jnp.asarray(x) @ first @ second

    with jax.enable_x64(True):
        parts = jax.jacfwd(outputs, (0, 1))(*map(jnp.asarray, weights))
    jacobian = np.concatenate([np.asarray(part).reshape(90, 9) for part in parts], axis=1)
    residual = (y - x @ weights[0] @ weights[1]).ravel()
    inverse = np.linalg.pinv(jacobian.T @ jacobian / 30, rcond=1e-10)
    moved = jacobian @ inverse @ jacobian.T @ residual / 30
    # the step of Eq. 16, from the least-squares solution
    target = np.linalg.lstsq(x, y, rcond=None)[0] - weights[0] @ weights[1]
    steps = [target @ np.linalg.inv(weights[1]) / 2, np.linalg.inv(weights[0]) @ target / 2]
    assert linear._defect(weights, steps, x, y, 0.0) < 1e-9
    pushed = jacobian @ np.concatenate([step.ravel() for step in steps])
    np.testing.assert_allclose(pushed, moved, rtol=1e-7, atol=1e-9)
    assert linear._defect(weights, [1.1 * step for step in steps], x, y, 0.0) > 0.05


def uncoupled(rate):
    """Without the 1/L of Eqs. 10 and 20."""
    return deep_linear_descent(SIZES[1] * rate)


WRONG = {
    "plain gradient": ("exact", lambda rate: optax.with_extra_args_support(optax.sgd(rate))),
    "no 1/L": ("exact", uncoupled),
    "five per cent too long": ("exact", lambda rate: deep_linear_descent(1.05 * rate)),
    "another damping": ("damped", lambda rate: deep_linear_descent(rate, damping=0.02)),
    "no damping": ("damped", deep_linear_descent),
    "online, plain gradient": (
        "online",
        lambda rate: optax.with_extra_args_support(optax.sgd(rate)),
    ),
    "online, three times too long": (
        "online",
        lambda rate: online_natural_gradient_descent(3 * rate, damping=linear.DAMPING),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_fails_the_benchmark(name, monkeypatch):
    method, make = WRONG[name]
    monkeypatch.setitem(linear.OPTIMIZERS, method, lambda: make(linear.LEARNING_RATE))
    with pytest.raises(ArithmeticError, match=f"the {method} step u is wrong"):
        linear.LinearStep().measure(method, *SIZES)


def test_parameters_that_are_not_finite_fail():
    problem = linear.make_problem(*SIZES)
    broken = nnx.clone(problem[0])
    broken.layers[1].kernel[...] = jnp.full((6, 6), jnp.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        linear.check_step("exact", *problem, broken)


def test_the_baseline_is_gradient_descent():
    model, x, y = linear.make_problem(*SIZES)
    steps = linear.prepare(linear.OPTIMIZERS["exact"](), model, x, y)
    slopes = nnx.grad(lambda model: ng.MeanSquaredError()(model(x), y))(model)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), slopes)
    for found, wanted in zip(jax.tree.leaves(steps.sgd()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_asv_figures_are_those_of_one_measurement(tmp_path, monkeypatch):
    case, calls, real = ("damped", *SIZES), [], linear.prepare

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(linear, "prepare", counted)
    values = {}
    for name in [name for name in dir(linear.LinearStep) if name.startswith("track_")]:
        suite = linear.LinearStep()
        suite.setup(str(tmp_path), *case)
        values[name] = getattr(suite, name)(str(tmp_path), *case)
    assert len(calls) == 1
    ratio = values["track_step"] / values["track_sgd_step"]
    assert values["track_ratio_to_sgd"] == pytest.approx(ratio)
    assert values["track_flops"] > 0
    assert values["track_temporary_memory"] > 0


def test_damping_of_the_check_is_the_one_of_the_steps(monkeypatch):
    """The check reads the constant that the optimizers read."""
    problem = linear.make_problem(*SIZES)
    moved = after(linear.OPTIMIZERS["damped"](), problem)
    monkeypatch.setattr(linear, "DAMPING", dataclasses.replace(linear.DAMPING, initial=0.02))
    with pytest.raises(ArithmeticError, match="the damped step u is wrong"):
        linear.check_step("damped", *problem, moved)


def test_too_few_samples_for_a_check_are_left_out(tmp_path):
    with pytest.raises(NotImplementedError, match="fewer than 10 samples a unit"):
        linear.LinearStep().setup(str(tmp_path), "online", 6, 3, 59)
    for case in (("online", 6, 3, 60), ("exact", 6, 3, 8)):
        assert linear.LinearStep().skipped(*case) is None
