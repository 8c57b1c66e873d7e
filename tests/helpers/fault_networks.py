"""A small network whose forward pass comes from outside, and the entries that take it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import natgrad_flax as ng

X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
Y = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
SETTINGS = {"structure": ng.Exact(), "loss": ng.MeanSquaredError(), "damping": 0.1}


class Net(nnx.Module):
    """Two layers, and a forward pass and attributes from outside."""

    def __init__(self, forward=None, **attributes):
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        self.a = nnx.Linear(5, 3, rngs=rngs)
        self.b = nnx.Linear(3, 2, rngs=rngs)
        self.forward = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, x):
        return plain(self, x) if self.forward is None else self.forward(self, x)


def plain(model, x):
    return model.b(jnp.tanh(model.a(x)))


def kernels(model, x=X, **settings):
    """J_l J_l^T of the layers a and b, the rest of the parameters after them."""
    return [layer.gram() for layer in ng.jacobian_signals(model, x, **settings).layers]


def update(model, x=X, y=Y, **settings):
    return ng.natural_gradient(model, x, y, **{**SETTINGS, **settings})


def step(model, x=X, y=Y, params=None):
    tx = ng.natural_gradient_descent(0.1, **SETTINGS)
    params = nnx.state(Net(), nnx.Param) if params is None else params
    return tx.update(params, tx.init(params), params, module=model, x=x, y=y)[0]


ENTRIES = {
    "natural_gradient": update,
    "optimizer": step,
    "describe": lambda model, x=X: ng.describe(model, x),
    "jacobian_signals": lambda model, x=X: ng.jacobian_signals(model, x),
    "optimal_learning_rate": lambda model, x=X: ng.optimal_learning_rate(ng.Exact(), model, x=x),
}
