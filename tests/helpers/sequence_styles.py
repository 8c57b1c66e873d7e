"""Styles of networks on sequences, graphs and vectors; they add to those of ``styles``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from styles import (
    OUTPUTS,
    SAMPLES,
    SEQUENCES,
    TRANSFORMER,
    WORDS,
    attention,
    by,
    conv,
    heads,
    joined,
    layer_norm,
    linear,
    numbers,
    param,
    rms_norm,
    sinusoids,
    style,
    table,
    transformer,
    w,
    words,
)


@style(
    SEQUENCES,
    enter=linear(2, w),
    norm=rms_norm(w),
    project=linear(w, lambda width: 2 * width + 6, use_bias=False),
    conv=conv(
        lambda width: width + 4,
        lambda width: width + 4,
        (3,),
        feature_group_count=lambda width: width + 4,
        padding="CAUSAL",
    ),
    decay=param(2),
    rate=param(2),
    skip=param(2),
    gate=rms_norm(w),
    leave=linear(w, w, use_bias=False),
    head=linear(w, OUTPUTS),
)
def mamba(m, x):
    """A state space whose rates and inputs are chosen by the sequence, a state of 2 for 2 heads."""
    x = m.enter(x)
    width = x.shape[-1]
    z, mixed, rate = jnp.split(m.project(m.norm(x)), [width, 2 * width + 4], axis=-1)
    values, into, out = jnp.split(jax.nn.silu(m.conv(mixed)), [width, width + 2], axis=-1)
    rate, values = jax.nn.softplus(rate + m.rate), heads(values)

    def step(state, seen):
        rate, value, into, out = seen
        kept = jnp.exp(-rate * jnp.exp(m.decay[...]))[..., None, None]
        state = kept * state + rate[..., None, None] * value[..., None] * into[:, None, None]
        return state, jnp.einsum("nhks,ns->nhk", state, out)

    start = jnp.zeros((len(x), *values.shape[2:], 2), x.dtype)
    seen = jax.tree.map(lambda a: a.swapaxes(0, 1), (rate, values, into, out))
    y = jax.lax.scan(step, start, seen)[1].swapaxes(0, 1) + m.skip[:, None] * values
    x = x + m.leave(m.gate(joined(y) * jax.nn.silu(z)))
    return m.head(x.mean(axis=1))


@style(
    lambda rng: {"sound": SEQUENCES(rng), "words": words(2)(rng)},
    first=conv(2, w, (3,)),
    second=conv(w, w, (3,), strides=2),
    **TRANSFORMER,
    table=table(WORDS, w),
    place=param(2, w),
    norm=layer_norm(w),
    query=linear(w, w),
    key=linear(w, w, use_bias=False),
    value=linear(w, w),
    mix=linear(w, w),
    head=linear(w, WORDS),
)
def whisper(m, batch):
    """An encoder of sound, whose outputs the words look at."""
    sound = jax.nn.gelu(m.second(jax.nn.gelu(m.first(batch["sound"]))))
    sound = transformer(m, sound + sinusoids(jnp.arange(sound.shape[1]), sound.shape[2]))
    h = m.table(batch["words"]) + m.place
    seen = attention(*(heads(a) for a in (m.query(m.norm(h)), m.key(sound), m.value(sound))))
    return m.head(h + m.mix(joined(seen)))


def rotary(x):
    """(N, T, H, K) turned by the place."""
    angles = jnp.arange(x.shape[1])[:, None, None] * 10.0 ** -jnp.arange(x.shape[-1] // 2)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


@style(
    words(3),
    table=table(WORDS, w),
    before=rms_norm(w),
    query=linear(w, by(2), use_bias=False),
    key=linear(w, w, use_bias=False),
    value=linear(w, w, use_bias=False),
    query_norm=rms_norm(lambda width: width // 2),
    key_norm=rms_norm(lambda width: width // 2),
    out=linear(by(2), w, use_bias=False),
    behind=rms_norm(w),
    gate=linear(w, by(3), use_bias=False),
    up=linear(w, by(3), use_bias=False),
    down=linear(by(3), w, use_bias=False),
    norm=rms_norm(w),
    head=linear(w, WORDS, use_bias=False),
)
def qwen(m, x):
    """Four heads of queries for two of keys and values."""
    x = m.table(x)
    h = m.before(x)
    query = rotary(m.query_norm(heads(m.query(h), 4)))
    key, value = rotary(m.key_norm(heads(m.key(h)))), heads(m.value(h))
    key, value = (jnp.repeat(a, 2, axis=2) for a in (key, value))
    x = x + m.out(joined(attention(query, key, value, causal=True)))
    h = m.behind(x)
    x = x + m.down(jax.nn.silu(m.gate(h)) * m.up(h))
    return m.head(m.norm(x))


@style(
    words(3),
    table=table(WORDS, w),
    before=param(w),
    query=param(2, w, w),
    keys=param(2, 1, w, w),
    out=param(2, w, w),
    behind=param(w),
    gates=param(2, w, by(3)),
    down=linear(by(3), w, use_bias=False),
)
def gemma(m, x):
    """Products written as einsum, scales around 1, a tied table, capped logits."""

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)

    x = m.table(x) * x.shape[-1] ** 0.5
    h = norm(x, m.before[...])
    query = rotary(jnp.einsum("ntd,hdk->nthk", h, m.query[...]))
    key, value = jnp.einsum("ntd,cgdk->cntgk", h, m.keys[...])
    key, value = (jnp.broadcast_to(a, query.shape) for a in (rotary(key), value))
    x = x + jnp.einsum("nthk,hkd->ntd", attention(query, key, value, causal=True), m.out[...])
    gates, up = jnp.einsum("ntd,cdf->cntf", norm(x, m.behind[...]), m.gates[...])
    return 3 * jnp.tanh(m.table.attend(x + m.down(jax.nn.gelu(gates) * up)) / 3)


LAYERS = 2


@style(
    words(3),
    table=table(WORDS, w),
    place=table(3, w),
    before=param(LAYERS, w),
    qkv=param(LAYERS, w, by(3)),
    shift=param(LAYERS, by(3)),
    out=param(LAYERS, w, w),
    behind=param(LAYERS, w),
    up=param(LAYERS, w, by(4)),
    down=param(LAYERS, by(4), w),
    norm=layer_norm(w),
    head=linear(w, WORDS),
)
def nanogpt(m, x):
    """A loop over layers that keeps no activations."""

    def norm(x, scale):
        x = x - x.mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    @jax.checkpoint
    def block(x, layer):
        q, k, v = jnp.split(norm(x, layer["before"]) @ layer["qkv"] + layer["shift"], 3, axis=-1)
        x = x + joined(attention(heads(q), heads(k), heads(v), causal=True)) @ layer["out"]
        return x + jax.nn.gelu(norm(x, layer["behind"]) @ layer["up"]) @ layer["down"], None

    names = ("before", "qkv", "shift", "out", "behind", "up", "down")
    x = m.table(x) + m.place(jnp.arange(x.shape[1]))
    x, _ = jax.lax.scan(block, x, {name: getattr(m, name)[...] for name in names})
    return m.head(m.norm(x))


@style(words(3), table=table(WORDS, w), place=param(3, w), **TRANSFORMER, norm=layer_norm(w))
def tied_gpt(m, x):
    x = transformer(m, m.table(x) + m.place, causal=True)
    return m.table.attend(m.norm(x))


EXPERTS = {
    "enter": linear(2, w),
    "route": linear(w, 3, use_bias=False),
    "up": param(3, w, w),
    "down": param(3, w, w),
    "head": linear(w, OUTPUTS),
}


@style(SEQUENCES, gate=param(3, w, w), **EXPERTS)
def mixture(m, x):
    """The two best of three experts for every token, weighed."""
    x = m.enter(x)
    share, which = jax.lax.top_k(jax.nn.softmax(m.route(x)), 2)
    gate = jnp.einsum("ntk,ekf->ntef", x, m.gate[...])
    up = jnp.einsum("ntk,ekf->ntef", x, m.up[...])
    found = jnp.einsum("ntef,efk->ntek", jax.nn.silu(gate) * up, m.down[...])
    found = jnp.take_along_axis(found, which[..., None], axis=2)
    return m.head((x + (share[..., None] * found).sum(axis=2)).mean(axis=1))


@style(SEQUENCES, **EXPERTS)
def dispatch(m, x):
    """The best of three experts for every token, each with its own copy of the weights."""
    x = m.enter(x)
    share, which = jax.lax.top_k(jax.nn.softmax(m.route(x)), 1)
    up, down = (weights[...][which[..., 0]] for weights in (m.up, m.down))
    h = jax.nn.silu(jnp.einsum("ntk,ntkf->ntf", x, up))
    return m.head((x + share * jnp.einsum("ntf,ntfk->ntk", h, down)).mean(axis=1))


@style(
    lambda rng: {
        "nodes": rng.normal(size=(SAMPLES, 4, 2)),
        "edges": rng.normal(size=(SAMPLES, 5, 1)),
        "source": rng.integers(0, 4, (SAMPLES, 5)),
        "target": rng.integers(0, 4, (SAMPLES, 5)),
    },
    enter=linear(2, w),
    message=linear(lambda width: 2 * width + 1, w),
    update=linear(by(2), w),
    head=linear(w, OUTPUTS),
)
def graph_network(m, batch):
    """Messages along the edges of a graph a sample, summed at their targets."""

    def one(graph):
        h = m.enter(graph["nodes"])
        pairs = [h[graph["source"]], h[graph["target"]], graph["edges"]]
        sent = jax.nn.relu(m.message(jnp.concatenate(pairs, axis=-1)))
        received = jax.ops.segment_sum(sent, graph["target"], len(h))
        return m.head((h + m.update(jnp.concatenate([h, received], axis=-1))).mean(axis=0))

    return jax.vmap(one)(batch)


@style(
    numbers(4),
    first=linear(2, by(2)),
    one=linear(by(2), 4),
    second=linear(2, by(2)),
    two=linear(by(2), 4),
)
def flow(m, x):
    """Two affine couplings: where a sample goes, and the logarithm of the change of volume."""
    volume = 0
    for enter, leave in ((m.first, m.one), (m.second, m.two)):
        kept, moved = jnp.split(x, 2, axis=1)
        shift, scale = jnp.split(leave(jnp.tanh(enter(kept))), 2, axis=1)
        x = jnp.concatenate([moved * jnp.exp(scale) + shift, kept], axis=1)
        volume = volume + scale.sum(axis=1, keepdims=True)
    return jnp.concatenate([x, volume], axis=1)


class Count(nnx.Variable):
    """Of calls."""


@style(numbers(3), w=param(3, w), b=param(w), count=param(kind=Count), v=param(w, 2), c=param(2))
def toy(m, x):
    """A layer that counts its calls."""
    m.count[...] += 1
    return jnp.tanh(x @ m.w + m.b) @ m.v + m.c


@style(
    words(5),
    table=table(WORDS, w),
    two=conv(w, w, (2,), padding="VALID"),
    three=conv(w, w, (3,), padding="VALID"),
    head=linear(by(2), OUTPUTS),
)
def text_cnn(m, x):
    h = m.table(x)
    return m.head(jnp.concatenate([jax.nn.relu(c(h)).max(axis=1) for c in (m.two, m.three)], 1))
