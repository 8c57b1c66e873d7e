"""Entry-wise diagonal of the Fisher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import RelativeDamping, per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.entries import Entries, divide
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, ravel
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.base import (
    Geometry,
    dense_layer,
    has_shared_layers,
)
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class Diagonal(AveragedStructure):
    """The diagonal of the Fisher alone, G_ij = (F_ii + rho) delta_ij (LeCun et al. 1998).

    Not isotropic at any width (Karakida & Osawa 2020, Fig. 3), so it has no alpha.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, loss = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), ng.MeanSquaredError()
      >>> x = jnp.eye(4)
      >>> kept = ng.fisher(model, x, structure=ng.Diagonal(), loss=loss)
      >>> F = ng.fisher(model, x, structure=ng.Exact(), loss=loss)
      >>> bool(jnp.allclose(kept.to_dense(), jnp.diag(jnp.diag(F.to_dense()))))
      True
    """

    style = styled("Diagonal", "#56B4E9", "X")
    stacking = "all"
    # an undamped entry can be so small that the network leaves its linearisation in a few steps
    default_damping = RelativeDamping(1e-3)
    cheap_inverse = True
    shared_weights = "squares"
    damping_margin = 1.0  # no system is solved

    def operator(self, signals: Signals) -> Blocks:
        """The entries of every layer."""
        pairs = zip(signals.layers, self.statistics(signals), strict=True)
        return Blocks(tuple(Entries(layer, entries) for layer, entries in pairs))

    def statistics(self, signals: Signals) -> tuple[LayerUpdate, ...]:
        """The diagonal of F, in the shapes of the parameters."""
        return tuple(layer_diagonal(layer) for layer in signals.layers)

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[LayerUpdate, ...]:
        """The diagonal with its damping, to divide by."""
        factors = moments.factors
        return tuple(
            jax.tree.map(lambda entry, rho=rho: entry + rho, layer)
            for layer, rho in zip(factors, per_layer(damping, len(factors)), strict=True)
        )

    def apply(
        self, inverse: tuple[LayerUpdate, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """The quotients; 0 where an entry of the undamped diagonal is 0."""
        return jax.tree.map(divide, gradient, inverse)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_l sum_i (d'_i d_i^T) . (a' diag(1 / (F_i + rho)) a^T) / N (science: 3.5b)."""
        if has_shared_layers(train):
            return super().coefficient(test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        for test_layer, train_layer, rho in zip(
            map(dense_layer, test.layers),
            map(dense_layer, train.layers),
            per_layer(damping, len(train.layers)),
            strict=True,
        ):
            left, right = test_layer.augmented_inputs(), train_layer.augmented_inputs()
            square = jnp.sum(train_layer.derivatives**2, axis=1)
            entries = square.T @ right**2 / train_layer.num_samples
            inverse = divide(jnp.ones_like(entries), entries + rho)

            def kernel(row: tuple[Array, ...], left: Array = left, right: Array = right) -> Array:
                return (left * row[0]) @ right.T

            total = total + sum_over_units(test_layer, train_layer, (inverse,), kernel)
        return total / train.num_samples

    def gram_size(self, signals: Signals) -> int:
        """0: it is inverted entry by entry."""
        return 0

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return jnp.stack([jnp.mean(ravel((layer,))) for layer in moments.factors])

    def alpha(self, geometry: Geometry) -> float:
        """Raises ValueError: not isotropic."""
        raise ValueError(no_alpha(self.name))

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """One a parameter."""
        params = sum(geometry.params)
        return params, params

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "diagonal"


def no_alpha(name: str) -> str:
    """Why an entry-wise Fisher has no alpha, and what to do."""
    return (
        f"{name} is not isotropic at any width (Karakida & Osawa 2020, Fig. 3), so sizes alone "
        "give no learning rate; pass inputs as x= for 1 / lambda_max of its coefficient matrix"
    )


def layer_diagonal(layer: LayerSignals) -> LayerUpdate:
    """F_ii of one layer, in the shape of its parameters."""
    return jax.tree.map(lambda entry: entry / layer.num_samples, layer.squares())


def mean_squares(layer: DenseSignals) -> Array:
    """sum_s D[n,s,i]^2 / N, shape (N, M)."""
    return jnp.sum(layer.derivatives**2, axis=1) / layer.num_samples


def sum_over_units(
    test_layer: DenseSignals,
    train_layer: DenseSignals,
    rows: tuple[Array, ...],
    kernel: Callable[[tuple[Array, ...]], Array],
) -> Array:
    """sum_i (D'_i D_i^T) . kernel(rows_i), unit after unit, shape (N' S', N S).

    Args:
      test_layer: signals at x'.
      train_layer: signals at x.
      rows: arrays whose first axis counts the units.
      kernel: from one entry of each array to an (N', N) array.
    """

    def add(total: Array, unit: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Array, None]:
        out, into, row = unit
        inputs = kernel(row)[:, None, :, None]
        return total + out[:, :, None, None] * inputs * into[None, None, :, :], None

    shape = (*test_layer.derivatives.shape[:2], *train_layer.derivatives.shape[:2])
    start = jnp.zeros(shape, train_layer.inputs.dtype)
    units = (
        jnp.moveaxis(test_layer.derivatives, 2, 0),
        jnp.moveaxis(train_layer.derivatives, 2, 0),
        rows,
    )
    total, _ = jax.lax.scan(add, start, units)
    return total.reshape(-1, train_layer.num_samples * train_layer.num_directions)
