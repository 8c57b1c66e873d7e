"""The isotropy constants of networks whose layers share weights between positions.

Karakida & Osawa (2020) have fully connected layers. With J_l the sum over T_l positions of
a[n,t] (x) D[n,s,t], at zero damping (a result of this project; ``ntk_analysis.reproduce.natgrad``
checks it):

- Exact and layer-wise Fishers are isotropic as before, alpha = 1 and 1^T Sigma^{-1} 1: Theorem 4.1
  asks for nothing but Jacobians J_l of row rank N C.
- K-FAC "expand" has Theta-bar_l = N T_l^2 I where the inputs of layer l have rank N T_l and its
  derivatives rank N C T_l. K-FAC "reduce" is isotropic only where T_l = 1.
- The unit-wise Fisher has Theta-bar_l = M_l I where every channel has a Jacobian of row rank N C,
  so at least N C inputs. Neither the activation nor the number of outputs counts, since the rows
  of a channel are in general independent as soon as T_l > 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from natgrad_flax.models.activations import active_fraction
from natgrad_flax.signals.capture import jacobian_signals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures import Geometry, Structure
from natgrad_flax.structures.geometry import NeededRank, SharedGeometry


def signals_geometry(model: nnx.Module, signals: Signals) -> Geometry:
    """The sizes of a model, as its signals on a batch show them.

    Args:
      model: any module with signals; the name of its activation counts, where it has one.
      signals: of the plain outputs, or their shapes.
    """
    shapes = tuple((layer.fan_in, layer.num_units) for layer in signals.layers)
    positions = tuple(_positions(layer) for layer in signals.layers)
    sizes = (shapes, signals.num_samples, signals.num_directions, active_fraction(model))
    if set(positions) == {1}:
        return Geometry(*sizes)
    return SharedGeometry(*sizes, positions=positions)


def traced_geometry(
    model: nnx.Module, sample_shape: Sequence[int], dtype: Any, num_samples: int
) -> Geometry:
    """The sizes of a model on samples of some shape; nothing is computed.

    Args:
      model: any module with signals.
      sample_shape: of one input.
      dtype: of the inputs.
      num_samples: N.

    Raises:
      ValueError, TypeError: the model has no signals, as in ``jacobian_signals``, or does not run
        on such samples.
    """
    return geometry_at(model, jax.ShapeDtypeStruct((1, *sample_shape), dtype), num_samples)


def geometry_at(model: nnx.Module, x: Any, num_samples: int) -> Geometry:
    """As ``traced_geometry``, for samples like those of a tree of inputs (N', ...)."""
    # sizes of a sample do not depend on N
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
    graphdef, state = nnx.split(model)
    signals = jax.eval_shape(lambda s, x: jacobian_signals(nnx.merge(graphdef, s), x), state, x)
    return replace(signals_geometry(model, signals), num_samples=num_samples)


def shared_failures(structure: Structure, geometry: SharedGeometry) -> list[str]:
    """What the sizes violate of the assumptions behind ``shared_alpha``, a sentence each.

    Sizes only bound the ranks that count; ``ntk_analysis.conditions`` measures these.

    Args:
      structure: the Fisher approximation.
      geometry: the sizes.
    """
    needs = structure.needed_ranks(geometry)
    if needs is None:
        return structure.failed_conditions(geometry)
    return [_too_small(need, geometry) for need in needs if need.size < need.rank]


def _too_small(need: NeededRank, geometry: SharedGeometry) -> str:
    where = f"layer {need.layer + 1}"
    if need.what == "network":
        return f"the network has {need.size} parameters for N C = {need.rank} outputs"
    if need.what == "jacobian":
        return f"{where} has {need.size} parameters for N C = {need.rank} outputs"
    if need.what == "channel":
        return f"{where}: a channel has {need.size} inputs and needs {need.rank}"
    return (
        f"{where} has {need.size} {'channels' if need.what == 'derivatives' else 'inputs'}, and "
        f"its {need.what} need rank {need.rank} (N times {geometry.positions[need.layer]} "
        "positions)"
    )


def _positions(layer: object) -> int | None:
    # the rows of weights of two uses are no inputs and units of one layer
    if isinstance(layer, (ExplicitSignals, TiedSignals)):
        return None
    return layer.num_positions if isinstance(layer, SharedSignals) else 1
