"""Unit-wise Fisher: one block a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import RelativeDamping, per_layer
from natgrad_flax.operators.base import (
    Blocks,
    Space,
    check_space,
    mean_gram_diagonal,
)
from natgrad_flax.operators.dense_units import (
    DenseUnits,
    LayersOfUnits,
    inverse_of_units,
    unit_weights,
)
from natgrad_flax.operators.units import WholeUnits
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.structures.base import (
    Structure,
    dense_layer,
    has_shared_layers,
    triangle,
)
from natgrad_flax.structures.diagonal import sum_over_units
from natgrad_flax.structures.geometry import Geometry, NeededRank, SharedGeometry
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class UnitWise(Structure):
    """One Fisher block a unit: F + rho I between its weights and bias (Karakida & Osawa 2020).

    The block of unit i is a^T S_i a / N + rho I with S_i = diag_n(sum_s D[n,s,i]^2) (Eq. 23): it
    costs one N x N solve (or one of its fan-in), whatever the width and the number of outputs.
    Units are handled in chunks.

    At zero damping and with inputs of rank N in every layer, Theta-bar is exactly diagonal for one
    output, with entries 1 + the number of units that are active on the sample; alpha is its mean,
    1 + gamma sum_{l<L} M_l / C (Theorem 5.1: gamma M (L - 1)). Training needs damping: the
    undamped update divides by D.

    Args:
      space: "sample" (N x N), "parameter" (fan-in x fan-in), or "auto": parameter space where the
        fan-in is below half of N.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), activation="tanh", rngs=nnx.Rngs(0))
      >>> x, loss = jax.random.normal(jax.random.key(0), (4, 4)), ng.MeanSquaredError()
      >>> options = {"structure": ng.UnitWise(), "loss": loss}
      >>> damping = ng.RelativeDamping(1e-3)
      >>> step = ng.natural_gradient(
      ...     model, x, jnp.ones((4, 1)), damping=damping, **options
      ... )
      >>> F = ng.fisher(model, x, **options).to_dense()
      >>> int(jnp.count_nonzero(F)), F.size  # 8 blocks of 4 x 4 and one of 8 x 8
      (192, 1600)
    """

    space: Space = "auto"
    style = styled("Unit-wise", "#E69F00", "P")
    stacking = "all"
    optimal_rate = "1/alpha (Theorem 5.1)"
    # an undamped unit divides by derivatives that can be arbitrarily small (science: KO-Thm5.1)
    default_damping = RelativeDamping(1e-3)
    infinite_width = "train"
    why_no_limit = "its entries have no limit of finite variance"
    masks_units = True
    limit_kernels = ("inputs",)
    coefficient_arrays = (0.0, 8.0)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """N of the inputs of a unit where nothing is shared, elsewhere N C."""
        n, c = geometry.num_samples, geometry.num_outputs
        shared = isinstance(geometry, SharedGeometry)
        return [
            NeededRank(index, "channel" if shared else "inputs", n if count == 1 else n * c, fan_in)
            for index, ((fan_in, _), count) in enumerate(
                zip(geometry.layers, geometry.positions, strict=True)
            )
        ]

    def shared_alpha(self, geometry: SharedGeometry) -> float:
        """1 + sum_{l<L} M_l, with gamma / C of those units that share nothing."""
        total = 1.0
        for (_, units), count in zip(geometry.layers[:-1], geometry.positions[:-1], strict=True):
            share = 1.0
            if count == 1:
                if geometry.active_fraction is None:
                    raise ValueError(
                        "alpha of UnitWise needs the fraction of active units of its dense layers"
                    )
                share = geometry.active_fraction / geometry.num_outputs
            total += share * units
        return total

    def no_limit(self, shared: bool) -> str:
        """Channels of shared weights keep a finite number of inputs."""
        return no_channel_limit(self.name) if shared else ""

    def __post_init__(self) -> None:
        check_space(self.space)

    def operator(self, signals: Signals) -> Blocks:
        """The Fisher blocks of all units, layer by layer."""
        return LayersOfUnits(
            tuple(
                DenseUnits(layer, self.space)
                if isinstance(layer, DenseSignals)
                else WholeUnits(layer, self.space)
                for layer in signals.layers
            )
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_i D'_i (a' (F_i + rho)^{-1} a^T) D_i^T / N, unit after unit."""
        if has_shared_layers(train):
            return super().coefficient(test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        for test_layer, train_layer, rho in zip(
            map(dense_layer, test.layers),
            map(dense_layer, train.layers),
            per_layer(damping, len(train.layers)),
            strict=True,
        ):
            gram, cross = train_layer.input_gram(), test_layer.input_gram(train_layer)
            invert = inverse_of_units(gram, train.num_samples * rho)

            def kernel(
                row: tuple[Array, ...],
                cross: Array = cross,
                invert: Callable[[Array], Array] = invert,
            ) -> Array:
                return cross @ invert(row[0])

            roots = jnp.sqrt(unit_weights(train_layer)).T
            total = total + sum_over_units(test_layer, train_layer, (roots,), kernel)
        return total

    def damping_scale(self, signals: Signals) -> Array:
        """Mean over units of the mean diagonal of their Gram matrices, over N, shape (L,)."""
        units = [layer.num_units for layer in signals.layers]
        means = mean_gram_diagonal(signals)
        return means / jnp.asarray(units, means.dtype)

    def alpha(self, geometry: Geometry) -> float:
        """1 + gamma sum_{l<L} M_l / C.

        Raises:
          ValueError: gamma is unknown, because the model names no activation.
        """
        if geometry.active_fraction is None:
            raise ValueError(
                "alpha of UnitWise needs the fraction of active units (1/2 for relu, 1 for smooth "
                "activations); a model without an `activation` name does not tell it: pass inputs "
                "as x= for 1 / lambda_max of the coefficient matrix"
            )
        hidden = sum(units for _, units in geometry.layers[:-1])
        return 1.0 + geometry.active_fraction * hidden / geometry.num_outputs

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """The inputs of every layer must be able to have rank N."""
        return [
            f"layer {index + 1} has {fan_in} inputs for {geometry.num_samples} samples"
            for index, (fan_in, _) in enumerate(geometry.layers)
            if fan_in < geometry.num_samples
        ]

    def gram_size(self, signals: Signals) -> int:
        """N: the units are solved in chunks of N x N systems."""
        return signals.num_samples

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those between parameters of the same unit; see ``Structure.entries``."""
        layers = geometry.layers
        return sum(m * k**2 for k, m in layers), sum(m * triangle(k) for k, m in layers)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "exact block a unit"


def no_channel_limit(name: str) -> str:
    """Why blocks of units have no limit where weights are shared, and what to do."""
    return (
        f"{name} has no infinite-width kernel of a ConvNet: a channel of the first convolution "
        "keeps its few inputs at any width, and what the N C derivatives leave of their span is no "
        'function of the kernels of the layers; use kernels="empirical"'
    )
