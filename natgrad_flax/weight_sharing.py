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
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, NamedTuple

import jax
from flax import nnx

from natgrad_flax.activations import active_fraction
from natgrad_flax.capture import jacobian_signals
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals
from natgrad_flax.signals import Signals
from natgrad_flax.structures import KFAC, Geometry, LayerWise, Structure, UnitWise


@dataclass(frozen=True)
class SharedGeometry(Geometry):
    """The sizes of a network with shared weights.

    Attributes:
      positions: T_l, one a layer: 1 where nothing is shared, None for parameters that have no
        inputs and units (those of explicit Jacobian blocks).
    """

    positions: tuple[int | None, ...] = ()


class NeededRank(NamedTuple):
    """A rank that isotropy asks for in one layer.

    Attributes:
      layer: its index.
      what: "inputs" or "derivatives".
      rank: the rank that is needed.
      size: the parameters a unit, or the units, which no rank exceeds.
    """

    layer: int
    what: str
    rank: int
    size: int


def signals_geometry(model: nnx.Module, signals: Signals) -> Geometry:
    """The sizes of a model, as its signals on a batch show them.

    Args:
      model: any module with signals; the name of its activation counts, where it has one.
      signals: of the plain outputs, or their shapes.
    """
    shapes = tuple((layer.fan_in, layer.num_units) for layer in signals.layers)
    positions = tuple(_positions(layer) for layer in signals.layers)
    sizes = (shapes, signals.num_samples, signals.num_seeds, active_fraction(model))
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


@singledispatch
def shared_alpha(structure: Structure, geometry: SharedGeometry) -> float:
    """alpha of the isotropy condition at zero damping, where weights are shared.

    Args:
      structure: the Fisher approximation, or gradient descent.
      geometry: the sizes.

    Raises:
      ValueError: the structure has no alpha there.
    """
    return structure.alpha(geometry)


@shared_alpha.register
def _(structure: KFAC, geometry: SharedGeometry) -> float:
    positions = geometry.positions
    if None in positions or positions[-1] != 1:
        raise ValueError(
            "alpha of KFAC is known for layers with inputs and units, the last of one position"
        )
    if structure.sharing == "reduce":
        raise ValueError(
            'alpha of KFAC(sharing="reduce") is known without shared weights only: the means over '
            "positions do not span the Jacobians"
        )
    n = geometry.num_samples
    hidden = sum(n * count**2 for count in positions[:-1] if count is not None)
    return float(hidden + (n if structure.last_layer == "scaled" else 1))


@shared_alpha.register
def _(structure: UnitWise, geometry: SharedGeometry) -> float:
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


@singledispatch
def shared_failures(structure: Structure, geometry: SharedGeometry) -> list[str]:
    """What the sizes violate of the assumptions behind ``shared_alpha``, a sentence each.

    Sizes only bound the ranks that count; ``ntk_analysis.conditions`` measures these.

    Args:
      structure: the Fisher approximation.
      geometry: the sizes.
    """
    return structure.failed_conditions(geometry)


@shared_failures.register
def _(structure: LayerWise, geometry: SharedGeometry) -> list[str]:
    wanted = geometry.num_samples * geometry.num_outputs
    return [
        f"layer {index + 1} has {fan_in * units} parameters for N C = {wanted} outputs"
        for index, (fan_in, units) in enumerate(geometry.layers)
        if fan_in * units < wanted
    ]


@shared_failures.register
def _(structure: KFAC, geometry: SharedGeometry) -> list[str]:
    return [
        f"layer {need.layer + 1} has {need.size} "
        f"{'inputs' if need.what == 'inputs' else 'channels'}, and its {need.what} need rank "
        f"{need.rank} (N times {geometry.positions[need.layer]} positions)"
        for need in kfac_ranks(geometry)
        if need.size < need.rank
    ]


@shared_failures.register
def _(structure: UnitWise, geometry: SharedGeometry) -> list[str]:
    return [
        f"layer {need.layer + 1}: a channel has {need.size} inputs and needs {need.rank}"
        for need in unit_wise_ranks(geometry)
        if need.size < need.rank
    ]


def kfac_ranks(geometry: SharedGeometry) -> list[NeededRank]:
    """N T_l of the inputs, and N C T_l of the derivatives of all layers but the last.

    Parameters without inputs and units are left out.
    """
    n, c = geometry.num_samples, geometry.num_outputs
    needs = []
    for index, ((fan_in, units), count) in enumerate(
        zip(geometry.layers, geometry.positions, strict=True)
    ):
        if count is None:
            continue
        needs.append(NeededRank(index, "inputs", n * count, fan_in))
        if index < geometry.depth - 1:
            needs.append(NeededRank(index, "derivatives", n * c * count, units))
    return needs


def unit_wise_ranks(geometry: SharedGeometry) -> list[NeededRank]:
    """N of the inputs of a channel where nothing is shared, elsewhere N C."""
    n, c = geometry.num_samples, geometry.num_outputs
    return [
        NeededRank(index, "inputs", n if count == 1 else n * c, fan_in)
        for index, ((fan_in, _), count) in enumerate(
            zip(geometry.layers, geometry.positions, strict=True)
        )
    ]


def _positions(layer: object) -> int | None:
    if isinstance(layer, ExplicitSignals):
        return None
    return layer.num_positions if isinstance(layer, SharedSignals) else 1
