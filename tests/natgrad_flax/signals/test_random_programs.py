"""Random programs of what the capture follows, nested two deep, against jax.jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobian_oracle import compare

import natgrad_flax as ng

pytestmark = pytest.mark.usefixtures("x64")
PLACES, WIDTH, STEPS, ROWS = 3, 4, 2, 5
X = np.random.default_rng(0).normal(size=(2, PLACES, WIDTH))
READOUT = np.random.default_rng(1).normal(size=(WIDTH, 2))
IDS = np.array([2, 0, 2])


def grouped(h, w):
    """Two groups of two features, each with weights of its own."""
    return jnp.einsum("tgk,gkm->tgm", h.reshape(PLACES, 2, 2), w).reshape(h.shape)


def convolved(h, w):
    """Over neighbouring places."""
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(h[None], w, (1,), "SAME", dimension_numbers=numbers)[0]


def looked_up(h, table):
    """Rows that the activations choose, beside them."""
    ids = jnp.int32(jnp.abs(3 * h[:, 0])) % ROWS
    return h + table[ids]


OPERATIONS = {
    "plain": ((WIDTH, WIDTH), lambda h, w: h @ w),
    "transposed": ((WIDTH, WIDTH), lambda h, w: h @ w.T),
    "from the left": ((WIDTH, WIDTH), lambda h, w: (w @ h.T).T),
    "scaled": ((WIDTH, WIDTH), lambda h, w: h @ (0.5 * w)),
    "behind": ((WIDTH, WIDTH), lambda h, w: -2 * (h @ w)),
    "backwards": ((WIDTH, WIDTH), lambda h, w: h @ w[::-1]),
    "upper half": ((2 * WIDTH, WIDTH), lambda h, w: h @ w[:WIDTH]),
    "every other": ((2 * WIDTH, WIDTH), lambda h, w: h @ w[1::2]),
    "both halves": ((2 * WIDTH, WIDTH), lambda h, w: jnp.concatenate([h, h**2], axis=1) @ w),
    "cut": ((WIDTH, WIDTH + 1), lambda h, w: (h @ w)[:, 1:]),
    "summed": ((WIDTH, WIDTH), lambda h, w: h @ w + jnp.sin(h) @ w.T),
    "normal": ((WIDTH, WIDTH), lambda h, w: h @ (w / jnp.linalg.norm(w, axis=0))),
    "ruled": ((WIDTH, WIDTH), lambda h, w: jax.nn.relu(h @ w) + jax.nn.silu(w)[0]),
    "outer": ((PLACES, 1, WIDTH), lambda h, w: jnp.einsum("tk,tok->tk", h, w) + h),
    "each place": ((PLACES, WIDTH, WIDTH), lambda h, w: jnp.einsum("tk,tkm->tm", h, w)),
    "flat": ((WIDTH * WIDTH,), lambda h, w: h @ w.reshape(WIDTH, WIDTH)),
    "folded": ((2, WIDTH, 2), lambda h, w: h @ w.reshape(WIDTH, WIDTH)),
    "turned": (
        (2, WIDTH, 2),
        lambda h, w: jnp.einsum("tk,akb->tba", h, w).reshape(h.shape),
    ),
    "grouped": ((2, 2, 2), grouped),
    "places": ((PLACES, PLACES), lambda h, w: w @ h),
    "convolved": ((2, WIDTH, WIDTH), convolved),
    "looked up": ((ROWS, WIDTH), looked_up),
    "fixed rows": ((ROWS, WIDTH), lambda h, w: h * w[IDS]),
    "bias": ((WIDTH,), lambda h, b: h + b),
    "scaled bias": ((1, WIDTH), lambda h, b: h + 3 * b),
    "place": ((PLACES, WIDTH), lambda h, b: h + b),
    "number": ((), lambda h, b: h + b),
    "gain": ((WIDTH,), lambda h, g: h * g),
    "through a function": ((WIDTH, WIDTH), lambda h, w: h @ jnp.sin(w)),
    "tanh": (None, lambda h, _: jnp.tanh(h)),
    "residual": (None, lambda h, _: h + jnp.sin(h)),
    "normalised": (None, lambda h, _: h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 0.1)),
    "across": (None, lambda h, _: h.T.reshape(h.shape)),
    "attention": (None, lambda h, _: jax.nn.softmax(h @ h.T) @ h),
}
"""By name the shape of a parameter and what is made of activations (PLACES, WIDTH) and it."""


BIASES = ("bias", "bias", "scaled bias", "place", "number")


def steps(inner, own):
    """A loop that takes another part of its own parameters at each step."""

    def call(p, h):
        parts = {name: p[name] for name in own}
        return jax.lax.scan(lambda h, part: (inner({**p, **part}, h), None), h, parts, STEPS)[0]

    return call


def counted(inner, own):
    """A loop whose counter says which part of its own parameters is next."""

    def step(p, i, h):
        return inner({**p, **{name: p[name][STEPS - 1 - i] for name in own}}, h)

    return lambda p, h: jax.lax.fori_loop(0, STEPS, lambda i, h: step(p, i, h), h)


def ensemble(inner, own):
    """The mean of networks of their own parameters."""

    def call(p, h):
        parts = {name: p[name] for name in own}
        return jax.vmap(lambda part: inner({**p, **part}, h), axis_size=STEPS)(parts).mean(0)

    return call


def repeated(inner, own):
    """A loop whose parameters are the same at every step."""
    return lambda p, h: jax.lax.fori_loop(0, STEPS, lambda _, h: inner(p, h), h)


def recorded(inner, own):
    """A loop backwards, whose outputs and last state add up."""

    def call(p, h):
        last, every = jax.lax.scan(
            lambda h, x: (inner(p, h + x), h), h, jnp.stack([h, -h]), reverse=True
        )
        return last + every.sum(0)

    return call


def both_ways(inner, own):
    """The same network on two inputs at once."""
    return lambda p, h: jax.vmap(lambda h: inner(p, h))(jnp.stack([h, -h])).sum(0)


def branch(inner, own):
    """One of two branches."""
    return lambda p, h: jax.lax.cond(jnp.sum(IDS) > 3, inner, lambda p, h: 2 * inner(p, h), p, h)


AROUND = {
    "jit": (lambda inner, own: jax.jit(inner), False),
    "remat": (lambda inner, own: jax.checkpoint(inner), False),
    "branch": (branch, False),
    "repeated": (repeated, False),
    "recorded": (recorded, False),
    "both ways": (both_ways, False),
    "steps": (steps, True),
    "counted": (counted, True),
    "ensemble": (ensemble, True),
}
"""By name what is made of a program, and whether its parameters get an axis of STEPS."""


@st.composite
def programs(draw):
    """A function of parameters and of activations of one sample, shapes, and how it was made."""
    shapes = {}

    def parameter(shape, lead, known):
        """A new one, or one of before in a second use."""
        same = [name for name, other in known.items() if other == shape]
        if same and draw(st.integers(0, 3)) == 0:
            return draw(st.sampled_from(same))
        name = f"p{len(shapes)}"
        shapes[name], known[name] = (*lead, *shape), shape
        return name

    def block(depth, lead, known):
        made, said = [], []
        for _ in range(draw(st.integers(1, 3))):
            if depth and draw(st.booleans()):
                name = draw(st.sampled_from(list(AROUND)))
                wrap, stacked = AROUND[name]
                inside = dict(known) if stacked else known
                before = len(shapes)
                inner, text = block(depth - 1, (*lead, STEPS) if stacked else lead, inside)
                made.append(wrap(inner, [f"p{i}" for i in range(before, len(shapes))]))
                said.append(f"{name}({text})")
                continue
            name = draw(st.sampled_from(list(OPERATIONS)))
            joined = len(OPERATIONS[name][0] or ()) > 1 and draw(st.booleans())
            for one in (name, draw(st.sampled_from(BIASES))) if joined else (name,):
                shape, call = OPERATIONS[one]
                used = None if shape is None else parameter(shape, lead, known)
                made.append(lambda p, h, call=call, used=used: call(h, p.get(used)))
                said.append(f"{one} {used or ''}".strip())

        def run(p, h):
            for one in made:
                h = one(p, h)
            return h

        return run, ", ".join(said)

    # whatever was drawn, there is a product with a bias around it
    first, last = parameter((WIDTH, WIDTH), (), {}), parameter((WIDTH,), (), {})
    inner, text = block(2, (), {first: (WIDTH, WIDTH), last: (WIDTH,)})

    def run(p, x):
        return jax.vmap(lambda h: (inner(p, h @ p[first] + p[last]) @ READOUT).sum(0))(x)

    return run, shapes, text


@given(programs())
@settings(max_examples=25)
def test_against_jacobian(drawn):
    run, shapes, text = drawn
    rng = np.random.default_rng(2)
    params = {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}
    try:
        compare(ng.from_function(run, params), X, all_move=False)
    except Exception as error:
        error.add_note(text)
        raise
