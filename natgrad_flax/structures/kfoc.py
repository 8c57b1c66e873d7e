"""The Kronecker product that is nearest to the Fisher block of a layer (KFOC)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import is_zero, of_block
from natgrad_flax.linalg.dense import reciprocal
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.kronecker import Dampings, affine
from natgrad_flax.operators.powers import (
    MatrixKronecker,
    input_moments,
    mean_diagonals,
    powered,
    unit_moments,
)
from natgrad_flax.operators.units import WholeUnits
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.shared import ExplicitSignals
from natgrad_flax.structures.base import has_shared_layers
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.kronecker_average import OfMatrices, crossed
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class KFOC(OfMatrices):
    """(A + sqrt(rho) I) (x) (B + sqrt(rho) I) with A (x) B nearest to F_l in Frobenius norm.

    The best product is the leading singular pair of F_l, rearranged (Van Loan & Pitsianis 1993;
    Schnaus et al. 2021). Power iteration finds it from the Jacobians J of samples, without F_l:
    A <- sum J B J^T / (N |B|^2) and B <- sum J^T A J / (N |A|^2), from B = I on. Both stay positive
    semi-definite. Their common scale is free: mean diagonals are made equal, so that the damping is
    the split of Martens & Grosse (2015).

    The pair of a mean over batches is no mean of pairs: it takes no moving averages. Groups of
    units have a product of their own; parameters that are no affine layer keep their exact Fisher
    block a unit.

    Args:
      iterations: of the power iteration.

    Raises:
      ValueError: no positive integer.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=ng.KFOC(10), **options)
    """

    iterations: int
    style = styled("KFOC", "#3B3BB3", "8", command="")
    stacking = "all"

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, 1)

    def operator(self, signals: Signals) -> Blocks:
        """The products of affine layers, the blocks of the units of others."""
        return Blocks(
            tuple(
                WholeUnits(layer) if isinstance(layer, ExplicitSignals) else self._nearest(layer)
                for layer in signals.layers
            )
        )

    def _nearest(self, layer: LayerSignals) -> MatrixKronecker:
        def iterate(_: int, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            a = pair[0]
            b = unit_moments(layer, a) * reciprocal(_squared_norms(a))
            return input_moments(layer, b) * reciprocal(_squared_norms(b)), b

        start = input_moments(layer), unit_moments(layer)
        a, b = jax.lax.fori_loop(0, self.iterations, iterate, start)
        ratio = jnp.sqrt(mean_diagonals(b) * reciprocal(mean_diagonals(a)))[:, None, None]
        left, right = powered(layer, a * ratio, 1), powered(layer, b * reciprocal(ratio), 1)
        return MatrixKronecker(affine(layer), left, right, _split)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """See ``Structure.coefficient``."""
        if has_shared_layers(train):
            return super().coefficient(test, train, damping)
        return crossed(self.operator(train), test, train, damping)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return mean_diagonal(signals)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "exact block a unit" if isinstance(layer, ExplicitSignals) else "nearest Kronecker"


def _squared_norms(matrices: Array) -> Array:
    return jnp.sum(matrices**2, axis=(1, 2), keepdims=True)


def _split(damping: Array | float) -> Dampings:
    damping = of_block(damping)
    root = 0.0 if is_zero(damping) else jnp.sqrt(jnp.asarray(damping))
    return root, root
