"""The improved empirical Fisher: directions r_n / |r_n| (Wu et al. 2024)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from natgrad_reference import flatten, make_mlp, reference, solve_dense

import natgrad_flax as ng

pytestmark = pytest.mark.usefixtures("x64")

MSE = ng.MeanSquaredError()
EXACT = ng.Exact()


def step(model, x, y, **settings):
    graphdef, state = nnx.split(model)

    @partial(jax.jit, static_argnames=("fisher", "damping"))
    def update(state, fisher, damping):
        return ng.natural_gradient(
            nnx.merge(graphdef, state), x, y, fisher=fisher, damping=damping, **settings
        )

    return lambda fisher, damping: flatten(update(state, fisher, damping))


@pytest.mark.parametrize(
    "weights", [None, np.array([0.5, 2.0, 0.0, 1.5])], ids=["mean", "weighted"]
)
def test_of_one_output_it_is_the_exact_fisher(weights):
    """Its seeds are 1 or -1, and the Fisher does not see a sign."""
    rng = np.random.default_rng(0)
    model = make_mlp((3, 8, 1), 0, activation="tanh")
    x, y = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(4, 1)))
    run = step(model, x, y, structure=EXACT, loss=MSE, weights=weights)
    wanted = run("exact", 0.1)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(run("improved", 0.1), wanted, atol=1e-12 * scale, rtol=0)
    assert np.abs(run("empirical", 0.1) - wanted).max() > 0.1 * scale
    if weights is None:
        free = run("exact", 0.0)
        np.testing.assert_allclose(
            run("improved", 0.0), free, atol=1e-11 * np.abs(free).max(), rtol=0
        )


def test_of_several_outputs_against_its_definition():
    rng = np.random.default_rng(1)
    loss = ng.SoftmaxCrossEntropy()
    model = make_mlp((3, 6, 4), 0, activation="tanh")
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jax.nn.one_hot(jnp.arange(5) % 4, 4)
    residual = np.asarray(loss.residual(model(x), y))
    seeds = residual / np.linalg.norm(residual, axis=1, keepdims=True)
    wanted, _ = solve_dense(EXACT, reference(model, x, y, loss, seeds[:, None]), 0.1)
    found = step(model, x, y, structure=EXACT, loss=loss)("improved", 0.1)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_sample_without_a_residual_has_no_direction():
    model = make_mlp((3, 6, 2), 0, activation="tanh")
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)))
    y = model(x).at[1:].add(1.0)
    found = step(model, x, y, structure=EXACT, loss=MSE)("improved", 0.1)
    both = step(model, x[1:], y[1:], structure=EXACT, loss=MSE)("improved", 0.1 * 3 / 2)
    np.testing.assert_allclose(found, both, atol=1e-12)
