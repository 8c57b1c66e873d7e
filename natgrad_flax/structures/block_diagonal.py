"""One Fisher block a layer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.linalg.dense import add_diagonal, solve_psd
from natgrad_flax.operators.base import Blocks, Space, check_space, mean_gram_diagonal
from natgrad_flax.operators.low_rank import LowRank
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.base import block_words
from natgrad_flax.structures.layer_wise import LayerWise
from natgrad_flax.structures.style import styled


class BlockDiagonal(LayerWise):
    """One Fisher block a layer, without what couples layers; alpha = L.

    It is ``LayerWise`` with Sigma = I (Karakida & Osawa 2020, Section 4.1). Each layer may have a
    damping of its own.

    Args:
      space: in which systems are solved: "sample" (N S x N S), "parameter" (P_l x P_l), or "auto"
        for the smaller of the two.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=ng.BlockDiagonal(), **options
      ... )
      >>> ng.optimal_learning_rate(ng.BlockDiagonal(), model, 4)  # 1 / L
      0.5
    """

    style = styled("Block-diagonal", "#D55E00", "D", short="block-diag")
    stacking = "all"
    optimal_rate = "1/L"
    couples_layers = False
    takes_momentum = True

    def largest_system(self, signals: Signals) -> int:
        """Each layer in the smaller space."""
        return max(min(signals.size, layer.num_params) for layer in signals.layers)

    def __init__(self, space: Space = "auto") -> None:
        object.__setattr__(self, "sigma", ())
        check_space(space)
        object.__setattr__(self, "space", space)

    def coupling(self, depth: int) -> np.ndarray:
        """The identity, shape (L, L)."""
        return np.eye(depth)

    def operator(self, signals: Signals) -> Blocks:
        """J_l^T J_l / N of each layer."""
        return Blocks(tuple(LowRank((layer,), self.space) for layer in signals.layers))

    def coefficient_times(
        self, test: Signals, train: Signals, damping: Array | float, vectors: Array
    ) -> Array:
        """sum_l K_l(x', x) (K_l + N rho_l)^{-1} V."""
        total = jnp.zeros((test.size, vectors.shape[1]), train.outputs.dtype)
        shifted = not is_zero(damping)
        for test_layer, train_layer, rho in zip(
            test.layers, train.layers, per_layer(damping, len(train.layers)), strict=True
        ):
            gram = add_diagonal(train_layer.gram(), train.num_samples * rho)
            total = total + test_layer.gram(train_layer) @ solve_psd(gram, vectors, shifted=shifted)
        return total

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K_l / N, one value a layer."""
        return mean_gram_diagonal(signals)

    def system_arrays(self, signals: Signals) -> float:
        """The Gram matrices of all layers."""
        in_samples = self.gram_size(signals) == signals.size
        return max(6.0, 2.0 * len(signals.layers)) if in_samples else 4.0

    def gram_size(self, signals: Signals) -> int:
        """N S, or the largest P_l below it."""
        if self.space == "parameter":
            return max(layer.num_params for layer in signals.layers)
        return signals.size

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        small = LowRank((layer,), self.space).in_parameters
        return f"exact block, {block_words(layer, small)}"
