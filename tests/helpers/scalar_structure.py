"""A structure in one file, as anybody adds one: everything that is known of it stands here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import RelativeDamping, per_layer
from natgrad_flax.operators.base import Blocks, Operator
from natgrad_flax.operators.entries import Entries
from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class Scalar(AveragedStructure):
    """G_l = (t_l + rho) I, with t_l the mean diagonal of the Fisher block of layer l."""

    style = styled("Scalar metric", command="scalar", short="scal.", aliases=("one-number",))
    default_damping = RelativeDamping(0.01)
    cheap_inverse = True

    def operator(self, signals: Signals) -> Operator:
        pairs = zip(signals.layers, self.statistics(signals), strict=True)
        ones = [(a, jnp.full((a.fan_in, a.num_units), t)) for a, t in pairs]
        return Blocks(tuple(Entries(a, a.update(t)) for a, t in ones))

    def gram_size(self, signals: Signals) -> int:
        return 0

    def statistics(self, signals: Signals) -> tuple[Any, ...]:
        n = signals.num_samples
        return tuple(jnp.sum(a.gram_norms()) / (n * a.num_params) for a in signals.layers)

    def invert(self, moments: Moments, damping: Array | float, num_samples: int) -> tuple[Any, ...]:
        rho = per_layer(damping, len(moments.factors))
        return tuple(1 / (t + r) for t, r in zip(moments.factors, rho, strict=True))

    def apply(
        self, inverse: tuple[Any, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        layers = zip(inverse, gradient, strict=True)
        return tuple(jax.tree.map(lambda g, f=f: f * g, update) for f, update in layers)

    def scale_of(self, moments: Moments, num_samples: int) -> Array:
        return jnp.stack(moments.factors)
