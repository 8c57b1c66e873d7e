"""K-FAC and EKFAC on a mesh: inverses and eigenbases of factors dealt out, products split.

The factors themselves are products over samples, which XLA partitions as they are. A factor of
side n costs n^3: each is handled by one device, so the largest one bounds what k devices save.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from natgrad_flax.damping import is_zero
from natgrad_flax.devices.placement import Placement
from natgrad_flax.devices.tasks import Task, distribute
from natgrad_flax.operators.kronecker import factor_rows
from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.gradient import Gradient
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.structures import EKFAC, AveragedStructure, Moments

Entries = tuple[dict[str, Any], ...]
_SIDES = ("inputs", "units")


def solve_ekfac(
    structure: EKFAC,
    signals: Signals,
    gradient: Gradient,
    damping: Array | float,
    placement: Placement,
) -> tuple[LayerUpdate, ...]:
    """What ``structure.solve`` returns; as ``solve_kfac``."""
    moments = moments_dealt(structure, signals, placement)
    inverse = invert_dealt(structure, moments, damping, signals.num_samples, placement)
    return apply_split(structure, inverse, gradient.vector(signals.layers), placement)


def invert_dealt(
    structure: AveragedStructure,
    moments: Moments,
    damping: Array | float,
    num_samples: int,
    placement: Placement,
) -> Entries:
    """What ``structure.invert`` returns, each matrix of it from one device."""
    given = () if is_zero(damping) else (jnp.asarray(damping),)

    def entry(index: int, name: str, moments: Moments, *rho: Array) -> Array:
        # XLA drops what leads to the others
        return structure.invert(moments, rho[0] if rho else 0.0, num_samples)[index][name]

    found = [dict(one) for one in structure.invert(moments, damping, num_samples)]
    names = ("blocks",) if structure.cheap_inverse else ("blocks", "inputs", "units", "core")
    places = [
        (index, name) for index, one in enumerate(found) for name in names if _is_cubic(one, name)
    ]
    tasks = [
        Task(partial(entry, *place), (moments, *given), cubed(found[place[0]][place[1]]))
        for place in places
    ]
    for (index, name), inverse in zip(places, distribute(tasks, placement.mesh), strict=True):
        found[index][name] = inverse
    return tuple(found)


def _is_cubic(entry: dict[str, Any], name: str) -> bool:
    return name in entry and entry[name].shape[-1] > 1


def cubed(matrices: Array) -> float:
    """n^3 for each of g matrices."""
    return float(matrices.size) * max(matrices.shape[-2:])


def basis_dealt(structure: EKFAC, factors: Entries, placement: Placement) -> Entries:
    """What ``structure.basis`` returns, the eigenvectors of each factor from one device."""
    places = [(index, name) for index, one in enumerate(factors) for name in _SIDES if name in one]
    tasks = [_basis_task(structure, name, factors[index][name]) for index, name in places]
    return _place(distribute(tasks, placement.mesh), places, len(factors))


def moments_dealt(structure: EKFAC, signals: Signals, placement: Placement) -> Moments:
    """What ``EKFAC.moments`` returns, each basis from one device.

    Where the rows of a factor are fewer than its sides, their device gets them all.
    """
    factors = structure.statistics(signals)
    places, tasks = [], []
    for index, layer in enumerate(signals.layers):
        if isinstance(layer, ExplicitSignals):
            continue
        assert isinstance(layer, (DenseSignals, SharedSignals))
        whole = isinstance(layer, SharedSignals) and structure.sharing == "reduce"
        for name, rows in zip(_SIDES, factor_rows(layer, structure.sharing), strict=True):
            places.append((index, name))
            groups, count, side = rows.shape
            if whole or count >= side:
                tasks.append(_basis_task(structure, name, factors[index][name]))
                continue
            one = Signals((layer,), signals.outputs)
            cost = float(groups * (side + count) * count**2)
            tasks.append(Task(partial(_basis_of_rows, structure, name), (one,), cost))
    basis = _place(distribute(tasks, placement.mesh), places, len(factors))
    blocks = tuple({"blocks": one["blocks"]} if "blocks" in one else {} for one in factors)
    return Moments(blocks, basis, structure.rotated(signals, basis))


def _basis_task(structure: EKFAC, name: str, factor: Array) -> Task:
    def basis(factor: Array) -> Array:
        found: Array = structure.basis(({name: factor},))[0][name]
        return found

    return Task(basis, (factor,), cubed(factor))


def _basis_of_rows(structure: EKFAC, name: str, one: Signals) -> Array:
    found: Array = structure.moments(one).basis[0][name]
    return found


def _place(found: list[Array], places: list[tuple[int, str]], count: int) -> Entries:
    """Arrays as entries, one a layer."""
    entries: list[dict[str, Any]] = [{} for _ in range(count)]
    for (index, name), array in zip(places, found, strict=True):
        entries[index][name] = array
    return tuple(entries)


def apply_split(
    structure: AveragedStructure,
    inverse: Entries,
    slope: tuple[LayerUpdate, ...],
    placement: Placement,
) -> tuple[LayerUpdate, ...]:
    """What ``structure.apply`` returns, with the products split over the devices.

    Each device has its share of the units.
    """
    split = [_split(*pair, placement) for pair in zip(inverse, slope, strict=True)]
    found = structure.apply(tuple(one for one, _ in split), tuple(g for _, g in split))
    return jax.tree.map(lambda leaf, like: leaf[..., : like.shape[-1]], found, slope)


def _split(
    entry: dict[str, Any], slope: LayerUpdate, placement: Placement
) -> tuple[dict[str, Any], LayerUpdate]:
    """An entry and a slope with its units sharded, both filled up with units that are zero."""
    if len(entry.get("units", ())) != 1:
        return entry, slope
    columns = {name: split_last(leaf, placement) for name, leaf in slope.items()}
    filled, units = dict(entry), entry["units"]
    if "inverse" in entry and units.shape[1] == units.shape[2]:
        # a basis of the whole space stays one
        filled["inverse"] = _filled(entry["inverse"], placement)
        units = _filled(units, placement)
    filled["units"] = split_last(units.mT, placement).mT
    return filled, columns


def split_last(array: Array, placement: Placement) -> Array:
    """Filled up with zeros along the last axis, which is sharded."""
    spec = PartitionSpec(*(None,) * (array.ndim - 1), placement.axis)
    sharding = NamedSharding(placement.mesh, spec)
    return lax.with_sharding_constraint(_filled(array, placement), sharding)


def _filled(array: Array, placement: Placement) -> Array:
    missing = -array.shape[-1] % placement.size
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
