"""Models in the styles of others: which parameters have a formula, and that it is right."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK, made
from flax import nnx
from jacobian_oracle import compare, without_formula
from jax.ad_checkpoint import checkpoint_name

import natgrad_flax as ng
from natgrad_flax.models.transformer import attend

pytestmark = pytest.mark.usefixtures("x64")
DEPTH = 3
LAYERS = 8 * DEPTH + 1
F64 = {"param_dtype": jnp.float64}


def rngs():
    return nnx.Rngs(jax.random.key(0, impl="rbg"))


class Weights(nnx.Module):
    """Arrays of given shapes, and what a function makes of them and of the inputs."""

    def __init__(self, call, **shapes):
        rng = np.random.default_rng(0)
        for name, shape in shapes.items():
            value = rng.normal(size=shape) / (*shape, 1)[0] ** 0.5
            setattr(self, name, nnx.Param(jnp.asarray(value)))
        self.call = call

    def __call__(self, x):
        return self.call(self, x)


def own_layers(m, x):
    """A layer written by hand, and a normalisation written by hand."""
    h = jnp.tanh(x @ m.w + m.b)
    h = h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6) * m.g
    return (m.v.T @ h.T).T + m.c


def chebyshev(m, x):
    for weights in (m.first, m.second):
        t = jnp.tanh(x)
        basis = jnp.stack([jnp.ones_like(t), t, 2 * t**2 - 1], axis=-1)
        x = jnp.einsum("nik,iok->no", basis, weights[...])
    return x


def experts(m, x):
    """The two best of three networks, weighed."""
    best, which = jax.lax.top_k(jax.nn.softmax(x @ m.gate), 2)
    share = jnp.sum(jax.nn.one_hot(which, 3) * best[..., None], axis=-2)
    h = jax.nn.relu(jnp.einsum("nk,ekm->nem", x, m.up[...]))
    return jnp.einsum("nem,emo,ne->no", h, m.down[...], share)


def graph(m, x):
    """Attention over the edges of a graph of four nodes, and the mean of the nodes."""
    source, target = jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 2, 3, 0, 2])

    def one(x):
        h = x.reshape(4, -1) @ m.w
        pairs = jnp.concatenate([h[source], h[target]], axis=-1)
        weights = jnp.exp(jax.nn.leaky_relu(pairs @ m.a))
        weights = weights / jax.ops.segment_sum(weights, target, 4)[target]
        return jax.ops.segment_sum(weights[:, None] * h[source], target, 4).mean(0) @ m.o

    return jax.vmap(one)(x)


def recurrent(m, x):
    """A loop whose weights are the same at every step, and one that looks further back."""

    def step(h, a):
        return jnp.tanh(h @ m.h + a @ m.i + m.b), h

    sequence = x.reshape(len(x), 2, -1).swapaxes(0, 1)
    h, before = jax.lax.scan(jax.checkpoint(step), jnp.zeros((len(x), 3)), sequence)
    return jnp.concatenate([h, before[-1]], axis=1) @ m.o


def operator(m, x):
    """A branch of sensors and a trunk of places (DeepONet)."""
    return (jnp.tanh(x[:, :5] @ m.branch) * jnp.tanh(x[:, 5:] @ m.trunk)) @ m.o


def equation(m, x):
    """Residual of u'' = u and the values of u, by forward over reverse mode."""

    def u(z):
        return (jnp.tanh(z @ m.w + m.b) @ m.o)[0]

    return jax.vmap(lambda z: jnp.stack([jnp.trace(jax.hessian(u)(z)) - u(z), u(z)]))(x)


def tokens(m, x):
    """A table of embeddings, looked up by hand."""
    ids = jnp.int32(2 * jnp.abs(x[:, :3])) % 5
    return (m.table[...][ids] + m.place).mean(1) @ m.o


def fused(m, x):
    """Queries and keys from one product, halves of which meet, and a name for a checkpoint."""
    queries, keys = jnp.split(x @ checkpoint_name(m.w[...], "weights"), 2, axis=1)
    return (queries * keys) @ m.o


def counted(m, x):
    """A loop with a known number of steps, and a print in it."""
    jax.debug.print("inputs {}", x[0, 0])
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ m.h), x @ m.i) @ m.o


def chosen(m, x):
    """Every sample takes a branch: with a bias, with more weights, or with none."""

    def one(x):
        h = jax.lax.switch(
            jnp.int32(2 * jnp.abs(x[3])) % 3,
            [
                lambda x: x @ m.w + m.b,
                lambda x: 2 * x @ m.w + jnp.sin(x @ m.v),
                lambda x: x[:3] * m.c,
            ],
            x,
        )
        return jnp.tanh(h) @ m.o + jax.lax.cond(x[1] > 0, lambda: m.r[...], lambda: 2 * m.r)

    return jax.lax.map(one, x)


def alternating(m, x):
    """Layers of two kinds, one after the other in a loop."""

    def layer(h, parts):
        number, own = parts
        return jax.lax.cond(
            number % 2 == 0, lambda h: jnp.tanh(h @ own), lambda h: h @ own + jnp.sin(h @ m.w), h
        ), None

    return jax.lax.scan(layer, x, (jnp.arange(3), m.own[...]))[0] @ m.o


def stopped(m, x):
    """Weights of which one use has no derivative."""
    return (x @ jax.lax.stop_gradient(m.w[...]) + x @ m.w) @ m.o


def ruled(m, x):
    """A product with a derivative of its own."""

    @jax.custom_vjp
    def product(w, x):
        return x @ w

    def backward(kept, cotangent):
        w, x = kept
        return x.T @ cotangent, cotangent @ w.T

    product.defvjp(lambda w, x: (x @ w, (w, x)), backward)
    return jnp.tanh(product(m.w[...], x)) @ m.o


def parted(m, x):
    """Halves of weights in products of their own."""
    return jnp.tanh(x[:, :4] @ m.w[:4] + x[:, 4:] @ m.w[4:]) @ m.o


def shifted(m, x):
    """One number for all units."""
    return jnp.tanh(x @ m.w + m.b[...]) @ m.o


HAND = {
    "own layers": (own_layers, {"w": (8, 4), "b": (4,), "g": (4,), "v": (4, 2), "c": (2,)}, {"g"}),
    "chebyshev": (chebyshev, {"first": (8, 4, 3), "second": (4, 2, 3)}, set()),
    "experts": (experts, {"gate": (8, 3), "up": (3, 8, 4), "down": (3, 4, 2)}, set()),
    "graph": (graph, {"w": (2, 3), "a": (6,), "o": (3, 2)}, set()),
    "recurrent": (recurrent, {"h": (3, 3), "i": (4, 3), "b": (3,), "o": (6, 2)}, {"b"}),
    "operator": (operator, {"branch": (5, 3), "trunk": (3, 3), "o": (3, 2)}, set()),
    "equation": (equation, {"w": (8, 4), "b": (4,), "o": (4, 1)}, None),
    "fused": (fused, {"w": (8, 4), "o": (2, 2)}, set()),
    "counted": (counted, {"i": (8, 3), "h": (3, 3), "o": (3, 2)}, set()),
    "chosen": (
        chosen,
        {"w": (8, 3), "b": (3,), "v": (8, 3), "c": (3,), "o": (3, 2), "r": (2,)},
        {"b", "c", "r"},
    ),
    "alternating": (alternating, {"own": (3, 8, 8), "w": (8, 8), "o": (8, 2)}, set()),
    "stopped": (stopped, {"w": (8, 3), "o": (3, 2)}, {"w"}),
    "ruled": (ruled, {"w": (8, 3), "o": (3, 2)}, {"w"}),
    "shifted": (shifted, {"w": (8, 3), "b": (), "o": (3, 2)}, {"b"}),
    "parted": (parted, {"w": (8, 3), "o": (3, 2)}, {"w"}),
    "tokens": (tokens, {"table": (5, 4), "place": (3, 4), "o": (4, 2)}, {"place"}),
}


def against_jacobian(model, x, **settings):
    """The parameters without a formula, once the signals are found right."""
    return without_formula(compare(model, x, **settings))


X = np.random.default_rng(1).normal(size=(3, 8))


@pytest.mark.parametrize("name", HAND)
def test_written_by_hand(name):
    call, shapes, explicit = HAND[name]
    found = against_jacobian(Weights(call, **shapes), X)
    assert explicit is None or found == explicit


class Block(nnx.Module):
    """A block of a transformer."""

    def __init__(self, rngs):
        self.first = nnx.LayerNorm(4, rngs=rngs, **F64)
        # that of Flax takes its softmax in float32
        self.attention = nnx.MultiHeadAttention(
            2, 4, decode=False, attention_fn=attend, rngs=rngs, **F64
        )
        self.second = nnx.RMSNorm(4, rngs=rngs, **F64)
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs, **F64), nnx.Linear(6, 4, rngs=rngs, **F64)

    def __call__(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(jnp.tanh(self.up(self.second(x))))


class Tokens(nnx.Module):
    """Blocks one after the other, in a list or in a loop that keeps no activations."""

    def __init__(self, blocks, looped):
        self.blocks, self.looped = nnx.data(blocks), looped
        self.readout = nnx.Linear(4, 2, rngs=rngs(), **F64)

    def __call__(self, x):
        x = x.reshape(len(x), 2, 4)
        if self.looped:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, block):
                return nnx.remat(lambda block, x: block(x))(block, x)

            x = run(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.readout(x.mean(axis=1))


def looped_and_listed():
    """The same network in both forms."""
    blocks = [Block(nnx.Rngs(seed)) for seed in range(DEPTH)]
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    stacked = nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    return Tokens(stacked, True), Tokens(blocks, False)


def test_a_loop_over_layers():
    looped, _ = looped_and_listed()
    norms = {f"blocks.{name}" for name in ("first.scale", "first.bias", "second.scale")}
    assert against_jacobian(looped, X) == norms
    # one layer a step
    assert len(ng.describe(looped, X).layers) == LAYERS


@pytest.mark.parametrize("name", ["exact", "block-tri-diagonal", "kfac", "unit-wise"])
def test_a_loop_gives_the_step_of_its_layers(name):
    """Structures see one layer a step; the updates are stacked as the parameters are."""
    steps = []
    for model in looped_and_listed():
        graphdef, state = nnx.split(model)

        @jax.jit
        def step(state, graphdef=graphdef):
            return ng.natural_gradient(
                nnx.merge(graphdef, state),
                X,
                jnp.ones((3, 2)),
                structure=made(LAYERS, [name])[name],
                loss=ng.MeanSquaredError(),
                damping=0.1,
            )

        update = step.lower(state).compile(compiler_options=QUICK)(state)
        steps.append(nnx.to_pure_dict(update))
    looped, listed = steps
    for number in range(DEPTH):
        jax.tree.map(
            lambda one, other, number=number: np.testing.assert_allclose(
                one[number], other, rtol=1e-7, atol=1e-9
            ),
            looped["blocks"],
            listed["blocks"][number],
        )


def test_ensembles():
    """Networks under nnx.vmap are groups of units, but where they all have the same inputs."""

    @nnx.vmap
    def make(rngs):
        return nnx.Sequential(
            nnx.Linear(8, 4, rngs=rngs, **F64), jnp.tanh, nnx.Linear(4, 2, rngs=rngs, **F64)
        )

    class Mean(nnx.Module):
        def __init__(self):
            self.members = make(nnx.Rngs(0).split(3))

        def __call__(self, x):
            outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(self.members, x)
            return outputs.mean(axis=0)

    assert against_jacobian(Mean(), X) == set()
    assert [layer.groups for layer in ng.describe(Mean(), X).layers] == [1, 3]


@pytest.mark.parametrize("cell", [nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.LSTMCell])
def test_recurrent_cells(cell):
    class Net(nnx.Module):
        def __init__(self):
            self.rnn = nnx.RNN(cell(4, 3, rngs=rngs(), **F64))
            self.readout = nnx.Linear(3, 2, rngs=rngs(), **F64)

        def __call__(self, x):
            return self.readout(self.rnn(x.reshape(len(x), 2, 4))[:, -1])

    assert against_jacobian(Net(), X) == set()


def test_linen():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            h = jnp.tanh(flax.linen.Dense(4, **F64)(x))
            return flax.linen.Dense(2, **F64)(flax.linen.LayerNorm(**F64)(h))

    model = nnx.bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
    assert against_jacobian(model, X) == {"LayerNorm_0.scale", "LayerNorm_0.bias"}
