"""The causal transformer over tokens: what a token sees, both forms, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng

SIZES = {"vocabulary": 11, "context": 5, "width": 4, "depth": 2, "heads": 2, "mlp": 6}
TOKENS = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)


@pytest.fixture(scope="module")
def model():
    return ng.LanguageModel(**SIZES, rngs=nnx.Rngs(0))


def test_a_token_sees_none_behind_it(model):
    logits = model(TOKENS)
    assert logits.shape == (3, 5, 11)
    changed = model(TOKENS.at[:, 3].add(1) % 11)
    moved = np.any(logits != changed, axis=(0, 2))
    np.testing.assert_array_equal(moved, [False, False, False, True, True])
    np.testing.assert_allclose(model(TOKENS[:, :3]), logits[:, :3], rtol=1e-4, atol=1e-5)


def test_stacked_blocks_are_the_same_network(model):
    looped = ng.LanguageModel(**SIZES, scan=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(looped(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
    kernel = looped.blocks.expand.kernel[...]
    np.testing.assert_array_equal(kernel[1], model.blocks[1].expand.kernel[...])


def test_number_of_parameters(model):
    vocabulary, context, width, depth, _, mlp = SIZES.values()
    block = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
    expected = 2 * vocabulary * width + context * width + depth * block + 2 * width
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads = 3 must divide width = 4"),
        ({"vocabulary": 0}, "vocabulary must be a positive integer"),
        ({"depth": 1.5}, "depth must be a positive integer"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        ng.LanguageModel(**{**SIZES, **change}, rngs=nnx.Rngs(0))


def test_bad_tokens(model):
    with pytest.raises(ValueError, match=r"T at most context = 5, got \(1, 6\)"):
        model(jnp.zeros((1, 6), int))
    with pytest.raises(TypeError, match="tokens must be integers, got float32"):
        model(jnp.zeros((1, 2)))
