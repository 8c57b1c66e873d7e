"""The unit-wise Fisher with its units dealt out to devices.

Every unit has a system of its own over all samples, so the signals change hands once: from a share
of the samples of all units to all samples of a share of the units.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.devices.placement import Placement
from natgrad_flax.operators.units import solve_units
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.gradient import Gradient, ParameterGradient, Residual
from natgrad_flax.structures import UnitWise


def solve_units_on_mesh(
    structure: UnitWise,
    signals: Signals,
    gradient: Gradient,
    damping: Array | float,
    placement: Placement,
) -> tuple[LayerUpdate, ...]:
    """What ``structure.solve`` returns.

    Units that do not divide by the devices are filled up with copies of the last one.

    Args:
      structure: the structure.
      signals: of the whole batch.
      gradient: what is solved for.
      damping: as in ``Structure.solve``.
      placement: the devices.
    """
    rhos = per_layer(damping, len(signals.layers))
    updates = []
    for index, (layer, rho) in enumerate(zip(signals.layers, rhos, strict=True)):
        part = gradient.of_layer(index)
        if isinstance(layer, DenseSignals):
            solved = _solve_dense(structure, layer, signals.outputs, part, rho, placement)
        else:
            solved = _solve_explicit(structure, layer, part, rho, placement)
        updates.append(layer.update(solved[:, : layer.num_units]))
    return tuple(updates)


@dataclasses.dataclass(frozen=True)
class _WithGram(DenseSignals):
    """Signals whose Gram matrix of inputs is known: all devices have worked at it."""

    known: Array | None = None

    def input_gram(self, other: DenseSignals | None = None) -> Array:
        """``known``."""
        assert other is None
        assert self.known is not None
        return self.known


def _solve_dense(
    structure: UnitWise,
    layer: DenseSignals,
    outputs: Array,
    gradient: Gradient,
    rho: Array | float,
    placement: Placement,
) -> Array:
    """The update of one layer as a matrix (fan_in, units), units filled up."""
    inside = gradient.coefficients is not None
    residual = isinstance(gradient, Residual)
    seen: Any
    if isinstance(gradient, Residual):
        seen = gradient.coefficients if inside else gradient.cotangent(layer, 0)
    else:
        seen = matrix_of(gradient.vector((layer,))[0])

    def local(
        inputs: Array, gram: Array, outputs: Array, derivatives: Array, seen: Array, rho: Array
    ) -> Array:
        own = _WithGram(inputs, derivatives, layer.bias_scale, layer.path, known=gram)
        one: Gradient = ParameterGradient((own.update(seen),))
        if residual:
            one = Residual(seen, None) if inside else Residual(None, (seen,))
        (update,) = structure.solve(Signals((own,), outputs), one, rho)
        return matrix_of(update)

    # without the constraint XLA gathers the inputs first, and all devices do all of the product; of
    # a symmetric product they would do every block
    gram = jax.lax.with_sharding_constraint(layer.input_gram(layer), placement.rows)
    arrays = (layer.inputs, gram, outputs, layer.derivatives, seen)
    return _over_units(local, placement, arrays, (False, False, False, True, not inside), rho)


def _solve_explicit(
    structure: UnitWise,
    layer: LayerSignals,
    gradient: Gradient,
    rho: Array | float,
    placement: Placement,
) -> Array:
    """The same for a layer of any kind, from its Jacobian."""
    matrix, coefficients = matrix_of(gradient.vector((layer,))[0]), gradient.coefficients

    def local(jacobian: Array, matrix: Array, coefficients: Any, rho: Array) -> Array:
        return solve_units(jacobian, matrix, rho, coefficients=coefficients, space=structure.space)

    arrays = (layer.jacobian(), matrix, coefficients)
    return _over_units(local, placement, arrays, (True, True, False), rho)


def _over_units(
    local: Any, placement: Placement, arrays: tuple[Any, ...], split: tuple[bool, ...], rho: Any
) -> Array:
    """Runs a function of arrays and a damping with some arrays split along their last axis."""

    def spec(array: Any) -> PartitionSpec:
        return PartitionSpec(*(None,) * (array.ndim - 1), placement.axis)

    zero = is_zero(rho)
    filled = tuple(
        _fill(array, placement.size) if cut else array
        for array, cut in zip(arrays, split, strict=True)
    )
    specs = tuple(
        spec(array) if cut else PartitionSpec() for array, cut in zip(filled, split, strict=True)
    )
    return jax.shard_map(
        lambda *args: local(*args[:-1], 0.0 if zero else args[-1]),
        mesh=placement.mesh,
        in_specs=(*specs, PartitionSpec()),
        out_specs=PartitionSpec(None, placement.axis),
        check_vma=False,
    )(*filled, jnp.asarray(rho))


def _fill(array: Array, parts: int) -> Array:
    missing = -array.shape[-1] % parts
    if not missing:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], mode="edge")
