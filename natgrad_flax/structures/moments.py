"""Structures made of second moments of the Jacobians of samples."""

from __future__ import annotations

import abc

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import as_pair, of_block, per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.powers import mean_diagonals
from natgrad_flax.operators.units import invert_blocks, unit_blocks
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.shared import ExplicitSignals
from natgrad_flax.structures.averaged import AveragedStructure, Moments, coefficient_by_inverse
from natgrad_flax.structures.base import has_shared_layers
from natgrad_flax.structures.factor_entries import Entry, apply_entries, solve_affine
from natgrad_flax.structures.kronecker_average import crossed


class OfMoments(AveragedStructure):
    """Moments of one or both sides of the Jacobians of affine layers, blocks of units of others."""

    @property
    @abc.abstractmethod
    def sides(self) -> tuple[str, ...]:
        """Whose moments there are, of "inputs" and "units"; the other side is the identity."""

    @abc.abstractmethod
    def moment(self, layer: LayerSignals, side: str) -> Array:
        """That of every group of units of an affine layer, shape (G, P, P)."""

    @abc.abstractmethod
    def inverses(self, moments: Array, damping: Array | float) -> Array:
        """What multiplies gradients on the side of damped moments of all groups (G, P, P)."""

    @abc.abstractmethod
    def operator(self, signals: Signals) -> Blocks:
        """What is made of the moments, layer by layer."""

    def statistics(self, signals: Signals) -> tuple[Entry, ...]:
        """Moments by their sides, or the blocks of units."""
        return tuple(
            {"blocks": unit_blocks(layer)}
            if isinstance(layer, ExplicitSignals)
            else {side: self.moment(layer, side) for side in self.sides}
            for layer in signals.layers
        )

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[Entry, ...]:
        """The inverses on every side, or those of blocks."""
        found: list[Entry] = []
        rhos = per_layer(damping, len(moments.factors))
        for entry, rho in zip(moments.factors, rhos, strict=True):
            if "blocks" in entry:
                found.append({"blocks": invert_blocks(entry["blocks"], of_block(rho))})
                continue
            pairs = zip(self.sides, as_pair(rho), strict=False)
            found.append({side: self.inverses(entry[side], own) for side, own in pairs})
        return tuple(found)

    def apply(
        self, inverse: tuple[Entry, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """R^{-1} G L^{-1}, group by group."""
        return apply_entries(inverse, gradient, solve_affine)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """See ``Structure.coefficient``."""
        if has_shared_layers(train):
            return coefficient_by_inverse(self, test, train, damping)
        return crossed(self.operator(train), test, train, damping)

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """Mean diagonals of the moments, (L,) of one side and (L, 2) of both, or of blocks."""
        means = [
            jnp.stack(
                [
                    jnp.mean(mean_diagonals(entry.get("blocks", entry.get(side))))
                    for entry in moments.factors
                ]
            )
            for side in self.sides
        ]
        return means[0] if len(means) == 1 else jnp.stack(means, axis=1)
