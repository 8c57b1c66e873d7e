"""Which condition behind isotropy fails at infinite width, from the kernels of the layers."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_flax import Signals, Structure
from natgrad_flax.linalg.dense import has_full_rank
from natgrad_flax.structures import Geometry
from natgrad_flax.structures.geometry import INFINITE
from ntk_analysis.analytic_signals import LimitLayer
from ntk_analysis.conditions import (
    LayerRanks,
    NetworkRanks,
    failed_conditions,
    gram_rank,
    leverages,
    parallel,
)
from ntk_analysis.empirical import Matrix


def limit_failures(structure: Structure, geometry: Geometry, signals: Signals) -> tuple[str, ...]:
    """``failed_conditions`` at infinite width, where of all sizes only that of the inputs counts.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      geometry: of the model and N.
      signals: of ``coefficient.analytic_signals`` on the training samples, for this structure.
    """
    last = geometry.depth - 1
    layers = tuple(
        (INFINITE if index > 0 else fan_in, INFINITE if index < last else units)
        for index, (fan_in, units) in enumerate(geometry.layers)
    )
    wide = dataclasses.replace(geometry, layers=layers)
    return failed_conditions(structure, wide, _ranks(signals, geometry.num_outputs))


def _ranks(signals: Signals, outputs: int) -> NetworkRanks:
    """Ranks of the kernels that were computed; the full one for the others."""
    layers: list[LayerRanks] = []
    total = np.zeros((signals.num_samples, signals.num_samples))
    limits = cast("tuple[LimitLayer, ...]", signals.layers)
    for layer in limits:
        ranks = dict.fromkeys(("inputs", "derivatives", "tangent"), signals.num_samples)
        for part in ranks:
            if f"{part}.{layer.index + 1}" in layer.train.arrays:
                kernel = getattr(layer.train, part)[layer.index]
                ranks[part] = _rank(kernel)
                if part != "derivatives":
                    total += kernel
        # Q_L is Theta_L, which others know; and no structure asks both of one layer
        inputs = min(ranks["inputs"], ranks["tangent"])
        layers.append(
            LayerRanks(inputs, outputs * ranks["derivatives"], outputs * ranks["tangent"])
        )
    spread = (1.0, 1.0)
    if limits[0].raw_inputs is not None:
        with jax.enable_x64(True):
            spread = leverages(np.asarray(limits[0].augmented_inputs()))
    return NetworkRanks(tuple(layers), outputs * _rank(total), spread, None, parallel(total))


def _rank(kernel: Matrix) -> int:
    with jax.enable_x64(True):
        regular = has_full_rank(jnp.asarray(kernel))
    return len(kernel) if regular else gram_rank(kernel, len(kernel))
