"""Loops that take parts of parameters by a counter, against the same loops over slices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK, made
from dense_metrics import DenseLayer, metric
from jacobian_oracle import compare, without_formula

import natgrad_flax as ng
from natgrad_flax.signals.capture import linearise, plain_directions

pytestmark = pytest.mark.usefixtures("x64")
PARTS, WIDTH, OUTPUTS = 3, 4, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, WIDTH))
VALUES = {
    "w": RNG.normal(size=(PARTS, WIDTH, WIDTH)) / 2,
    "b": RNG.normal(size=(PARTS, WIDTH)) / 2,
}
GRID = {"w": RNG.normal(size=(2, PARTS, WIDTH, WIDTH)) / 2}


def model(call, values=VALUES):
    values = jax.tree.map(jnp.asarray, values)
    return ng.from_function(lambda p, x: jax.vmap(lambda h: call(p, h)[:OUTPUTS])(x), values)


def affine(h, w, b):
    return jnp.tanh(h @ w + b)


def counted(rounds, of_weights, of_biases=None):
    """A loop whose counter gives the numbers of parts."""
    of_biases = of_biases or of_weights

    def call(p, h):
        def step(i, h):
            return affine(h, p["w"][of_weights(i)], p["b"][of_biases(i)])

        return jax.lax.fori_loop(0, rounds, step, h)

    return call


def numbered(numbers, reverse=False):
    """A loop over the numbers of parts."""

    def call(p, h):
        step = jax.checkpoint(lambda h, i: affine(h, p["w"][i], p["b"][i]))
        return jax.lax.scan(lambda h, i: (step(h, i), None), h, numbers(), reverse=reverse)[0]

    return call


def carried(p, h):
    """A loop that runs backwards over nothing and counts down itself."""

    def step(state, _):
        i, h = state
        return (i - 1, affine(h, p["w"][i], p["b"][i])), None

    return jax.lax.scan(step, (PARTS - 1, h), None, PARTS, reverse=True)[0][1]


def taken(take):
    """Parts by another operation, and biases that the loop slices."""

    def call(p, h):
        def step(h, both):
            i, b = both
            return affine(h, take(p["w"], i), b), None

        return jax.lax.scan(step, h, (jnp.arange(PARTS), p["b"]))[0]

    return call


def sliced(order, reverse=False):
    """A loop over slices in an order."""

    def call(p, h):
        parts = [p[name][jnp.asarray(order)] if order else p[name] for name in ("w", "b")]
        return jax.lax.scan(lambda h, own: (affine(h, *own), None), h, parts, reverse=reverse)[0]

    return call


def nested(part):
    """Two loops, with what the inner one takes."""

    def call(p, h):
        def inner(i, j, h):
            return jnp.tanh(h @ part(p["w"], i, j))

        def outer(i, h):
            return jax.lax.fori_loop(0, PARTS, lambda j, h: inner(i, j, h), h)

        return jax.lax.fori_loop(0, 2, outer, h)

    return call


def also_whole(p, h):
    """A part a step, and all of them together."""
    h = counted(PARTS, lambda i: i)(p, h)
    return jnp.einsum("k,ikm->m", h, p["w"])


def of_the_sample(p, h):
    """Parts that the sample chooses."""
    first = jnp.int32(h[0] > 0)
    return jax.lax.fori_loop(0, 2, lambda i, h: affine(h, p["w"][i + first], p["b"][i + first]), h)


BOTH, TWICE = {"w", "b"}, "weights of which loops use some parts more often than others"
LAYERS = {
    # by name: the function, and which parts its layers have
    "the first of them": (counted(2, lambda i: i), [0, 1, 2]),
    "from the end": (counted(PARTS, lambda i: -1 - i), [2, 1, 0]),
    "in pairs": (counted(2 * PARTS, lambda i: i // 2), [0, 1, 2]),
    "in no order": (numbered(lambda: np.array([2, 0, 1])), [0, 1, 2]),
    "backwards": (numbered(lambda: jnp.arange(PARTS), reverse=True), [2, 1, 0]),
    "falling, backwards": (numbered(lambda: jnp.arange(PARTS)[::-1], reverse=True), [0, 1, 2]),
    "counted down": (carried, [2, 1, 0]),
    "dynamic slices": (
        taken(lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 1)[0]),
        [0, 1, 2],
    ),
    "rows of a table": (taken(lambda w, i: jnp.take(w, i, axis=0)), [0, 1, 2]),
}
EXPLICIT = {
    # by name: the function, what goes without a formula, and why
    # the last one again
    "past the end": (counted(PARTS, lambda i: i + 1), BOTH, TWICE),
    "against each other": (
        counted(PARTS, lambda i: i, lambda i: PARTS - 1 - i),
        {"b"},
        "added to products that are not all of one layer",
    ),
    "whole": (also_whole, BOTH, "weights that are also used by reduce_sum"),
    "of the sample": (of_the_sample, BOTH, "weights of products of different forms"),
}
NESTED = {
    "both": (lambda w, i, j: w[i, j], 6, set()),
    "both, backwards": (lambda w, i, j: w[1 - i][PARTS - 1 - j], 6, set()),
    "inner axis first": (lambda w, i, j: jax.lax.dynamic_index_in_dim(w, j, 1, False)[i], 6, set()),
    "forwards and back": (lambda w, i, j: w[i, PARTS - 1 - j], 1, {"w"}),
    "twice by one": (lambda w, i, j: w[i % 2, i], 1, {"w"}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_parts_are_layers(name):
    call, parts = LAYERS[name]
    signals = compare(model(call), X, all_move=False)
    assert [layer.parts() for layer in signals.layers] == [{"w": part, "b": part} for part in parts]
    assert not without_formula(signals)


@pytest.mark.parametrize("name", EXPLICIT)
def test_others_stay_explicit(name):
    call, explicit, reason = EXPLICIT[name]
    assert without_formula(compare(model(call), X, all_move=False)) == explicit
    assert reason in {layer.reason for layer in ng.describe(model(call), X).layers}


@pytest.mark.parametrize("name", NESTED)
def test_loops_within_each_other(name):
    part, layers, explicit = NESTED[name]
    signals = compare(model(nested(part), GRID), X, all_move=False)
    assert (len(signals.layers), without_formula(signals)) == (layers, explicit)


@pytest.mark.parametrize(
    ("call", "like"),
    [
        (counted(PARTS, lambda i: i), sliced(())),
        (counted(PARTS, lambda i: PARTS - 1 - i), sliced((), reverse=True)),
    ],
)
def test_signals_are_those_of_slices(call, like):
    """Stacked as the structures take them: whatever follows from them is the same."""

    def signals(call):
        outputs, backward = linearise(model(call), X)
        return backward(plain_directions(outputs))

    found, wanted = [
        jax.jit(lambda c=c: signals(c), compiler_options=QUICK)() for c in (call, like)
    ]
    assert isinstance(found.layers[0].layer, ng.DenseSignals)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, wanted
    )


ORDERS = {"once": (2, 0, 1), "twice": (0, 1, 2, 0, 1, 2), "not all": (2, 1)}


@pytest.mark.parametrize("order", ORDERS)
def test_structures_against_numpy(order):
    """Signals by the chain rule, written out."""
    order = ORDERS[order]
    w, b = VALUES["w"], VALUES["b"]
    states = [X]
    for part in order:
        states.append(np.tanh(states[-1] @ w[part] + b[part]))
    above = np.broadcast_to(np.eye(WIDTH)[:OUTPUTS], (len(X), OUTPUTS, WIDTH))
    at = {part: [] for part in range(PARTS)}
    for part, before, after in list(zip(order, states, states[1:], strict=False))[::-1]:
        d = above * (1 - after[:, None] ** 2)
        at[part].insert(0, (np.concatenate([before, np.ones((len(X), 1))], axis=1), d))
        above = d @ w[part].T
    never = [(np.eye(1, WIDTH + 1, WIDTH).repeat(len(X), 0), np.zeros_like(above))]
    layers = []
    for part in sorted(at, reverse=order == (2, 1)):
        a, d = zip(*(at[part] or never), strict=True)
        layers.append(
            DenseLayer.affine(
                np.stack(a, axis=1)[:, :, None], np.stack(d, axis=2)[:, :, :, None], True
            )
        )
    names = ["exact", "block-diagonal", "kfac", "unit-wise", "diagonal"]
    structures = made(PARTS, names)

    @partial(jax.jit, compiler_options=QUICK)
    def run(p):
        module = model(numbered(lambda: np.array(order)), p)
        signals = ng.jacobian_signals(module, X)
        return {name: one.to_dense(signals, 0.1) for name, one in structures.items()}

    for name, found in run(VALUES).items():
        wanted = metric(structures[name], layers, 0.1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10, err_msg=name)
