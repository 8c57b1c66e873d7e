"""The isotropy constants of networks whose layers share weights between positions.

Karakida & Osawa (2020) have fully connected layers. With J_l the sum over T_l positions of
a[n,t] (x) D[n,s,t], at zero damping (a result of this project; ``reproduce.natgrad`` checks it):

- Exact and layer-wise Fishers are isotropic as before, alpha = 1 and 1^T Sigma^{-1} 1: Theorem 4.1
  asks for nothing but Jacobians J_l of row rank N C.
- K-FAC "expand" has Theta-bar_l = N T_l^2 I where the inputs of layer l have rank N T_l and its
  derivatives rank N C T_l. K-FAC "reduce" is isotropic only where T_l = 1.
- The unit-wise Fisher has Theta-bar_l = M_l I where every channel has a Jacobian of row rank N C,
  so at least N C inputs. Neither the activation nor the number of outputs counts, since the rows
  of a channel are in general independent as soon as T_l > 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

from flax import nnx

from natgrad_flax import KFAC, MLP, ConvNet, Signals, Structure, UnitWise
from natgrad_flax.activations import ACTIVATIONS
from natgrad_flax.gradient import model_geometry
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals
from natgrad_flax.structures import Geometry


@dataclass(frozen=True)
class SharedGeometry(Geometry):
    """The sizes of a network with shared weights.

    Attributes:
      positions: T_l, one a layer: 1 where nothing is shared, None for parameters that have no
        inputs and units (those of explicit Jacobian blocks).
    """

    positions: tuple[int | None, ...] = ()


def signals_geometry(model: nnx.Module, signals: Signals) -> Geometry:
    """The sizes of a model, as its signals on a batch show them.

    Args:
      model: any module with signals; the name of its activation counts, where it has one.
      signals: of the plain outputs.
    """
    shapes = tuple((layer.fan_in, layer.num_units) for layer in signals.layers)
    positions = tuple(_positions(layer) for layer in signals.layers)
    name = getattr(model, "activation", None)
    fraction = ACTIVATIONS[name].active_fraction if name in ACTIVATIONS else None
    sizes = (shapes, signals.num_samples, signals.num_seeds, fraction)
    if set(positions) == {1}:
        return Geometry(*sizes)
    return SharedGeometry(*sizes, positions=positions)


def limit_geometry(model: MLP | ConvNet, num_samples: int) -> Geometry:
    """The sizes of a model that has an infinite-width twin, without signals.

    Args:
      model: the network.
      num_samples: N.
    """
    if isinstance(model, MLP):
        return model_geometry(model, num_samples)
    shape: tuple[int, ...] = model.input_shape[:2]
    layers, positions = [], []
    for layer in model.convolutions:
        shape = layer.positions(shape)
        layers.append((layer.fan_in + (layer.bias is not None), layer.out_features))
        positions.append(math.prod(shape))
    readout = model.readout
    layers.append((readout.in_features + (readout.bias is not None), readout.out_features))
    return SharedGeometry(
        tuple(layers),
        num_samples,
        model.outputs,
        ACTIVATIONS[model.activation].active_fraction,
        (*positions, 1),
    )


@singledispatch
def shared_alpha(structure: Structure, geometry: SharedGeometry) -> float:
    """alpha of the isotropy condition at zero damping, where weights are shared.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
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


def _positions(layer: object) -> int | None:
    if isinstance(layer, ExplicitSignals):
        return None
    return layer.num_positions if isinstance(layer, SharedSignals) else 1
