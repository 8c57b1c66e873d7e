"""The convolutional, residual and attention networks and the autoencoder."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.models.transformer import attend

IMAGES = (4, 6, 2)
TINY = {
    "flatten": partial(ng.ConvNet, IMAGES, (3, 4), 3, strides=(1, 2), bias_variance=0.1),
    "average": partial(
        ng.ConvNet, IMAGES, (3,), 3, strides=2, padding="CIRCULAR", pooling="average"
    ),
    "autoencoder": partial(ng.Autoencoder, (5, 4, 2, 4, 5)),
    "group": partial(ng.ResidualNet, IMAGES, (4, 6), 1, 3, groups=2),
    "batch": partial(ng.ResidualNet, IMAGES, (4, 6), 1, 3, normalisation="batch"),
    "none": partial(ng.ResidualNet, IMAGES, (4, 6), 2, 3, normalisation="none"),
    "transformer": partial(ng.VisionTransformer, IMAGES, 2, 8, 2, 2, 6, 3),
}


def rngs(seed):
    """Of a generator that compiles in a tenth of the default's time."""
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


def make(name, seed=0, **settings):
    return TINY[name](param_dtype=jnp.float64, rngs=rngs(seed), **settings)


def parameters(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def samples(model, count=3):
    shape = getattr(model, "input_shape", None) or model.widths[:1]
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, *shape)))


@pytest.mark.parametrize("name", TINY)
def test_float64_and_samples_on_their_own(name, x64):
    model = make(name)
    model.eval()
    x = samples(model)

    def both(x):
        return model(x), jax.vmap(lambda sample: model(sample[None])[0])(x)

    program = jax.jit(both).trace(x)
    assert "f32" not in str(program.jaxpr)
    together, alone = program.lower().compile()(x)
    outputs = model.widths[-1] if name == "autoencoder" else 3
    assert together.shape == (3, outputs)
    assert together.dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float64")}
    np.testing.assert_allclose(alone, together, rtol=1e-10, atol=1e-12)
    assert np.ptp(np.asarray(together), axis=0).min() > 1e-6


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_gives_the_same_parameters(name, x64):
    first, same, other = (parameters(make(name, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def residual_count(channels, blocks, outputs, *, norm, bias):
    """Parameters of a residual network, those of its stem of 3 channels included."""

    def conv(taps, fan, units):
        return taps * fan * units + bias * units

    total, fan = conv(9, 3, channels[0]), channels[0]
    for stage, width in enumerate(channels):
        for block in range(blocks):
            total += norm * (fan + width) + conv(9, fan, width) + conv(9, width, width)
            if fan != width or (stage > 0 and block == 0):
                total += conv(1, fan, width)
            fan = width
    return total + norm * fan + fan * outputs + outputs


def transformer_count(tokens, patch, width, depth, mlp, outputs):
    norm = 2 * width
    block = 2 * norm + 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width
    embedding = (patch * patch * 3 + 1) * width + tokens * width
    return embedding + depth * block + norm + (width + 1) * outputs


CODER = (784, 400, 200, 100, 50, 100, 200, 400, 784)
COUNTS = {
    "ConvNet": (
        ng.ConvNet,
        9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 128) + 8 * 8 * 128 * 10,
    ),
    "ConvNet, average": (
        partial(ng.ConvNet, pooling="average", kernel_size=(3, 2), bias_variance=0.1),
        6 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 128) + 352 + 128 * 10 + 10,
    ),
    "ConvNet, valid": (
        partial(ng.ConvNet, (9, 8, 1), (2, 3), 4, strides=(2, 1), padding="VALID"),
        9 * (2 + 6) + (2 * 1 * 3) * 4,
    ),
    "Autoencoder": (
        ng.Autoencoder,
        sum(a * b + b for a, b in itertools.pairwise(CODER)),
    ),
    "ResidualNet": (ng.ResidualNet, residual_count((16, 32, 64), 1, 10, norm=2, bias=0)),
    "ResidualNet, batch": (
        partial(ng.ResidualNet, channels=(4, 4), blocks=2, outputs=3, normalisation="batch"),
        residual_count((4, 4), 2, 3, norm=2, bias=0),
    ),
    "ResidualNet, none": (
        partial(ng.ResidualNet, channels=(5, 7), normalisation="none"),
        residual_count((5, 7), 1, 10, norm=0, bias=1),
    ),
    "VisionTransformer": (ng.VisionTransformer, transformer_count(64, 4, 64, 2, 128, 10)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name):
    kind, count = COUNTS[name]
    leaves = parameters(nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["flatten", "average"])
def test_convnet_is_its_layers(name, x64):
    model = make(name, activation="tanh")
    x = samples(model)
    assert [layer.strides for layer in model.convolutions] == [(s, s) for s in model.strides]
    hidden = x
    for layer in model.convolutions:
        hidden = np.tanh(layer(hidden))
    pooled = hidden.mean((1, 2)) if name == "average" else np.reshape(hidden, (3, -1))
    np.testing.assert_allclose(model(x), model.readout(pooled), rtol=1e-12)


def test_facts_of_a_convnet():
    model = nnx.eval_shape(lambda: TINY["average"](rngs=rngs(0)))
    facts = {
        "input_shape": IMAGES,
        "channels": (3,),
        "outputs": 3,
        "kernel_size": (3, 3),
        "strides": (2,),
        "padding": "CIRCULAR",
        "pooling": "average",
        "activation": "relu",
        "weight_variance": 2.0,
        "bias_variance": 0.0,
    }
    assert {name: getattr(model, name) for name in facts} == facts
    assert model.readout.bias is None


@pytest.mark.parametrize("linear_code", [True, False])
def test_autoencoder_activates_all_but_code_and_output(linear_code, x64):
    model = make("autoencoder", linear_code=linear_code)
    x = 3 * samples(model)
    first, code_layer = model.encoder.layers
    third, last = model.decoder.layers
    code = code_layer(np.tanh(first(x)))
    code = code if linear_code else np.tanh(code)
    np.testing.assert_allclose(model.encode(x), code, rtol=1e-12)
    np.testing.assert_allclose(model(x), last(np.tanh(third(code))), rtol=1e-12)


def test_residual_blocks_add_to_their_shortcut(x64):
    model = make("group")
    shapes, x = [], jnp.ones((1, 4, 6, 4))
    for block in model.residual_blocks:
        x = jax.eval_shape(block, x)
        shapes.append(x.shape[1:])
    assert shapes == [(4, 6, 4), (2, 3, 6)]
    for block in model.residual_blocks:
        block.second.kernel[...] = jnp.zeros_like(block.second.kernel[...])
    x = samples(model)
    second = model.residual_blocks[1]
    hidden = second.shortcut(jax.nn.relu(second.first_norm(model.stem(x))))
    expected = model.readout(jax.nn.relu(model.norm(hidden)).mean((1, 2)))
    np.testing.assert_allclose(model(x), expected, rtol=1e-10)


def test_batch_normalisation_follows_train_and_eval(x64):
    model = make("batch")
    x = samples(model)
    model.train()
    before = np.asarray(model.norm.mean[...])
    trained = model(x)
    assert not np.array_equal(before, model.norm.mean[...])
    assert not np.allclose(model(x[:2]), trained[:2], atol=1e-3)
    model.eval()
    statistics = np.asarray(model.norm.mean[...])
    np.testing.assert_allclose(model(x)[:2], model(x[:2]), rtol=1e-10)
    np.testing.assert_array_equal(statistics, model.norm.mean[...])


def test_only_the_position_embedding_tells_patches_apart(x64):
    model = make("transformer")
    x = np.asarray(samples(model))
    swapped = x.copy()
    swapped[:, :2, :2], swapped[:, 2:, 4:] = x[:, 2:, 4:], x[:, :2, :2]
    run = nnx.jit(lambda model, x: model(x))
    assert not np.allclose(run(model, x), run(model, swapped), rtol=1e-3)
    model.position[...] = jnp.zeros_like(model.position[...])
    np.testing.assert_allclose(run(model, x), run(model, swapped), rtol=1e-10)


def test_attention_in_float64(x64):
    generator = np.random.default_rng(0)
    query, key, value = generator.normal(size=(3, 2, 4, 3, 5))
    mask = np.tril(np.ones((4, 4), bool))
    expected = np.empty_like(value)
    for n in range(2):
        for head in range(3):
            logits = query[n, :, head] @ key[n, :, head].T / np.sqrt(5)
            weights = np.where(mask, np.exp(logits), 0.0)
            expected[n, :, head] = weights / weights.sum(1, keepdims=True) @ value[n, :, head]
    found = attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), mask=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["flatten", "group", "transformer"])
@pytest.mark.parametrize("shape", [IMAGES, (2, 4, 6, 3), (2, 6, 4, 2), (2, 48)])
def test_images_of_another_shape(name, shape):
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 4, 6, 2\), got x of"):
        nnx.eval_shape(lambda: TINY[name](rngs=rngs(0))(jnp.ones(shape)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ng.ConvNet, {"input_shape": (32, 32)}, r"input_shape must be three positive integers"),
        (ng.ConvNet, {"channels": ()}, "channels must be positive integers"),
        (ng.ConvNet, {"channels": (4, 0)}, "channels must be positive integers"),
        (ng.ConvNet, {"channels": 4}, "channels must be positive integers"),
        (ng.ConvNet, {"outputs": 0}, "outputs must be a positive integer"),
        (ng.ConvNet, {"kernel_size": (3, 3, 3)}, "kernel_size must be a positive integer or 2"),
        (ng.ConvNet, {"strides": (1, 2)}, "strides .* or 4 of them, one a convolution"),
        (ng.ConvNet, {"padding": "circle"}, "unknown padding.*Did you mean 'CIRCULAR'"),
        (ng.ConvNet, {"pooling": "max"}, "unknown pooling 'max'; known: flatten, average"),
        (ng.ConvNet, {"activation": "rleu"}, "unknown activation"),
        (ng.ConvNet, {"weight_variance": "a"}, "weight_variance must be positive"),
        (ng.ConvNet, {"bias_variance": -1.0}, "bias_variance must be 0 or positive"),
        (ng.ConvNet, {"kernel_size": 9, "padding": "VALID"}, "does not fit into an image"),
        (ng.Autoencoder, {"widths": (5, 5)}, "symmetric around the code"),
        (ng.Autoencoder, {"widths": (5, 3, 3, 5)}, "symmetric around the code"),
        (ng.Autoencoder, {"widths": (5, 3, 4)}, "symmetric around the code"),
        (ng.Autoencoder, {"widths": (5, 0, 5)}, "symmetric around the code"),
        (ng.Autoencoder, {"activation": "rleu"}, "unknown activation"),
        (ng.Autoencoder, {"weight_variance": 0.0}, "weight_variance must be positive"),
        (ng.ResidualNet, {"input_shape": 32}, "input_shape must be three"),
        (ng.ResidualNet, {"channels": (16, 2.5)}, "channels must be positive integers"),
        (ng.ResidualNet, {"blocks": 0}, "blocks must be a positive integer"),
        (ng.ResidualNet, {"groups": 3}, r"groups = 3 must divide all channels, got \(16, 32, 64\)"),
        (ng.ResidualNet, {"normalisation": "Batch"}, "normalisation.*Did you mean 'batch'"),
        (ng.VisionTransformer, {"patch": 5}, "patch = 5 must divide height and width"),
        (ng.VisionTransformer, {"heads": 5}, "heads = 5 must divide width = 64"),
        (ng.VisionTransformer, {"depth": 0}, "depth must be a positive integer"),
        (ng.VisionTransformer, {"mlp": None}, "mlp must be a positive integer"),
    ],
)
def test_bad_settings(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: kind(**changes, rngs=nnx.Rngs(0)))


def test_linear_code_is_a_bool():
    with pytest.raises(TypeError, match="linear_code must be True or False"):
        ng.Autoencoder((5, 3, 5), linear_code="yes", rngs=nnx.Rngs(0))
