"""Small networks in the styles in which others write theirs.

A style is a forward function of a module with given parts and of a batch; ``make`` builds it, with
parameters of NumPy's, so that nothing is compiled for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jacobian_oracle import with_values

Parts = Mapping[str, Callable[[nnx.Rngs], Any]]
SAMPLES, WIDTH, OUTPUTS, WORDS = 3, 4, 2, 5


class Styled(nnx.Module):
    """Parts by name, and what a function makes of them and of the inputs."""

    def __init__(self, call: Callable[[Any, Any], Any], parts: Parts) -> None:
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        for name, part in parts.items():
            setattr(self, name, part(rngs))
        self.call = call

    def __call__(self, x: Any) -> Any:
        return self.call(self, x)


@dataclass(frozen=True)
class Style:
    """A way to write a network.

    Attributes:
      forward: from a module with the parts, and a batch, to outputs (N, ..., C).
      parts: from a width to the parts.
      batch: from a generator of NumPy's to a batch.
      wrt: filter of the parameters that move.
    """

    forward: Callable[[Any, Any], Any]
    parts: Callable[[int], Parts]
    batch: Callable[[np.random.Generator], Any]
    wrt: Any = nnx.Param

    def shapes(self, width: int = WIDTH) -> Styled:
        """The module without values, in evaluation mode."""
        model = nnx.eval_shape(lambda: Styled(self.forward, self.parts(width)))
        model.eval()
        return model

    def make(self) -> tuple[Styled, Any]:
        """The module in float64, and a batch."""
        return with_values(self.shapes()), self.batch(np.random.default_rng(1))


STYLES: dict[str, Style] = {}
"""All styles by name."""


def style(batch: Callable[[np.random.Generator], Any], wrt: Any = nnx.Param, **parts: Any) -> Any:
    """Registers a forward function; parts are functions of the width."""

    def register(forward: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def sized(width: int) -> Parts:
            return {name: part(width) for name, part in parts.items()}

        STYLES[forward.__name__] = Style(forward, sized, batch, wrt)
        return forward

    return register


def _layer(kind: Any, **fixed: Any) -> Any:
    """From arguments of a layer, of which functions are called with the width, to a part."""

    def part(*sizes: Any, **settings: Any) -> Any:
        def sized(width: int) -> Callable[[nnx.Rngs], Any]:
            given = [size(width) if callable(size) else size for size in sizes]
            more = {k: v(width) if callable(v) else v for k, v in settings.items()}
            return lambda rngs: kind(*given, rngs=rngs, param_dtype=jnp.float64, **fixed, **more)

        return sized

    return part


def w(width: int) -> int:
    """The width itself, as the size of a part."""
    return width


def by(factor: int) -> Callable[[int], int]:
    """A multiple of the width."""
    return lambda width: factor * width


def param(*shape: Any, kind: Any = nnx.Param) -> Any:
    """An array."""

    def sized(width: int) -> Callable[[nnx.Rngs], Any]:
        found = [size(width) if callable(size) else size for size in shape]
        return lambda rngs: kind(jnp.zeros(found, jnp.float64))

    return sized


linear, conv, upward = map(_layer, (nnx.Linear, nnx.Conv, nnx.ConvTranspose))
layer_norm, rms_norm, batch_norm = map(_layer, (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm))
group_norm, table = _layer(nnx.GroupNorm), _layer(nnx.Embed)


def numbers(*shape: int) -> Callable[[np.random.Generator], Any]:
    """A batch of arrays."""
    return lambda rng: rng.normal(size=(SAMPLES, *shape))


def words(length: int) -> Callable[[np.random.Generator], Any]:
    """A batch of sequences."""
    return lambda rng: rng.integers(0, WORDS, (SAMPLES, length))


IMAGES, SEQUENCES = numbers(4, 4, 1), numbers(4, 2)


def sinusoids(places: Any, width: int) -> Any:
    """(..., width) of places (...)."""
    rates = 10.0 ** -jnp.arange(width // 2)
    angles = jnp.asarray(places, jnp.float64)[..., None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def attention(q: Any, k: Any, v: Any, *, causal: bool = False) -> Any:
    """Of (N, T, H, K), as (N, T, H, K)."""
    scores = jnp.einsum("nqhk,nthk->nhqt", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -1e9)
    return jnp.einsum("nhqt,nthk->nqhk", jax.nn.softmax(scores), v)


def heads(x: Any, count: int = 2) -> Any:
    """(N, T, D) as (N, T, H, D/H)."""
    return x.reshape(*x.shape[:2], count, -1)


def joined(x: Any) -> Any:
    """(N, T, H, K) as (N, T, H K)."""
    return x.reshape(*x.shape[:2], -1)


def in_a_row(x: Any) -> Any:
    """Pixels (N, H, W, C) as (N, H W, C)."""
    return x.reshape(len(x), -1, x.shape[-1])


# images


@style(
    IMAGES,
    stem=conv(1, w, (2, 2), strides=2),
    depth=conv(w, w, (3, 3), feature_group_count=w),
    norm=layer_norm(w),
    up=linear(w, by(4)),
    down=linear(by(4), w),
    scale=param(w),
    head=linear(w, OUTPUTS),
)
def convnext(m, x):
    x = m.stem(x)
    x = x + m.scale * m.down(jax.nn.gelu(m.up(m.norm(m.depth(x)))))
    return m.head(x.mean(axis=(1, 2)))


@style(
    IMAGES,
    expand=conv(1, w, (1, 1), use_bias=False),
    first=batch_norm(w),
    depth=conv(w, w, (3, 3), feature_group_count=w, strides=2, use_bias=False),
    second=batch_norm(w),
    squeeze=linear(w, 2),
    excite=linear(2, w),
    project=conv(w, w, (1, 1), use_bias=False),
    head=linear(w, OUTPUTS),
)
def efficientnet(m, x):
    x = jax.nn.silu(m.first(m.expand(x)))
    x = jax.nn.silu(m.second(m.depth(x)))
    gate = m.excite(jax.nn.silu(m.squeeze(x.mean(axis=(1, 2), keepdims=True))))
    return m.head((x + m.project(x * jax.nn.sigmoid(gate))).mean(axis=(1, 2)))


@style(
    IMAGES,
    first=conv(1, w, (3, 3), strides=2, use_bias=False),
    one=batch_norm(w),
    second=conv(w, w, (3, 3), use_bias=False),
    two=batch_norm(w),
    short=conv(1, w, (1, 1), strides=2, use_bias=False),
    head=linear(w, OUTPUTS),
)
def resnet(m, x):
    h = jax.nn.relu(m.one(m.first(x)))
    return m.head(jax.nn.relu(m.two(m.second(h)) + m.short(x)).mean(axis=(1, 2)))


@style(
    lambda rng: {"x": rng.normal(size=(SAMPLES, 4, 4, 1)), "t": rng.uniform(0, 9, SAMPLES)},
    enter=conv(1, w, (3, 3)),
    time=linear(w, w),
    down=conv(w, w, (3, 3), strides=2),
    norm=group_norm(w, num_groups=2),
    middle=conv(w, w, (3, 3), padding="CIRCULAR"),
    up=upward(w, w, (2, 2), strides=2),
    leave=conv(by(2), 1, (3, 3)),
)
def unet(m, batch):
    skip = jax.nn.silu(m.enter(batch["x"]))
    time = m.time(sinusoids(batch["t"], skip.shape[-1]))
    h = m.down(skip) + time[:, None, None]
    h = m.up(h + m.middle(jax.nn.silu(m.norm(h))))
    return m.leave(jnp.concatenate([h, skip], axis=-1))


def _image_tokens(m, x):
    tokens = in_a_row(m.patch(x))
    token = jnp.broadcast_to(m.token[...], (len(x), 1, tokens.shape[-1]))
    return jnp.concatenate([token, tokens], axis=1) + m.place


TRANSFORMER = {
    "before": layer_norm(w),
    "qkv": linear(w, by(3)),
    "out": linear(w, w),
    "behind": layer_norm(w),
    "up": linear(w, by(4)),
    "down": linear(by(4), w),
}


def transformer(m, x, *, causal=False):
    """A pre-norm block of TRANSFORMER's parts."""
    q, k, v = jnp.split(heads(m.qkv(m.before(x))), 3, axis=-1)
    x = x + m.out(joined(attention(q, k, v, causal=causal)))
    return x + m.down(jax.nn.gelu(m.up(m.behind(x))))


VIT = {
    "patch": conv(1, w, (2, 2), strides=2, padding="VALID"),
    "token": param(1, 1, w),
    "place": param(5, w),
    **TRANSFORMER,
    "norm": layer_norm(w),
    "head": linear(w, OUTPUTS),
}


@style(IMAGES, **VIT)
def vit(m, x):
    return m.head(m.norm(transformer(m, _image_tokens(m, x)))[:, 0])


def _lora(width: int) -> Callable[[nnx.Rngs], Any]:
    settings = {"lora_rank": 2, "lora_param_dtype": jnp.float64, "param_dtype": jnp.float64}
    return lambda rngs: nnx.LoRALinear(width, 3 * width, rngs=rngs, **settings)


STYLES["lora"] = Style(
    vit,
    lambda width: {n: p(width) for n, p in {**VIT, "qkv": _lora}.items()},
    IMAGES,
    nnx.LoRAParam,
)


@style(
    IMAGES,
    patch=conv(1, w, (2, 2), strides=2),
    one=layer_norm(w),
    across=linear(4, 6),
    back=linear(6, 4),
    two=layer_norm(w),
    up=linear(w, by(2)),
    down=linear(by(2), w),
    head=linear(w, OUTPUTS),
)
def mixer(m, x):
    x = in_a_row(m.patch(x))
    x = x + m.back(jax.nn.gelu(m.across(m.one(x).swapaxes(1, 2)))).swapaxes(1, 2)
    return m.head((x + m.down(jax.nn.gelu(m.up(m.two(x))))).mean(axis=1))


@style(
    numbers(6),
    encode=linear(6, by(2)),
    mean=linear(by(2), w),
    spread=linear(by(2), w),
    decode=linear(w, 6),
)
def vae(m, x):
    """Logits at the mean of the code, and how the code would be drawn."""
    h = jax.nn.relu(m.encode(x))
    code = m.mean(h)
    return jnp.concatenate([m.decode(jax.nn.relu(code)), code, m.spread(h)], axis=1)
