"""Unit-wise Fisher, of whose blocks the largest eigenvalues are kept."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import RelativeDamping
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.dense_units import unit_weights
from natgrad_flax.operators.factored import Factored, largest_part
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.structures.base import Structure, triangle
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.geometry import Geometry, NeededRank, SharedGeometry
from natgrad_flax.structures.style import styled
from natgrad_flax.structures.unit_wise import UnitWise, no_channel_limit


@dataclass(frozen=True)
class LowRankUnits(Structure):
    """V diag(lambda_1, ..., lambda_rank) V^T + rho I for each unit, the best of this rank.

    The lambda are the largest eigenvalues of the unit's Fisher block a^T S_i a / N of ``UnitWise``
    (Karakida & Osawa 2020, Eq. 23), the columns of V their eigenvectors: of all matrices of this
    rank the nearest to the block (Eckart & Young 1936). A block has no more of them than the unit
    has active samples; from that rank on this is ``UnitWise``, for P rank numbers.

    What is left out has the damping alone. So a damping far below the first eigenvalue that is
    left out makes long steps there, and the number 0, the pseudo-inverse, none. The truncation of
    a mean over batches is no mean of truncations: it takes no moving averages.

    At infinite width ``rank`` eigenvalues of a unit's block depend on its own derivatives, whose
    law no kernel of a layer tells. From rank N on the limit is that of ``UnitWise``.

    Args:
      rank: eigenvalues a unit; fewer where it has fewer.

    Raises:
      ValueError: a rank that is no positive integer; rank 0 would be gradient descent.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=ng.LowRankUnits(2), **options)
    """

    rank: int
    style = styled("Low-rank units", "#FF8FA3", "H", command="")
    stacking = "all"
    eigensystems = True
    # as an undamped unit, a direction may divide by arbitrarily small derivatives
    default_damping = RelativeDamping(1e-3)
    infinite_width = "train"
    why_no_limit = UnitWise.why_no_limit
    limit_kernels = UnitWise.limit_kernels

    def no_limit(self, shared: bool) -> str:
        """As for ``UnitWise``."""
        return no_channel_limit(self.name) if shared else ""

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)

    def operator(self, signals: Signals) -> Blocks:
        """The largest parts of the blocks of all units, layer by layer."""
        return Blocks(tuple(map(self._units, signals.layers)))

    def _units(self, layer: LayerSignals) -> Factored:
        n, fan_in = layer.num_samples, layer.fan_in
        if isinstance(layer, DenseSignals):
            # one row a sample, whatever the number of output directions
            inputs = layer.augmented_inputs()
            found = jax.lax.map(
                lambda root: largest_part(root[:, None] * inputs, self.rank),
                jnp.sqrt(unit_weights(layer) / n).T,
            )
        else:
            jacobian = jnp.moveaxis(layer.jacobian(), 3, 0).reshape(layer.num_units, -1, fan_in)
            found = jax.lax.map(
                lambda rows: largest_part(rows, self.rank), jacobian / float(n) ** 0.5
            )
        return Factored((layer,), *found)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return mean_diagonal(signals)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """Those of ``UnitWise``."""
        return UnitWise().needed_ranks(geometry)

    def outside_theory(self, geometry: Geometry) -> list[str]:
        """A rank below N."""
        n = geometry.num_samples
        few = f"the structure keeps {self.rank} eigenvalues a unit for {n} samples"
        return [few] if self.rank < n else []

    def alpha(self, geometry: Geometry) -> float:
        """That of ``UnitWise``."""
        return UnitWise().alpha(geometry)

    def shared_alpha(self, geometry: SharedGeometry) -> float:
        """That of ``UnitWise``."""
        return UnitWise().shared_alpha(geometry)

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """Those of ``UnitWise``, and a rank below N."""
        return [*self.outside_theory(geometry), *UnitWise().failed_conditions(geometry)]

    def gram_size(self, signals: Signals) -> int:
        """The side of the largest eigenproblem of a unit."""
        return max(min(layer.fan_in, _num_rows(layer)) for layer in signals.layers)

    def system_arrays(self, signals: Signals) -> float:
        """The factors of all units, beside the matrices of one unit."""
        kept = sum(layer.num_params * min(self.rank, _num_rows(layer)) for layer in signals.layers)
        return 3.0 + kept / self.gram_size(signals) ** 2

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those between parameters of the same unit; of each unit the factor or the block."""
        stored = sum(m * min(k * self.rank, triangle(k)) for k, m in geometry.layers)
        return sum(m * k**2 for k, m in geometry.layers), stored

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        rank = min(self.rank, layer.fan_in, _num_rows(layer))
        return f"{rank} largest eigenvalues of the block of a unit"


def _num_rows(layer: LayerSignals) -> int:
    """Rows whose products make up the block of a unit."""
    directions = 1 if isinstance(layer, DenseSignals) else layer.num_directions
    return layer.num_samples * directions
