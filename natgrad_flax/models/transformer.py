"""A small vision transformer of stock Flax layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from jax import Array

from natgrad_flax.models.activations import get_activation
from natgrad_flax.models.sizes import check_images, check_sizes, image_shape

POSITION_DEVIATION = 0.02
"""Standard deviation of the position embedding at initialisation."""


def attend(query: Array, key: Array, value: Array, **settings: Any) -> Array:
    """The attention of nnx.MultiHeadAttention, in the precision of its inputs.

    Flax's own default works its softmax out in float32, whatever the dtype (seen on JAX 0.10.2).

    Args:
      query: shape (..., T, heads, features of a head).
      key: as the query.
      value: as the query.
      settings: what nnx.MultiHeadAttention passes on, for the weights.

    Returns:
      Shape (..., T, heads, features of a head).
    """
    weights = dot_product_attention_weights(query, key, **settings)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


class TransformerBlock(nnx.Module):
    """Self-attention and two affine layers, each on normalised tokens and added to them.

    Pre-norm (Xiong et al. 2020, arXiv:2002.04745): x + attention(norm(x)), then
    x + contract(gelu(expand(norm(x)))).

    Args:
      width: features of a token.
      heads: attention heads; divides the width.
      mlp: units between the two affine layers.
      causal: whether a token sees only itself and those before it.
      param_dtype: dtype of the parameters.
      rngs: source of randomness.

    Raises:
      ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: int,
        *,
        causal: bool = False,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        if width % heads:
            raise ValueError(f"heads = {heads} must divide width = {width}")
        self.causal = causal
        self.attention_norm = nnx.LayerNorm(width, param_dtype=param_dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            decode=False,
            deterministic=True,
            attention_fn=attend,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(width, param_dtype=param_dtype, rngs=rngs)
        self.expand = nnx.Linear(width, mlp, param_dtype=param_dtype, rngs=rngs)
        self.contract = nnx.Linear(mlp, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps tokens (N, T, width) to tokens (N, T, width)."""
        mask = nnx.make_causal_mask(x[..., 0], dtype=bool) if self.causal else None
        x = x + self.attention(self.attention_norm(x), mask=mask)
        gelu = get_activation("gelu").function
        return x + self.contract(gelu(self.expand(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """A small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Patches become tokens by one convolution whose stride is its size; a learned position is added;
    ``depth`` pre-norm blocks; a last LayerNorm, the mean over the tokens in place of a class token
    (Beyer et al. 2022, arXiv:2205.01580) and a linear readout. Standard parametrisation, stock
    layers, no dropout; a sample's outputs do not depend on the others of the batch.

    Attributes:
      embedding: the nnx.Conv of the patches.
      position: nnx.Param, shape (tokens, width).
      blocks: nnx.List of ``TransformerBlock``.
      norm: the last nnx.LayerNorm.
      readout: the nnx.Linear.
      The other arguments stand as attributes of the same name, except ``param_dtype`` and
      ``rngs``.

    Args:
      input_shape: (H, W, C) of an image.
      patch: height and width of a patch; divides H and W.
      width: features of a token.
      depth: number of blocks.
      heads: attention heads; divides the width.
      mlp: units between the two affine layers of a block.
      outputs: number of outputs.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the same seed gives the same parameters.

    Raises:
      ValueError: a size out of range, patches that do not tile the image, heads that do not divide
        the width.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> sizes = {"width": 8, "depth": 1, "heads": 2, "mlp": 16}
      >>> model = ng.VisionTransformer(
      ...     (6, 6, 1), patch=3, outputs=2, **sizes, rngs=nnx.Rngs(0)
      ... )
      >>> model(jnp.ones((5, 6, 6, 1))).shape, model.position.shape
      ((5, 2), (4, 8))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (32, 32, 3),
        patch: int = 4,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp: int = 128,
        outputs: int = 10,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.input_shape = image_shape(input_shape)
        check_sizes(patch=patch, width=width, depth=depth, heads=heads, mlp=mlp, outputs=outputs)
        patch, width, depth, heads, mlp, outputs = map(
            int, (patch, width, depth, heads, mlp, outputs)
        )
        image = self.input_shape[:2]
        if any(size % patch for size in image):
            raise ValueError(f"patch = {patch} must divide height and width of the images, {image}")
        self.patch = patch
        self.width = width
        self.depth = depth
        self.heads = heads
        self.mlp = mlp
        self.outputs = outputs
        self.embedding = nnx.Conv(
            self.input_shape[-1],
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            param_dtype=param_dtype,
            rngs=rngs,
        )
        shape = (image[0] // patch * (image[1] // patch), width)
        noise = jax.random.normal(rngs.params(), shape, param_dtype)
        self.position = nnx.Param(POSITION_DEVIATION * noise)
        self.blocks = nnx.List(
            TransformerBlock(width, heads, mlp, param_dtype=param_dtype, rngs=rngs)
            for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(width, param_dtype=param_dtype, rngs=rngs)
        self.readout = nnx.Linear(width, outputs, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps images of shape (N, H, W, C) to outputs (N, outputs).

        Raises:
          ValueError: x has another shape.
        """
        check_images(x, self.input_shape)
        tokens = self.embedding(x)
        tokens = tokens.reshape(len(x), -1, self.width) + self.position[...][None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.readout(self.norm(tokens).mean(1))
