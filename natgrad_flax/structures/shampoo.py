"""Roots of the second moments of gradients from both sides (Shampoo)."""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array

from natgrad_flax.arguments.scalars import check_number
from natgrad_flax.damping import as_pair
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.kronecker import affine, over_groups
from natgrad_flax.operators.powers import (
    MatrixKronecker,
    PoweredFactor,
    input_moments,
    powered,
    unit_moments,
)
from natgrad_flax.operators.units import WholeUnits
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.shared import ExplicitSignals
from natgrad_flax.structures.kronecker_average import OfMatrices
from natgrad_flax.structures.moments import OfMoments
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class Shampoo(OfMatrices, OfMoments):
    """(R + rho I)^p (x) (L + rho I)^p with R = mean J J^T and L = mean J^T J (Gupta et al. 2018).

    J (fan_in, M) are the Jacobians of samples in the output directions, summed over positions: of
    a dense layer R = (1/N) sum_n |D_n|^2 a_n a_n^T and L = (1/N) sum_n |a_n|^2 D_n^T D_n. With
    ``fisher="empirical"`` these are Shampoo's moments of per-sample gradients; it sums those of
    batches, which say something else. p = 1/4 is Shampoo; 1/2 is its square, whose product has the
    scale of the Fisher and is one step of the power iteration to its best Kronecker product
    (Morwani et al. 2024). Both are far from K-FAC: a sample counts in R by its derivatives, too.

    Groups of units have matrices of their own. Parameters that are no affine layer keep their
    exact Fisher block a unit. A damping is added to R and L, before the root.

    Args:
      power: p, above 0 and at most 1.

    Raises:
      TypeError, ValueError: another power.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=ng.Shampoo(1 / 2), **options)
    """

    power: float
    style = styled("Shampoo", "#7A9A01", "d", command="")
    stacking = "all"

    def __post_init__(self) -> None:
        if check_number("power", self.power, positive=True) > 1:
            raise ValueError(f"power must be at most 1, got {self.power!r}")

    def operator(self, signals: Signals) -> Blocks:
        """Both powers of affine layers, the blocks of the units of others."""
        pairs = zip(signals.layers, self.statistics(signals), strict=True)
        return Blocks(
            tuple(
                WholeUnits(layer)
                if "blocks" in entry
                else MatrixKronecker(
                    affine(layer),
                    powered(layer, entry["inputs"], self.power),
                    powered(layer, entry["units"], self.power),
                    as_pair,
                )
                for layer, entry in pairs
            )
        )

    @property
    def sides(self) -> tuple[str, ...]:
        """Both."""
        return "inputs", "units"

    def moment(self, layer: LayerSignals, side: str) -> Array:
        """R or L."""
        return input_moments(layer) if side == "inputs" else unit_moments(layer)

    def inverses(self, moments: Array, damping: Array | float) -> Array:
        """(R + rho I)^-p, or that of L."""
        return over_groups(self._inverse, moments, damping)

    def _inverse(self, moment: Array, damping: Array | float) -> Array:
        return PoweredFactor(moment, self.power).inverse(damping)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        if isinstance(layer, ExplicitSignals):
            return "exact block a unit"
        return f"moments of gradients to the power {self.power:.4g}"
