"""The exact Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import add_diagonal, solve_psd
from natgrad_flax.operators.base import Space, check_space, mean_gram_diagonal
from natgrad_flax.operators.low_rank import LowRank
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.base import Structure, triangle
from natgrad_flax.structures.geometry import Geometry, NeededRank
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class Exact(Structure):
    """The whole Fisher, F + rho I (Karakida & Osawa 2020, Eqs. 8 and 9); alpha = 1.

    In sample space one Cholesky factorisation of the N S x N S Gram matrix, in parameter space one
    of the P x P Fisher.

    Args:
      space: "sample", "parameter", or "auto" for the smaller of the two.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=ng.Exact(), loss=ng.MeanSquaredError()
      ... )

      One step of rate 1 fits the samples, as far as the network is linear in its parameters:

      >>> graphdef, params = nnx.split(model)
      >>> f, df = jax.jvp(lambda p: nnx.merge(graphdef, p)(x), (params,), (step,))
      >>> bool(jnp.allclose(f - df, y, atol=1e-4))
      True
    """

    space: Space = "auto"
    style = styled("Exact", "#0072B2", "s")
    stacking = "whole"
    optimal_rate = "1"
    infinite_width = "all"
    couples_layers = True
    takes_momentum = True
    shared_weights = "gram"

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """N C of the Jacobian of the network."""
        params = sum(fan_in * units for fan_in, units in geometry.layers)
        outputs = geometry.num_samples * geometry.num_outputs
        return [NeededRank(0, "network", outputs, params)]

    def __post_init__(self) -> None:
        check_space(self.space)

    def operator(self, signals: Signals) -> LowRank:
        """J^T J / N of all layers together."""
        return LowRank(signals.layers, self.space)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Theta(x', x) (Theta + rho)^{-1} (Karakida & Osawa 2020, Eq. 13)."""
        gram = add_diagonal(train.gram(), train.num_samples * damping)
        cross = train.gram(test)
        return solve_psd(gram, cross, shifted=not is_zero(damping)).T

    def coefficient_times(
        self, test: Signals, train: Signals, damping: Array | float, vectors: Array
    ) -> Array:
        """K(x', x) (K + N rho)^{-1} V: one factorisation, and k right-hand sides."""
        gram = add_diagonal(train.gram(), train.num_samples * damping)
        return test.gram(train) @ solve_psd(gram, vectors, shifted=not is_zero(damping))

    def undamped_diagonal(self, train: Signals) -> Array:
        """1 for every output."""
        return jnp.ones(train.size, train.outputs.dtype)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K / N."""
        return jnp.sum(mean_gram_diagonal(signals))

    def alpha(self, geometry: Geometry) -> float:
        """1."""
        return 1.0

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """N C must not exceed the number of parameters."""
        params = sum(fan_in * units for fan_in, units in geometry.layers)
        outputs = geometry.num_samples * geometry.num_outputs
        if outputs <= params:
            return []
        return [f"the network has {params} parameters for N C = {outputs} outputs"]

    def gram_size(self, signals: Signals) -> int:
        """N S or P."""
        return self.operator(signals).side

    def system_arrays(self, signals: Signals) -> float:
        """The Gram matrices of all layers, before they are added and factorised."""
        return 5.0 if self.operator(signals).in_parameters else 2 * len(signals.layers) + 1.5

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """All, those in symmetric pairs stored once; see ``Structure.entries``."""
        params = sum(geometry.params)
        return params**2, triangle(params)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "exact"


def mean_diagonal(signals: Signals) -> Array:
    """The mean of the diagonal of F, one value a layer, without the diagonal."""
    return jnp.stack(
        [
            jnp.sum(layer.gram_norms()) / float(layer.num_samples * layer.num_params)
            for layer in signals.layers
        ]
    )
