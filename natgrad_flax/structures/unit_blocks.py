"""Blocks below units: the Fisher of some inputs of a unit at a time."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import RelativeDamping, per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.pieces import (
    Pieces,
    UnitPieces,
    cut,
    invert_pieces,
    multiply_pieces,
    piece_blocks,
)
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.averaged import (
    AveragedStructure,
    Moments,
    coefficient_by_inverse,
    update_like,
)
from natgrad_flax.structures.base import triangle
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.geometry import Geometry
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class UnitBlocks(AveragedStructure):
    """F + rho I between the parameters of one unit and ``size`` neighbouring inputs.

    Between ``Diagonal``, which is size 1, and ``UnitWise``, which any size from the fan-in on is;
    the bias of a unit is its last input. A block of N samples has at most rank N S, so beyond
    that many inputs a larger one sees no more: P min(size, fan-in) entries are kept, which can be
    averaged over batches. Every unit has fan-in / size systems of that side. For one batch with
    fewer samples than inputs ``UnitWise`` is cheaper than all but tiny sizes: it solves one system
    of N a unit, and keeps no block.

    It has no infinite-width kernel: wider layers have more blocks, each of ``size`` single inputs,
    and the law of these is in no kernel of a layer, which is a mean over all inputs.

    Args:
      size: inputs a block; the last one of a unit has what is left.

    Raises:
      TypeError, ValueError: a size that is no positive integer.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=ng.UnitBlocks(32), **options)
    """

    size: int
    style = styled("Unit blocks", "#C2185B", ">", command="")
    stacking = "all"
    # as an undamped entry or unit, a block may divide by arbitrarily small derivatives
    default_damping = RelativeDamping(1e-3)
    why_no_limit = "a block sees single inputs of a unit, where a kernel is a mean over all of them"

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1)

    def operator(self, signals: Signals) -> Blocks:
        """The blocks of all pieces, layer by layer."""
        pairs = zip(signals.layers, self.statistics(signals), strict=True)
        return Blocks(tuple(UnitPieces(layer, pieces) for layer, pieces in pairs))

    def statistics(self, signals: Signals) -> tuple[Pieces, ...]:
        """The blocks."""
        return tuple(piece_blocks(layer, min(self.size, layer.fan_in)) for layer in signals.layers)

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[Pieces, ...]:
        """The inverses of all blocks."""
        rhos = per_layer(damping, len(moments.factors))
        return tuple(map(invert_pieces, moments.factors, rhos))

    def apply(
        self, inverse: tuple[Pieces, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """The products, piece by piece."""
        pairs = zip(inverse, gradient, strict=True)
        return tuple(update_like(g, multiply_pieces(p, matrix_of(g))) for p, g in pairs)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """See ``Structure.coefficient``."""
        return coefficient_by_inverse(self, test, train, damping)

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        scales = []
        for pieces in moments.factors:
            traces = [jnp.einsum("mpkk->", blocks) for blocks in pieces.values()]
            count = sum(blocks.size // blocks.shape[-1] for blocks in pieces.values())
            scales.append(jnp.sum(jnp.stack(traces)) / float(count))
        return jnp.stack(scales)

    def damping_scale(self, signals: Signals) -> Array:
        """See ``scale_of``."""
        return mean_diagonal(signals)

    def gram_size(self, signals: Signals) -> int:
        """The size, or the largest fan-in where that is less."""
        return max(min(self.size, layer.fan_in) for layer in signals.layers)

    def system_arrays(self, signals: Signals) -> float:
        """The blocks of all layers, their inverses, and a third while these are put together."""
        entries = sum(layer.num_params * min(self.size, layer.fan_in) for layer in signals.layers)
        return 3.0 * entries / self.gram_size(signals) ** 2

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those between parameters of the same piece."""
        sides = [
            (units * piece.number, piece.width)
            for fan_in, units in geometry.layers
            for piece in cut(fan_in, self.size).values()
        ]
        return sum(m * k**2 for m, k in sides), sum(m * triangle(k) for m, k in sides)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return f"exact block of {min(self.size, layer.fan_in)} inputs a unit"
