"""Signals of every layer kind against jax.jacobian, and what serves the parameters without one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK
from flax import nnx
from jacobian_oracle import compare, with_values

import natgrad_flax as ng
from natgrad_flax.models.transformer import attend
from natgrad_flax.signals.dense import DenseSignals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.tied import TiedSignals

pytestmark = pytest.mark.usefixtures("x64")

OUTPUTS = 2


def rngs(seed=0):
    """Of a generator that compiles in a tenth of the default's time."""
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


class Branches(nnx.Module):
    """Layers side by side on parts of the inputs, and a fixed readout of the tanh of each.

    Args:
      branches: by name the layer, the shape of its inputs, and how it is called, if not plainly.
    """

    def __init__(self, branches):
        self.layers = nnx.Dict({name: branch[0] for name, branch in branches.items()})
        self.branches = nnx.static(
            {
                name: (branch[1], branch[2] if branch[2:] else None)
                for name, branch in branches.items()
            }
        )

    def __call__(self, x):
        outputs = jnp.zeros((len(x), OUTPUTS), x.dtype)
        for number, (name, (shape, call)) in enumerate(self.branches.items()):
            part = jnp.roll(x, number, axis=1)[:, : int(np.prod(shape))].reshape(len(x), *shape)
            layer = self.layers[name]
            found = jnp.tanh(layer(part) if call is None else call(layer, part))
            found = found.reshape(len(x), -1)
            readout = np.random.default_rng(number).normal(size=(found.shape[1], OUTPUTS))
            outputs = outputs + found @ readout
        return outputs


def settings():
    return {"param_dtype": jnp.float64, "rngs": rngs()}


def kinds(signals):
    """By the kind of signals the layers, or their parameters where these are explicit."""
    found = {DenseSignals: set(), SharedSignals: set(), ExplicitSignals: set()}
    for layer in signals.layers:
        explicit = isinstance(layer, ExplicitSignals)
        path = (*layer.path, layer.kernel_form.name) if explicit else layer.path
        kind = SharedSignals if isinstance(layer, TiedSignals) else type(layer)
        found[kind].add(".".join(map(str, path)))
    return found.values()


def check(branches, width=60, samples=2):
    """Signals by the name of the branch (the first of several layers)."""
    model = with_values(nnx.eval_shape(lambda: Branches(branches(settings()))))
    signals = compare(model, jnp.asarray(np.random.default_rng(1).normal(size=(samples, width))))
    return {a.path[1]: a for a in reversed(signals.layers)}, signals


def rounded(*args, **kwargs):
    """A product that is not linear in the kernel."""
    return jnp.sin(jax.lax.dot_general(*args, **kwargs))


def test_affine_layers():
    found, _ = check(
        lambda k: {
            "dense": (ng.Dense(5, 3, bias_variance=0.4, **k), (5,)),
            "linear": (nnx.Linear(5, 3, **k), (5,)),
            "tokens": (nnx.Linear(4, 3, use_bias=False, **k), (3, 4)),
            "general": (nnx.LinearGeneral((3, 4), (2, 3), axis=(-2, -1), **k), (3, 4)),
            "middle": (nnx.LinearGeneral(3, (2, 2), axis=1, **k), (3, 4)),
            "swapped": (nnx.LinearGeneral((3, 4), 2, axis=(-1, -2), **k), (2, 3, 4)),
            "batched": (
                nnx.LinearGeneral(4, 2, batch_axis={0: 3}, **k),
                (3, 4),
                lambda layer, part: layer(part.swapaxes(0, 1)).swapaxes(0, 1),
            ),
            "grouped": (nnx.Einsum("...gk,gkm->...gm", (2, 2, 3), (2, 3), **k), (4, 2, 2)),
            "turned": (nnx.Einsum("ntk,hkm->nhmt", (2, 3, 2), (2, 2), **k), (4, 3)),
            "summed": (nnx.Einsum("ntk,km->nm", (3, 2), None, **k), (4, 3)),
            "backwards": (nnx.Einsum("nkt,mk->ntm", (2, 3), (2,), **k), (3, 4)),
            "product": (nnx.Linear(3, 2, dot_general=rounded, **k), (3,)),
            "unbatched": (
                nnx.Linear(3, 2, **k),
                (4,),
                lambda layer, part: part[:, :2] * layer(jnp.asarray([0.3, -1.0, 0.7])),
            ),
            "embedding": (
                nnx.Embed(5, 3, dtype=jnp.float64, **k),
                (6,),
                lambda layer, part: layer(jnp.clip(jnp.int32(2 * part) + 2, 0, 4)),
            ),
            "positions": (
                nnx.Embed(4, 3, dtype=jnp.float64, **k),
                (4, 3),
                lambda layer, part: part * layer(jnp.arange(4)),
            ),
        }
    )
    # what a layer makes of its product is no part of it; its bias has a block of its own
    dense = {"dense", "linear", "general", "unbatched", "summed", "product"}
    for name, layer in found.items():
        assert isinstance(layer, DenseSignals if name in dense else SharedSignals), name
    assert found["grouped"].num_groups == 2
    assert found["batched"].num_groups == 3


def test_convolutions():
    found, _ = check(
        lambda k: {
            "line": (nnx.Conv(2, 3, 3, **k), (6, 2)),
            "causal": (nnx.Conv(2, 3, (3,), padding="CAUSAL", kernel_dilation=2, **k), (6, 2)),
            "same": (nnx.Conv(2, 3, (3, 2), strides=(2, 1), **k), (4, 5, 2)),
            "valid": (
                nnx.Conv(2, 4, (2, 2), padding="VALID", feature_group_count=2, use_bias=False, **k),
                (4, 4, 2),
            ),
            "circular": (nnx.Conv(2, 3, (3, 2), padding="CIRCULAR", strides=2, **k), (5, 4, 2)),
            "reflect": (nnx.Conv(1, 3, (3, 3), padding="REFLECT", **k), (4, 4, 1)),
            "numbers": (nnx.Conv(1, 2, (2, 2), padding=1, kernel_dilation=(1, 2), **k), (4, 4, 1)),
            "pairs": (
                nnx.Conv(1, 2, (2, 2), padding=((0, 1), (2, 0)), input_dilation=(2, 1), **k),
                (3, 4, 1),
            ),
            "volume": (nnx.Conv(1, 2, (2, 2, 2), **k), (3, 2, 2, 1)),
            "patches": (nnx.Conv(2, 3, (2, 2), padding="VALID", strides=2, **k), (4, 4, 2)),
            "whole": (nnx.Conv(2, 3, (3, 3), padding="VALID", **k), (3, 3, 2)),
            "ours": (
                ng.Conv(
                    2,
                    4,
                    (3, 3),
                    feature_group_count=2,
                    bias_variance=0.3,
                    weight_variance=2.0,
                    strides=2,
                    **k,
                ),
                (4, 5, 2),
            ),
            "ours circular": (
                ng.Conv(2, 2, (3,), padding="CIRCULAR", kernel_dilation=2, strides=2, **k),
                (6, 2),
            ),
            "ours valid": (ng.Conv(1, 2, (2, 2), padding="VALID", **k), (3, 4, 1)),
            "masked": (nnx.Conv(2, 2, (3,), mask=np.ones((3, 2, 2)), **k), (5, 2)),
            "transposed": (nnx.ConvTranspose(2, 2, (2,), strides=2, **k), (3, 2)),
            "stacked": (nnx.Conv(1, 2, (2,), **k), (3, 4, 1)),
        }
    )
    for name, layer in found.items():
        kind = (
            ExplicitSignals
            if name == "masked"
            else DenseSignals
            if name == "whole"
            else SharedSignals
        )
        assert isinstance(layer, kind), name
    assert found["valid"].num_groups == found["ours"].num_groups == 2


def test_normalisations_and_attention():
    attention = {"num_heads": 2, "in_features": 4, "decode": False, "attention_fn": attend}
    found, signals = check(
        lambda k: {
            "layer": (nnx.LayerNorm(4, **k), (3, 4)),
            "scale": (nnx.LayerNorm(4, use_bias=False, **k), (4,)),
            "bias": (nnx.LayerNorm(4, use_scale=False, **k), (3, 4)),
            "square": (nnx.RMSNorm(4, **k), (3, 4)),
            "group": (nnx.GroupNorm(4, num_groups=2, **k), (3, 4)),
            "instance": (nnx.InstanceNorm(4, **k), (3, 4)),
            "batch": (nnx.BatchNorm(4, dtype=jnp.float64, **k), (3, 4)),
            "asked": (
                nnx.BatchNorm(4, dtype=jnp.float64, **k),
                (4,),
                lambda layer, part: layer(part, use_running_average=True),
            ),
            "first axis": (
                nnx.LayerNorm(4, feature_axes=1, reduction_axes=(1, 2), **k),
                (4, 4),
            ),
            "self": (nnx.MultiHeadAttention(**attention, **k), (3, 4)),
            "masked": (
                nnx.MultiHeadAttention(**attention, qkv_features=8, normalize_qk=True, **k),
                (3, 4),
                lambda layer, part: layer(part, mask=jnp.tril(jnp.ones((3, 3), bool))),
            ),
            "cross": (
                nnx.MultiHeadAttention(**attention, qkv_features=8, **k),
                (5, 4),
                lambda layer, part: layer(part[:, :2], part[:, 2:]),
            ),
        }
    )
    for name in ("layer", "scale", "bias", "square", "group", "instance", "batch", "asked"):
        assert isinstance(found[name], ExplicitSignals)
        assert found[name].num_units == 4
        assert found[name].fan_in == (1 if name in ("scale", "bias", "square") else 2)
    parts = [a for a in signals.layers if a.path[1] == "self"]
    assert [a.path[2] for a in parts] == ["query", "key", "value", "out"]
    assert all(isinstance(a, SharedSignals) for a in parts)


class Tied(nnx.Module):
    """One Variable in two layers, a layer called twice, and an embedding that decodes as well."""

    def __init__(self, k):
        self.first = nnx.Linear(4, 4, use_bias=False, **k)
        self.second = nnx.Linear(4, 4, **k)
        self.second.kernel = self.first.kernel
        self.twice = nnx.Linear(4, 4, **k)
        self.conv = nnx.Conv(1, 2, (2,), **k)
        self.words = nnx.Embed(3, 4, dtype=jnp.float64, **k)
        self.shift = nnx.Param(jnp.zeros((), jnp.float64))
        self.gains = nnx.Param(jnp.zeros((2, 4), jnp.float64))
        self.row = nnx.List([nnx.Param(jnp.zeros(4, jnp.float64))])
        self.bag = nnx.data({"offset": nnx.Param(jnp.zeros(4, jnp.float64))})
        self.drop = nnx.Dropout(0.5, rngs=k["rngs"])

    def __call__(self, x):
        h = jnp.tanh(self.second(jnp.tanh(self.first(x))))
        h = self.twice(jnp.sin(self.twice(h)))
        h = self.drop(h) * self.gains[0] + self.gains[1] + self.shift[...]
        h = h * self.row[0][...] + self.bag["offset"][...]
        h = jnp.tanh(self.conv(self.conv(h[:, :, None])[..., :1])).reshape(len(x), -1)
        ids = jnp.int32(x[:, :2] > 0) + 1
        return self.words.attend(h[:, :4] + self.words(ids).sum(1))


class Wrapped(nnx.Module):
    """Layers whose parameters are changed on their way, or reached by a transformation."""

    def __init__(self, k):
        self.weight = nnx.WeightNorm(nnx.Linear(4, 4, **k), use_scale=False, rngs=k["rngs"])
        self.spectral = nnx.SpectralNorm(
            nnx.Linear(4, 4, **k), dtype=jnp.float64, param_dtype=jnp.float64, rngs=k["rngs"]
        )
        self.low = nnx.LoRALinear(4, 4, lora_rank=2, lora_param_dtype=jnp.float64, **k)
        self.inner = nnx.Linear(4, 4, **k)
        self.compiled = nnx.Linear(4, 4, **k)
        self.cell = nnx.RNN(nnx.LSTMCell(2, 3, **k))
        self.sequence = nnx.Sequential(nnx.Linear(4, 4, **k), jnp.tanh, nnx.LayerNorm(4, **k))

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return nnx.Linear(4, 4, param_dtype=jnp.float64, rngs=rngs)

        self.stack = stack(k["rngs"].split(2))

    def __call__(self, x):
        h = jnp.tanh(self.low(self.spectral(self.weight(x), update_stats=False)))
        h = nnx.remat(lambda layer, h: jnp.tanh(layer(h)))(self.inner, h)
        h = nnx.jit(lambda layer, h: jnp.tanh(layer(h)))(self.compiled, h)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h, layer):
            return jnp.tanh(layer(h))

        h = self.sequence(run(h, self.stack))
        return self.cell(h.reshape(len(x), 2, 2)).reshape(len(x), -1)


INPUTS = np.random.default_rng(1).normal(size=(2, 4))


def test_parameters_without_a_formula():
    model = with_values(nnx.eval_shape(lambda: Tied(settings())))
    dense, shared, explicit = kinds(compare(model, jnp.asarray(INPUTS)))
    assert not dense
    assert shared == {"twice", "conv", "first", "words"}
    assert explicit == {
        "second.bias",
        "shift",
        "gains",
        "row.0",
        "bag.offset",
    }


def test_wrapped_layers():
    model = with_values(nnx.eval_shape(lambda: Wrapped(settings())))
    dense, shared, explicit = kinds(compare(model, jnp.asarray(INPUTS)))
    assert dense == {"sequence.layers.0", "low", "low.lora", "inner", "compiled", "stack"}
    gates = ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")
    assert shared == {f"cell.cell.{gate}" for gate in gates}
    # what normalises weights makes others of them
    wrapped = ("weight.layer_instance", "spectral.layer_instance")
    norms = {f"{path}.{name}" for path in wrapped for name in ("kernel", "bias")}
    assert explicit == norms | {"sequence.layers.2.scale"}


def test_filters():
    """The Fisher is that of the chosen parameters; the others are held."""
    model = with_values(nnx.eval_shape(lambda: Tied(settings())))
    some = nnx.All(nnx.Param, nnx.Any(nnx.PathContains("twice"), nnx.PathContains("shift")))
    bias = nnx.All(nnx.PathContains("second"), nnx.PathContains("bias"))

    @partial(jax.jit, compiler_options=QUICK)
    def run(x):
        whole, chosen, alone = (
            ng.jacobian_signals(model, x, wrt) for wrt in (nnx.Param, some, bias)
        )
        of_both = [a for a in whole.layers if "twice" in a.path or a.kernel_form.name == "shift"]
        return alone, [[a.gram() for a in layers] for layers in (of_both, chosen.layers)]

    alone, grams = run(jnp.asarray(INPUTS))
    for one, other in zip(*grams, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    (layer,) = alone.layers
    assert isinstance(layer, ExplicitSignals)
    assert (layer.path, layer.num_units) == (("second",), 4)
