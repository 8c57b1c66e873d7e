"""The layers of a loop go through one program, and take the steps that they would take alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_flax as ng

pytestmark = pytest.mark.usefixtures("x64")

SOFTMAX = ng.SoftmaxCrossEntropy()
X = np.random.default_rng(0).normal(size=(3, 2, 4))
Y = np.random.default_rng(1).integers(0, 4, 3)


class Layer(nnx.Module):
    """A normalisation and an affine layer, on two positions a sample."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, param_dtype=float, rngs=rngs)
        self.affine = nnx.Linear(4, 4, param_dtype=float, rngs=rngs)

    def __call__(self, h):
        return h + jnp.tanh(self.affine(self.norm(h)))


class Deep(nnx.Module):
    """The same layers in a loop, each run again in the backward pass, or one after the other.

    With ends there is an affine layer before them and one behind.
    """

    def __init__(self, steps, looped, ends):
        keys = jax.random.split(jax.random.key(0), steps)
        layers = [Layer(nnx.Rngs(key)) for key in keys]
        self.looped, self.ends = looped, ends
        graphdef, _ = nnx.split(layers[0])
        states = [nnx.state(layer) for layer in layers]
        stacked = nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        self.layers = stacked if looped else nnx.List(layers)
        if ends:
            self.before = nnx.Linear(4, 4, param_dtype=float, rngs=nnx.Rngs(1))
            self.behind = nnx.Linear(4, 4, param_dtype=float, rngs=nnx.Rngs(2))

    def __call__(self, h):
        h = self.before(h) if self.ends else h
        if self.looped:
            h = through(h, self.layers)
        else:
            for layer in self.layers:
                h = layer(h)
        h = jnp.mean(h, axis=1)
        return self.behind(h) if self.ends else h


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def through(h, layer):
    return nnx.remat(lambda layer, h: layer(h))(layer, h)


def assert_same(looped, alone):
    """Trees of parameters of both models, the second with the layers one by one."""
    expected = dict(nnx.to_flat_state(alone))
    for path, leaf in nnx.to_flat_state(looped):
        want = expected.get(path)
        if path[0] == "layers":
            steps = range(len(leaf[...]))
            want = np.stack([expected["layers", step, *path[1:]][...] for step in steps])
        largest = float(np.abs(want[...]).max())
        np.testing.assert_allclose(
            leaf[...], want[...], rtol=1e-11, atol=1e-11 * max(largest, 0.01), err_msg=str(path)
        )


@pytest.mark.parametrize(
    ("structure", "damping"),
    [
        # the last affine layer, which is in the loop, is scaled
        (ng.KFAC(split="pi"), np.linspace(0.01, 0.1, 8)),
        (ng.EKFAC(), ng.RelativeDamping(0.1)),
        (ng.BlockDiagonal(space="parameter"), 0.1),
        (ng.Exact(space="parameter"), 0.1),
        (ng.Exact(space="sample"), ng.RelativeDamping(0.1)),
    ],
)
def test_a_loop_takes_the_steps_of_its_layers(structure, damping):
    updates = [
        ng.natural_gradient(
            Deep(4, looped, ends=False),
            X,
            Y,
            structure=structure,
            loss=SOFTMAX,
            damping=damping,
            fisher="mc" if isinstance(structure, ng.KFAC) else "exact",
            key=jax.random.key(3),
            weights=np.array([1.0, 0.5, 2.0]),
        )
        for looped in (True, False)
    ]
    assert_same(*updates)


@pytest.mark.parametrize(("steps", "backwards"), [(1, False), (3, True)])
def test_a_loop_of_one_step_and_one_from_the_last_layer_on(steps, backwards):
    class Turned(Deep):
        def __call__(self, h):
            if not self.looped:
                for layer in list(self.layers)[::-1]:
                    h = layer(h)
                return jnp.mean(h, axis=1)
            graphdef, params = nnx.split(self.layers)

            def one(h, own):
                return nnx.merge(graphdef, own)(h), None

            return jnp.mean(jax.lax.scan(one, h, params, reverse=backwards)[0], axis=1)

    # the last affine layer is scaled, and there is one damping a layer
    updates = [
        ng.natural_gradient(
            Turned(steps, looped, ends=False),
            X,
            Y,
            structure=ng.KFAC(),
            loss=SOFTMAX,
            damping=np.linspace(0.01, 0.1, 2 * steps),
        )
        for looped in (True, False)
    ]
    assert_same(*updates)


def descended(model, structure, average, steps=3):
    """Parameters after some steps, and the program of one."""
    tx = ng.natural_gradient_descent(
        0.1,
        structure=structure,
        loss=SOFTMAX,
        damping=ng.RelativeDamping(0.1),
        fisher="mc",
        average=average,
        example=(model, X) if average else None,
        microbatches=3 if average else 1,
    )
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(params, state, module=nnx.merge(graphdef, params), x=x, y=Y)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    program = step.lower(params, state, X).as_text()
    for number in range(steps):
        params, state = step(params, state, X + number)
    return params, program


@pytest.mark.parametrize("structure", [ng.KFAC(), ng.EKFAC()])
def test_averages_of_a_loop(structure):
    average = ng.MovingAverage(decay=0.7, every=1, inverse_every=2)
    looped, program = descended(Deep(3, True, ends=True), structure, average)
    alone, _ = descended(Deep(3, False, ends=True), structure, average)
    assert_same(looped, alone)
    _, longer = descended(Deep(6, True, ends=True), structure, average, steps=0)
    assert program.count("\n") == longer.count("\n")


@pytest.mark.parametrize("structure", [ng.KFAC(), ng.Exact()])
def test_programs_do_not_grow_with_the_steps_of_a_loop(structure):
    sizes = [
        descended(Deep(steps, True, ends=True), structure, None, steps=0)[1].count("\n")
        for steps in (2, 6)
    ]
    assert sizes[0] == sizes[1]
