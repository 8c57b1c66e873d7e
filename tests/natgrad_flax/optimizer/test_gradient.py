"""How often a model is traced: once, whatever is made of it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import natgrad_flax as ng

TRACES = []


class Counted(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        TRACES.append(x.shape)
        return self.last(jnp.tanh(self.first(x)))


X, Y = jax.random.normal(jax.random.key(0), (6, 3)), jnp.ones((6, 2))
SETTINGS = {
    "plain": {},
    "damped": {"damping": 0.1},
    "mc": {"damping": 0.1, "fisher": "mc", "key": jax.random.key(0)},
    "empirical": {"fisher": "empirical"},
    "microbatches": {"microbatches": 2},
    "another batch": {"fisher_x": X[:4], "damping": 0.1},
}


@pytest.fixture(autouse=True)
def forgotten():
    jax.clear_caches()
    TRACES.clear()


@pytest.mark.parametrize("name", SETTINGS)
def test_first_call_traces_the_model_once(name):
    settings = {"damping": 0.0, **SETTINGS[name], "check_samples": False}
    call = lambda: ng.natural_gradient(  # noqa: E731
        Counted(nnx.Rngs(0)), X, Y, structure=ng.KFAC(), loss=ng.MeanSquaredError(), **settings
    )
    call()
    # and once more for the gradient where the Fisher has a batch of its own
    assert len(TRACES) == 1 + (name == "another batch")
    call()
    assert len(TRACES) == 1 + (name == "another batch")


def test_operator():
    ng.fisher(
        Counted(nnx.Rngs(0)),
        X,
        structure=ng.Exact(),
        loss=ng.MeanSquaredError(),
        check_samples=False,
    )
    assert len(TRACES) == 1


@pytest.mark.parametrize("average", [None, ng.MovingAverage(), ng.MovingAverage(every=2)])
def test_step_of_the_optimizer(average):
    model = Counted(nnx.Rngs(0))
    example = {"average": average, "example": (model, X)} if average else {}
    optimizer = ng.natural_gradient_descent(
        0.1,
        structure=ng.KFAC(),
        loss=ng.MeanSquaredError(),
        damping=0.1,
        check_samples=False,
        **example,
    )
    params = nnx.state(model, nnx.Param)
    state = optimizer.init(params)
    TRACES.clear()

    @jax.jit
    def step(params, state):
        return optimizer.update(
            params, state, module=nnx.merge(nnx.graphdef(model), params), x=X, y=Y
        )

    step(params, state)
    # steps between renewals have a program of their own
    assert len(TRACES) == 1 + (average is not None and average.every > 1)
