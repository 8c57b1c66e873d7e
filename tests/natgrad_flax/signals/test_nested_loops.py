"""Loops within loops: parameters of both, of either and of none, against jax.jacobian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK, made
from flax import nnx
from jacobian_oracle import compare, without_formula

import natgrad_flax as ng
from natgrad_flax.signals.base import layer_updates, named_updates, unravel

pytestmark = pytest.mark.usefixtures("x64")
OUTER, INNER, WIDTH = 2, 3, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, WIDTH))


def of_both(p, h, reverse=(False, False)):
    """Another part of the weights at each step of both loops."""

    def outer(h, own):
        def inner(h, own):
            return h + jnp.tanh(h * own["gain"] @ own["w"] + own["b"]), None

        return jax.lax.scan(inner, h, own, reverse=reverse[1])[0], None

    return jax.lax.scan(outer, h, p, reverse=reverse[0])[0]


def reshaped(p, h):
    """The same of parameters that lie in one axis."""
    return of_both(jax.tree.map(lambda a: a.reshape(OUTER, INNER, *a.shape[1:]), p), h)


def in_one_loop(p, h):
    """Two axes that one loop goes through."""
    p = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), p)
    return jax.lax.scan(lambda h, own: (jnp.tanh(h @ own["w"] + own["b"]), None), h, p)[0]


def of_one_each(p, h):
    """Weights of both loops, of the outer one, of the inner one, and of none."""

    def outer(h, own):
        both, first = own

        def inner(h, own):
            both, second = own
            h = jnp.tanh(h @ both + jnp.sin(h) @ first)
            return h @ second + h @ p["none"], None

        return jax.lax.scan(inner, h, (both, p["inner"]))[0], None

    return jax.lax.scan(outer, h, (p["both"], p["outer"]))[0]


def counted(p, h):
    """A loop of a known number of rounds within a loop over layers, behind checkpoint."""

    def outer(h, own):
        @jax.checkpoint
        def twice(h):
            return jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ own + h @ p["none"]), h)

        return twice(h), None

    return jax.lax.scan(outer, h, p["outer"])[0]


def at_two_depths(p, h):
    """The same weights in a loop, and in one within another."""
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["w"])[0]
    again = partial(jax.lax.scan, lambda h, w: (jnp.sin(h @ w), None), xs=p["w"])
    return jax.lax.fori_loop(0, 2, lambda _, h: again(h)[0], h)


def part_of_the_time(p, h):
    """A part a step of the outer loop, which the inner one takes whole as well."""

    def outer(h, own):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, own)[0]
        return jnp.einsum("k,ikm->m", h, own), None

    return jax.lax.scan(outer, h, p["w"])[0]


W, B = (OUTER, INNER, WIDTH, WIDTH), (OUTER, INNER, WIDTH)
BOTH = {"w": W, "b": B, "gain": B}
EACH = {"both": W, "outer": W[:1] + W[2:], "inner": W[1:], "none": W[2:]}
CASES = {
    # by name: the function, shapes, layers, and what goes without a formula
    "both": (of_both, BOTH, 12, {"gain"}),
    "backwards": (partial(of_both, reverse=(True, True)), BOTH, 12, {"gain"}),
    "forwards and back": (partial(of_both, reverse=(False, True)), BOTH, 6, {"w", "b", "gain"}),
    "reshaped": (
        reshaped,
        {name: (OUTER * INNER, *s[2:]) for name, s in BOTH.items()},
        12,
        {"gain"},
    ),
    "in one loop": (in_one_loop, {"w": W, "b": B}, 6, set()),
    "one each": (of_one_each, EACH, 12, set()),
    "counted": (counted, {"outer": EACH["outer"], "none": EACH["none"]}, 3, set()),
    "at two depths": (at_two_depths, {"w": W[1:]}, 3, set()),
    "part of the time": (part_of_the_time, {"w": W}, 1, {"w"}),
}


def model(name):
    call, shapes, *_ = CASES[name]
    values = {key: jnp.asarray(RNG.normal(size=s) / 2) for key, s in shapes.items()}
    return ng.from_function(lambda p, x: jax.vmap(lambda h: call(p, h)[:2])(x), values)


@pytest.mark.parametrize("name", CASES)
def test_against_jacobian(name):
    signals = compare(model(name), X)
    *_, layers, explicit = CASES[name]
    assert without_formula(signals) == explicit
    assert len(signals.layers) == layers
    # back to the shapes of the parameters and from them
    vector = jnp.arange(float(signals.num_params))
    updates = unravel(signals.layers, vector)
    named = named_updates(signals.layers, updates)
    by_path = {(*path, key): leaf for path, own in named.items() for key, leaf in own.items()}
    again = layer_updates(signals.layers, by_path)
    jax.tree.map(np.testing.assert_array_equal, updates, again)


def test_the_order_of_layers():
    """All of one step of the outer loop before those of the next."""
    for name, steps in (("both", range(6)), ("backwards", range(5, -1, -1))):
        layers = ng.jacobian_signals(model(name), X).layers
        found = [layer.parts()["w"] for layer in layers if "w" in layer.parts()]
        assert found == list(steps)
    parts = [layer.parts() for layer in ng.jacobian_signals(model("one each"), X).layers]
    found = [(name, part) for own in parts for name, part in own.items()][:8]
    first, second = [[("both", step) for step in range(i, i + 3)] for i in (0, 3)]
    assert found == [*first, ("outer", 0), *second, ("outer", 1)]


@pytest.mark.parametrize("name", ["exact", "block-tri-diagonal", "kfac", "unit-wise"])
def test_loops_give_the_step_of_their_layers(name):
    """Of a network of the same layers written out, stacked as the parameters are."""
    values = {key: jnp.asarray(RNG.normal(size=s) / 2) for key, s in BOTH.items()}

    def written_out(p, h):
        for own in p.values():
            h = h + jnp.tanh(h * own["gain"] @ own["w"] + own["b"])
        return h

    parts = {
        f"layer{i * INNER + j}": {key: value[i, j] for key, value in values.items()}
        for i in range(OUTER)
        for j in range(INNER)
    }
    structure = made(12, [name])[name]
    found = []
    for call, p in ((of_both, values), (written_out, parts)):

        def run(p, call=call):
            module = ng.from_function(lambda p, x: jax.vmap(lambda h: call(p, h)[:2])(x), p)
            return ng.natural_gradient(
                module,
                X,
                jnp.ones((3, 2)),
                structure=structure,
                loss=ng.MeanSquaredError(),
                damping=0.1,
            )

        found.append(jax.jit(run, compiler_options=QUICK)(p))
    looped, listed = map(nnx.to_pure_dict, found)
    for key, shape in BOTH.items():
        expected = np.stack([listed[part][key] for part in parts])
        assert looped[key].shape == shape
        np.testing.assert_allclose(
            looped[key].reshape(expected.shape), expected, rtol=1e-7, atol=1e-9
        )


def test_momentum_and_averages_carry_what_lies_in_two_axes():
    """Their states have the shapes of the parameters."""
    module = model("both")
    params = nnx.state(module, nnx.Param)
    options = [
        {"structure": ng.BlockDiagonal(), "momentum": 0.9},
        {"structure": ng.KFAC(), "average": ng.MovingAverage(), "example": (module, X)},
    ]
    for settings in options:
        tx = ng.natural_gradient_descent(0.1, loss=ng.MeanSquaredError(), damping=0.1, **settings)

        @jax.jit
        def two(params, tx=tx):
            state = tx.init(params)
            for _ in range(2):
                step, state = tx.update(
                    params, state, params, module=module, x=X, y=jnp.ones((3, 2))
                )
            return step

        step = two(params)
        assert jax.tree.map(jnp.shape, step) == jax.tree.map(jnp.shape, params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step))
