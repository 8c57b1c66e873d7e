"""Tables whose rows are looked up: the same as one-hot inputs, and never of their size."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.signals.capture import jacobian_signals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Residual
from natgrad_flax.signals.lookup import LookupSignals, OneHot
from natgrad_flax.signals.shared import weigh_rows

pytestmark = pytest.mark.usefixtures("x64")

N, T, ROWS, WIDTH, OUTPUTS = 5, 4, 7, 3, 2

STRUCTURES = [
    ng.Exact(),
    ng.KFAC(split="pi"),
    ng.KFAC(sharing="reduce"),
    ng.EKFAC(),
    ng.Foof("units"),
    ng.Diagonal(),
]


class Tokens(nnx.Module):
    """A scaled table that is looked up twice, and a readout of the mean."""

    def __init__(self, rows, rngs, dtype=jnp.float64):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (rows, WIDTH), dtype))
        self.readout = nnx.Linear(WIDTH, OUTPUTS, rngs=rngs, param_dtype=dtype)

    def __call__(self, x):
        table = 0.5 * self.table[...]
        both = jnp.tanh(table[x] + jnp.flip(table[x[:, :2]], 1).mean(1, keepdims=True))
        return self.readout(both.mean(1))


@pytest.fixture
def both():
    """Signals with a table by its rows and with one-hot inputs."""
    return _both()


@functools.cache
def _both():
    x = jax.random.randint(jax.random.key(1), (N, T), 0, ROWS)
    found = jacobian_signals(Tokens(ROWS, nnx.Rngs(0)), x)
    found = weigh_rows(found, jnp.linspace(0.5, 1.5, N)[:, None])
    table, *rest = found.layers
    assert isinstance(table, LookupSignals)
    assert table.inputs.scale == 0.5
    assert table.num_positions == T + 2
    return found, Signals((table.dense(), *rest), found.outputs)


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected
    )


def test_signals_are_those_of_one_hot_inputs(both):
    table, dense = (signals.layers[0] for signals in both)
    cotangents = jax.random.normal(jax.random.key(2), (N, T + 2, 1, WIDTH))
    update = {"kernel": jax.random.normal(jax.random.key(3), (ROWS, WIDTH))}
    close(table.jacobian(), dense.jacobian())
    close(table.gram(), dense.gram())
    close(table.gram_norms(), dense.gram_norms())
    close(table.squares(), dense.squares())
    close(table.local_vjp(cotangents), dense.local_vjp(cotangents))
    close(table.local_jvp(update), dense.local_jvp(update))
    for sharing in ("expand", "reduce"):
        close(table.row_norms(sharing), dense.row_norms(sharing))
        close(table.rows(sharing), dense.rows(sharing))
    inputs = dense.rows("expand")[0][0]
    close(jnp.diag(table.counts()), inputs.T @ inputs)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_structures_are_those_of_one_hot_inputs(both, structure):
    w = jax.random.normal(jax.random.key(4), (N, OUTPUTS))

    @jax.jit
    def answers(signals):
        operator = structure.operator(signals)
        found = [structure.solve(signals, Residual(w, None), rho) for rho in (0.1, 0.0)]
        ones = tuple(jax.tree.map(jnp.ones_like, update) for update in found[0])
        found += [operator.matvec(ones), operator.diagonal(), operator.logdet(0.1)]
        found += [operator.extremes(0.1), operator.trace(), operator.to_dense(0.3)]
        if isinstance(structure, ng.KFAC | ng.EKFAC | ng.Foof):
            inverse = structure.invert(structure.moments(signals), 0.1, N)
            found += [structure.apply(inverse, found[0]), structure.damping_scale(signals)]
        return found

    close(*map(answers, both))


def test_a_sample_of_a_damped_posterior_has_its_covariance(both):
    block = ng.KFAC().operator(both[0]).blocks[0]
    keys = jax.random.split(jax.random.key(5), 4000)
    draws = jax.vmap(lambda key: block.sample(key, 0.2)[0]["kernel"].reshape(-1))(keys)
    covariance, expected = draws.T @ draws / len(keys), block.to_dense(0.2)
    error = jnp.max(jnp.abs(covariance - expected)) / jnp.max(jnp.abs(expected))
    assert error < 6 / math.sqrt(len(keys))


@pytest.mark.parametrize(
    ("structure", "average"),
    [
        (ng.KFAC(), None),
        (ng.KFAC(split="pi"), ng.MovingAverage()),
        (ng.EKFAC(), ng.MovingAverage()),
    ],
    ids=["K-FAC", "averaged K-FAC", "averaged EKFAC"],
)
def test_a_vocabulary_of_fifty_thousand(structure, average):
    """Its one-hot factor would have 10 GB, and its eigenvectors take hours."""
    rows = 50_000
    model = Tokens(rows, nnx.Rngs(0), jnp.float32)
    x = jax.random.randint(jax.random.key(1), (N, T), 0, rows)
    y = jax.nn.one_hot(jnp.arange(N) % OUTPUTS, OUTPUTS, dtype=jnp.float32)
    settings = {"average": average, "example": (model, x)} if average else {}
    descent = ng.natural_gradient_descent(
        0.1, structure=structure, loss=ng.SoftmaxCrossEntropy(), damping=0.1, **settings
    )
    optimizer = nnx.Optimizer(model, descent, wrt=nnx.Param)
    before = model.table[...]
    gradients = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, gradients, module=model, x=x, y=y)
    moved = jnp.any(model.table[...] != before, axis=1)
    assert set(np.flatnonzero(moved)) == set(np.unique(x).tolist())


def test_out_of_range_and_clipped_rows():
    """As jax.numpy does: rows that are none are NaN there, so only clipped ones are met."""
    table = jnp.arange(6.0).reshape(3, 2)
    model = ng.from_function(
        lambda p, x: jnp.take(p["table"], x, axis=0, mode="clip").sum(1), {"table": table}
    )
    x = jnp.array([[0, 5], [2, -4]])
    layer = jacobian_signals(model, x).layers[0]
    assert isinstance(layer, LookupSignals)
    close(layer.inputs.indices, jnp.array([[0, 2], [2, 0]]))
    expected = jax.jacobian(lambda t: jnp.take(t, x, axis=0, mode="clip").sum(1))(table)
    close(layer.jacobian(), expected)


def test_with_a_bias_inputs_are_one_hot():
    model = ng.from_function(
        lambda p, x: (p["table"][x] + p["bias"]).sum(1),
        {"table": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    )
    (layer,) = jacobian_signals(model, jnp.array([[0, 2], [1, 1]])).layers
    assert not isinstance(layer, LookupSignals)
    assert layer.bias_scale == 1


def test_one_hot_inputs():
    inputs = OneHot(jnp.array([[1, 3]]), 3, 2.0)
    close(inputs.dense(jnp.float64)[0, :, 0], jnp.array([[0.0, 2, 0], [0, 0, 0]]))
    assert inputs.shape == (1, 2, 1, 3)
    assert dataclasses.replace(inputs, indices=inputs.indices[:, :1]).shape == (1, 1, 1, 3)
