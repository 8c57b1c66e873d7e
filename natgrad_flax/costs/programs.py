"""What structures hold and cost, counted in the programs of their solves on shapes of signals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.costs.flops import Cost, cost_of
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Residual
from natgrad_flax.structures import Structure
from natgrad_flax.structures.base import block_words
from natgrad_flax.structures.memory import sample_jacobian_entries


@dataclass(frozen=True)
class Approximation:
    """What a structure makes of the Fisher block of one layer, or of all layers together.

    Attributes:
      form: in words.
      held: bytes of the products and factors that are there at once. Of a layer that is solved
        together with others: of its block, and of what that is built from besides the signals.
      flops: from the signals to the update. Of a layer that is solved together with others: to
        build its block.
    """

    form: str
    held: int
    flops: int


def solve_cost(
    structure: Structure, signals: Signals, *, inside: bool, damping: float = 1.0
) -> Cost:
    """What ``Structure.solve`` costs.

    Args:
      structure: the structure.
      signals: shapes of signals, from ``jax.eval_shape``.
      inside: the residual lies in the span of the output directions.
      damping: 0 for the undamped solve; other values cost the same.
    """

    def solve(signals: Signals, residual: Residual) -> tuple[LayerUpdate, ...]:
        return structure.solve(signals, residual, damping)

    return cost_of(solve, signals, jax.eval_shape(lambda s: _residual(s, inside), signals))


def _residual(signals: Signals, inside: bool) -> Residual:
    if not inside:
        return Residual(None, tuple(layer.cotangent(0) for layer in signals.layers))
    shape = signals.num_samples, signals.num_directions
    return Residual(jnp.zeros(shape, signals.outputs.dtype), None)


def approximate(
    structure: Structure, signals: Signals, index: int, *, inside: bool
) -> Approximation:
    """What a structure makes of the block of one layer, from the shapes of the signals."""
    layer, form = signals.layers[index], structure.block_form(signals.layers[index])
    if not structure.couples_layers:
        cost = solve_cost(structure, replace(signals, layers=(layer,)), inside=inside)
        return Approximation(form, cost.held, round(cost.flops))
    small = structure.gram_size(signals) == signals.num_params

    def build(layer: LayerSignals) -> Array:
        return layer.to_dense().T @ layer.to_dense() if small else layer.gram()

    entries = jax.eval_shape(build, layer).size + sample_jacobian_entries(structure, layer)
    return Approximation(
        f"{form}, {block_words(layer, small)}",
        signals.outputs.dtype.itemsize * entries,
        round(cost_of(build, layer).flops),
    )


def shared_system(
    structure: Structure, signals: Signals, layers: list[Approximation], *, inside: bool
) -> Approximation | None:
    """What is solved for all layers together, ``layers`` being what is built of each before."""
    if not structure.couples_layers:
        return None
    side, cost = structure.gram_size(signals), solve_cost(structure, signals, inside=inside)
    form = f"one system of {side:,} x {side:,}"
    held = signals.outputs.dtype.itemsize * side**2
    return Approximation(form, held, round(cost.flops) - sum(layer.flops for layer in layers))
