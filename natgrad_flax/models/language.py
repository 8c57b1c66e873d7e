"""A causal transformer that predicts the next token, of stock Flax layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.models.sizes import check_sizes
from natgrad_flax.models.transformer import POSITION_DEVIATION, TransformerBlock


class LanguageModel(nnx.Module):
    """A causal transformer over tokens, as GPT-2 (Radford et al. 2019).

    A table of tokens and a learned position, ``depth`` pre-norm blocks whose tokens see themselves
    and those before, a last LayerNorm and a linear readout without a bias. Standard
    parametrisation, stock layers, no dropout. The defaults have 10.7 million parameters.

    With ``scan`` the blocks are one module of stacked parameters that a loop goes through, each
    step rematerialised in the backward pass: the program, and so its compilation, does not grow
    with the depth, and the activations of one block are held at a time.

    Attributes:
      embedding: the nnx.Embed.
      position: nnx.Param, shape (context, width).
      blocks: nnx.List of ``TransformerBlock``; with ``scan`` one with a first axis of ``depth``.
      norm: the last nnx.LayerNorm.
      readout: the nnx.Linear.
      The other arguments stand as attributes of the same name, except ``param_dtype`` and
      ``rngs``.

    Args:
      vocabulary: V, the number of tokens; 256 for bytes.
      context: T, the largest number of tokens of a sequence.
      width: features of a token.
      depth: number of blocks.
      heads: attention heads; divides the width.
      mlp: units between the two affine layers of a block.
      scan: whether the blocks are stacked.
      param_dtype: dtype of the parameters.
      rngs: source of randomness; the same seed gives the same parameters.

    Raises:
      ValueError: a size out of range, heads that do not divide the width.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> sizes = {"width": 8, "depth": 1, "heads": 2, "mlp": 16}
      >>> model = ng.LanguageModel(vocabulary=16, context=6, **sizes, rngs=nnx.Rngs(0))
      >>> tokens = jnp.arange(12).reshape(2, 6)
      >>> logits = model(tokens)
      >>> logits.shape  # (N, T, V); those at t are of the token at t + 1
      (2, 6, 16)
      >>> later = model(tokens.at[:, 3:].set(0))
      >>> bool(jnp.allclose(logits[:, :3], later[:, :3], atol=1e-5))
      True
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        width: int = 384,
        depth: int = 6,
        heads: int = 6,
        mlp: int = 1536,
        *,
        scan: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"width": width, "depth": depth, "heads": heads, "mlp": mlp}
        check_sizes(vocabulary=vocabulary, context=context, **sizes)
        self.vocabulary = int(vocabulary)
        self.context = int(context)
        self.width = int(width)
        self.depth = int(depth)
        self.heads = int(heads)
        self.mlp = int(mlp)
        self.scan = bool(scan)
        settings = {"param_dtype": param_dtype, "rngs": rngs}
        self.embedding = nnx.Embed(self.vocabulary, self.width, **settings)
        noise = jax.random.normal(rngs.params(), (self.context, self.width), param_dtype)
        self.position = nnx.Param(POSITION_DEVIATION * noise)
        blocks = [
            TransformerBlock(self.width, self.heads, self.mlp, causal=True, **settings)
            for _ in range(self.depth)
        ]
        self.blocks: Any = _stacked(blocks) if self.scan else nnx.List(blocks)
        self.norm = nnx.LayerNorm(self.width, **settings)
        self.readout = nnx.Linear(self.width, self.vocabulary, use_bias=False, **settings)

    def __call__(self, x: Array) -> Array:
        """Maps tokens, integers (N, T), to logits (N, T, V) of the token that follows each.

        Raises:
          ValueError: x is not (N, T), with T at most ``context``.
          TypeError: x has no integers.
        """
        if x.ndim != 2 or x.shape[1] > self.context:
            raise ValueError(
                f"tokens must have shape (N, T) with T at most context = {self.context}, got "
                f"{x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {x.dtype}")
        tokens = self.embedding(x) + self.position[: x.shape[1]]
        if self.scan:
            tokens = _through(tokens, self.blocks)
        else:
            for block in self.blocks:
                tokens = block(tokens)
        return self.readout(self.norm(tokens))


def _stacked(blocks: list[TransformerBlock]) -> TransformerBlock:
    """One block whose parameters have a first axis that counts blocks."""
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def _through(tokens: Array, block: TransformerBlock) -> Array:
    found: Array = nnx.remat(lambda block, tokens: block(tokens))(block, tokens)
    return found
