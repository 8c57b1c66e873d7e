"""One block for all units of a layer: the mean of theirs (mini-block Fisher)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import as_pair, is_zero
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.factor import ArrayRows, Factor, IdentityFactor
from natgrad_flax.operators.kronecker import affine
from natgrad_flax.operators.powers import MatrixKronecker
from natgrad_flax.operators.units import WholeUnits
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.shared import ExplicitSignals
from natgrad_flax.structures.base import triangle
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.factor_entries import inverse_groups
from natgrad_flax.structures.geometry import INFINITE, Geometry, NeededRank, SharedGeometry
from natgrad_flax.structures.kronecker_average import no_shared_limit
from natgrad_flax.structures.moments import OfMoments
from natgrad_flax.structures.style import styled

Side = Literal["inputs", "units"]


@dataclass(frozen=True)
class MiniBlock(OfMoments):
    """(R + rho I) (x) I, R the mean of the Fisher blocks of the units of a layer.

    The mini-block Fisher of a fully connected layer (Bahamou, Goldfarb & Ren 2023): one block for
    the incoming weights of every unit, R = (1/(N M)) sum_n |D_n|^2 a_n a_n^T, where ``UnitWise``
    has one each and ``Foof`` leaves the derivatives out. With ``side="units"`` it is one for the
    outgoing weights of every input, (1/(N K)) sum_n |a_n|^2 D_n^T D_n. They are the moments of
    Shampoo, one at a time.

    With inputs of rank N in every layer Theta-bar_l(n s, m t) = delta_nm M_l D_ns . D_nt / |D_n|^2,
    at zero damping: for one output M_l I, so it is isotropic at any width and for any activation,
    and alpha = sum_l M_l / C, the mean of the eigenvalues. With C > 1 outputs of a sample stay
    coupled by the angles of their derivatives, which wide layers make right ones. So at infinite
    width it is alpha I, too; Theta-bar itself grows as the widths.

    Groups of units have a block of their own, of Jacobians that are summed over positions;
    parameters that are no affine layer keep their exact Fisher block a unit.

    Args:
      side: of which weights: "inputs", those into a unit, or "units", those out of an input.

    Raises:
      ValueError: another side.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (3, 4))
      >>> structure = ng.MiniBlock("inputs")
      >>> found = na.isotropy(structure, model, x)
      >>> round(found.condition_number, 4), round(found.learning_rate, 4)  # 1 / (8 + 1)
      (1.0, 0.1111)
    """

    side: Side
    style = styled("Mini-block", "#00B8A9", "+", command="")
    stacking = "all"
    optimal_rate = "1/alpha"
    infinite_width = "train"
    why_no_limit = "it grows with the width, in each layer with its own"
    limit_kernels = ("inputs",)

    def no_limit(self, shared: bool) -> str:
        """Kernels of layers do not hold positions; and the mean over inputs is not isotropic."""
        if shared:
            return no_shared_limit("MiniBlock")
        if self.side == "inputs":
            return ""
        return (
            'MiniBlock("units") has no infinite-width kernel: it grows with the width, and is '
            'isotropic in no last layer; use kernels="empirical"'
        )

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"side must be one of {get_args(Side)}, got {self.side!r}")

    def operator(self, signals: Signals) -> Blocks:
        """The block of affine layers beside the identity, the blocks of the units of others."""
        return Blocks(
            tuple(
                WholeUnits(layer) if isinstance(layer, ExplicitSignals) else self._product(layer)
                for layer in signals.layers
            )
        )

    def _product(self, layer: LayerSignals) -> MatrixKronecker:
        rows, count = self._rows(layer)
        nothing = jnp.zeros((len(rows), 0, count), rows.dtype)
        if isinstance(layer, DenseSignals):
            rows, nothing = rows[0], nothing[0]
        block = Factor(ArrayRows(rows), float(layer.num_samples * count))
        identity = IdentityFactor(ArrayRows(nothing))
        left, right = (block, identity) if self.side == "inputs" else (identity, block)
        return MatrixKronecker(affine(layer), left, right, as_pair)

    def _rows(self, layer: LayerSignals) -> tuple[Array, int]:
        """Rows of every group, (G, R, P), and the number of blocks that they are the sum of."""
        groups = getattr(layer, "num_groups", 1)
        n, units = layer.num_samples, layer.num_units // groups
        count = units if self.side == "inputs" else layer.fan_in
        if isinstance(layer, DenseSignals):
            a, d = layer.augmented_inputs(), layer.derivatives
            if self.side == "inputs":
                return (a * jnp.sqrt(jnp.sum(d**2, axis=(1, 2)))[:, None])[None], count
            return (d * jnp.linalg.norm(a, axis=1)[:, None, None]).reshape(1, -1, units), count
        jacobian = layer.jacobian().reshape(n, -1, layer.fan_in, groups, units)
        order = (3, 0, 1, 4, 2) if self.side == "inputs" else (3, 0, 1, 2, 4)
        moved = jacobian.transpose(order)
        return moved.reshape(groups, -1, moved.shape[-1]), count

    @property
    def sides(self) -> tuple[str, ...]:
        """That of the blocks."""
        return (self.side,)

    def moment(self, layer: LayerSignals, side: str) -> Array:
        """R of every group."""
        rows, count = self._rows(layer)
        return jnp.einsum("grp,grq->gpq", rows, rows) / float(layer.num_samples * count)

    def inverses(self, moments: Array, damping: Array | float) -> Array:
        """(R + rho I)^{-1} of every group."""
        return inverse_groups(moments, damping, shifted=not is_zero(damping))

    def damping_scale(self, signals: Signals) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return mean_diagonal(signals)

    def _in_theory(self, geometry: Geometry) -> bool:
        """Whether alpha is known."""
        return self.side == "inputs" and not isinstance(geometry, SharedGeometry)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank] | None:
        """N of the inputs of every layer, on the side of the inputs."""
        n, sizes = geometry.num_samples, enumerate(geometry.layers)
        ranks = [NeededRank(at, "inputs", n, fan_in) for at, (fan_in, _) in sizes]
        return ranks if self._in_theory(geometry) else None

    def alpha(self, geometry: Geometry) -> float:
        """sum_l M_l / C.

        Raises:
          ValueError: shared weights, or the side of the units.
        """
        if not self._in_theory(geometry):
            return super().alpha(geometry)
        return sum(units for _, units in geometry.layers) / geometry.num_outputs

    def outside_theory(self, geometry: Geometry) -> list[str]:
        """More than one output at finite width, on the side of the inputs."""
        c, hidden = geometry.num_outputs, [units for _, units in geometry.layers[:-1]]
        apart = c == 1 or self.side == "units" or min(hidden, default=INFINITE) >= INFINITE
        return [] if apart else [f"finite width couples the {c} outputs of a sample"]

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """Inputs of every layer must be able to have rank N, and there must be one output."""
        n = geometry.num_samples
        few = [
            f"{geometry.where(at)} has {fan_in} inputs for {n} samples"
            for at, (fan_in, _) in enumerate(geometry.layers)
            if fan_in < n and self.side == "inputs"
        ]
        return [*self.outside_theory(geometry), *few]

    def gram_size(self, signals: Signals) -> int:
        """The side of the systems, the rows of a block or its parameters."""
        sides = [
            layer.fan_in if self.side == "inputs" else layer.num_units for layer in signals.layers
        ]
        rows = [
            layer.num_samples * (1 if self.side == "inputs" else layer.num_directions)
            if isinstance(layer, DenseSignals)
            else side
            for layer, side in zip(signals.layers, sides, strict=True)
        ]
        return max(map(min, sides, rows))

    def system_arrays(self, signals: Signals) -> float:
        """The block of the layer at work, its inverse and what is between."""
        return 8.0

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """A block for each unit, or for each input, of which one is stored."""
        pairs = [size if self.side == "inputs" else size[::-1] for size in geometry.layers]
        return sum(k**2 * m for k, m in pairs), sum(triangle(k) for k, _ in pairs)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        if isinstance(layer, ExplicitSignals):
            return "exact block a unit"
        return f"mean block over {'units' if self.side == 'inputs' else 'inputs'}"
