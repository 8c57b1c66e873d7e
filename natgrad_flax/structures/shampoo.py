"""Roots of the second moments of gradients from both sides (Shampoo)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_number
from natgrad_flax.damping import RelativeDamping, as_pair, per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.entries import divide
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
from natgrad_flax.signals.dense import Signals, expand_samples
from natgrad_flax.signals.shared import ExplicitSignals
from natgrad_flax.structures.averaged import coefficient_by_inverse
from natgrad_flax.structures.base import dense_layer, has_shared_layers
from natgrad_flax.structures.kronecker_average import OfMatrices, no_shared_limit
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
    exact Fisher block a unit. A damping is added to R and L, before the root. A relative one has no
    limit at infinite width, where the mean diagonals of R and L are 0.

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
    infinite_width = "all"
    limit_kernels = ("inputs", "derivatives")
    coefficient_arrays = (0.0, 8.0)

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

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_l (a' R^-p a^T) . (D' L^-p D^T) / N, by Gram matrices, so at infinite width too.

        With R = r^T r / N, r = S a and S = diag |D_n|, the first is a' r^T (r r^T / N)^-p S^-1, and
        the second likewise.
        """
        if has_shared_layers(train):
            return coefficient_by_inverse(self, test, train, damping)
        n, total = train.num_samples, jnp.zeros((), train.outputs.dtype)
        rhos = per_layer(damping, len(train.layers))
        pairs = zip(map(dense_layer, test.layers), map(dense_layer, train.layers), strict=True)
        for (new, own), (by_r, by_l) in zip(pairs, map(as_pair, rhos), strict=True):
            s = own.num_directions
            inputs = self._crossed(
                own.input_gram(), new.input_gram(own), own.derivative_sums() / n, by_r
            )
            units = self._crossed(
                own.derivative_gram(),
                new.derivative_gram(own),
                jnp.repeat(own.input_norms(), s) / n,
                by_l,
            )
            total = total + units * expand_samples(inputs, new.num_directions, s)
        return total / n

    def _crossed(self, gram: Array, cross: Array, weights: Array, damping: Array | float) -> Array:
        """r' (sum_n w_n r_n r_n^T + rho)^-p r^T; 0 for rows of weight 0, which nothing asks for."""
        root = jnp.sqrt(weights)
        inverse = self._inverse(root[:, None] * gram * root, damping)
        return divide((cross * root) @ inverse, root)

    def check(self, signals: Signals, damping: object) -> None:
        """Raises ValueError for a relative damping at infinite width."""
        if isinstance(damping, RelativeDamping) and math.isinf(signals.num_params):
            raise ValueError(
                "a relative damping of Shampoo has no infinite-width limit: the mean diagonals of "
                'its factors vanish; use a number, or kernels="empirical"'
            )

    def no_limit(self, shared: bool) -> str:
        """Kernels of layers do not hold positions."""
        return no_shared_limit("Shampoo") if shared else ""

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        if isinstance(layer, ExplicitSignals):
            return "exact block a unit"
        return f"moments of gradients to the power {self.power:.4g}"
