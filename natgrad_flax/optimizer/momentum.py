"""Momentum for Fisher blocks that are solved batch by batch (SPRING).

A step that a batch determines in the span of its own Jacobian says nothing about the rest of the
space. So the step before, times mu, stays where this batch sees nothing, and is corrected where it
does: phi = argmin (1/N) |J phi - w|^2 + rho |phi - mu phi_before|^2, that is
phi = (F + rho)^{-1} (g + rho mu phi_before) = mu phi_before + (F + rho)^{-1} (g - F mu phi_before)
(Goldshlager, Abrahamsen & Lin 2024, arXiv:2401.10190). A momentum behind the transformation would
count again what the new batch already contains.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.signals.base import LayerUpdate, layer_updates
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient, ParameterGradient, Residual
from natgrad_flax.signals.recording import Path
from natgrad_flax.structures import Structure


@dataclass(frozen=True)
class Momentum:
    """The step before, and how much of it is taken along.

    Attributes:
      decay: mu.
      before: phi of the step before, by the paths of the parameters.
    """

    decay: float
    before: dict[Path, Array]

    def _carried(self, signals: Signals) -> tuple[LayerUpdate, ...]:
        """mu phi_before, layer by layer."""
        before = layer_updates(signals.layers, self.before)
        dtype = signals.outputs.dtype
        return jax.tree.map(lambda leaf: self.decay * leaf.astype(dtype), before)

    def solve(
        self, structure: Structure, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """phi for a gradient; of the residual of the same batch without a division by rho."""
        carried, w = self._carried(signals), gradient.coefficients
        if w is None:
            rhos = per_layer(damping, len(carried))
            pulled = tuple(
                jax.tree.map(lambda g, before, rho=rho: g + rho * before, *pair)
                for *pair, rho in zip(gradient.vector(signals.layers), carried, rhos, strict=True)
            )
            return structure.solve(signals, ParameterGradient(pulled), damping)
        # inside the span of the output directions: what is left of the residual is solved for
        images = [layer.jvp(a) for layer, a in zip(signals.layers, carried, strict=True)]
        if isinstance(structure.operator(signals), Blocks):
            rhos = per_layer(damping, len(images))
            solved = tuple(
                structure.solve(Signals((layer,), signals.outputs), Residual(w - image, None), rho)[
                    0
                ]
                for layer, image, rho in zip(signals.layers, images, rhos, strict=True)
            )
        else:
            left = w - sum(images[1:], start=images[0])
            solved = structure.solve(signals, Residual(left, None), damping)
        return jax.tree.map(jnp.add, carried, solved)
