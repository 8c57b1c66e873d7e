"""K-FAC of a batch on a mesh: each factor of each layer is inverted by one device.

The factors are made, and their inverses multiplied, by all devices together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from natgrad_flax.damping import per_layer
from natgrad_flax.devices.factors import cubed, split_last
from natgrad_flax.devices.placement import Placement
from natgrad_flax.devices.tasks import Task, distribute
from natgrad_flax.linalg import symmetric_product
from natgrad_flax.operators.base import in_parameters
from natgrad_flax.operators.kronecker import factor_rows, grouped, ungrouped
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.structures import KFAC
from natgrad_flax.structures.kronecker_average import inverse_groups


@dataclass(frozen=True)
class _Factor:
    """One of both factors of a layer, F = rows^T rows / over + rho.

    Attributes:
      rows: (g, R, P) of g groups.
      over: divisor.
      rho: positive damping.
      small: whether F is inverted, (P, P), and not rows rows^T + over rho, (R, R).
      placement: the devices.
    """

    rows: Array
    over: float
    rho: Array | float
    small: bool
    placement: Placement

    def task(self) -> Task:
        """To invert (g, P, P) or (g, R, R), at which all devices have worked."""
        rho = jnp.asarray(self.rho if self.small else self.over * self.rho, self.rows.dtype)
        if self.small:
            matrix = jnp.stack([symmetric_product(group.T) / self.over for group in self.rows])
        else:
            # without the constraint XLA gathers the rows first, and all devices do all of it; of a
            # symmetric product they would do every block
            spec = PartitionSpec(None, self.placement.axis)
            matrix = lax.with_sharding_constraint(
                self.rows @ self.rows.mT,
                NamedSharding(self.placement.mesh, spec),
            )
        return Task(partial(inverse_groups, shifted=True), (matrix, rho), cubed(matrix))


@dataclass(frozen=True)
class _Inverse:
    """F^{-1}.

    Attributes:
      factor: F.
      matrix: the inverse that its task found.
    """

    factor: _Factor
    matrix: Array

    def times(self, target: Array) -> Array:
        """F^{-1} times (g, P, k)."""
        rows = self.factor.rows
        if self.factor.small:
            columns = split_last(target, self.factor.placement)
            return (self.matrix @ columns)[..., : target.shape[-1]]
        return (target - rows.mT @ (self.matrix @ (rows @ target))) / self.factor.rho

    def times_rows(self, target: Array) -> Array:
        """F^{-1} rows^T times (1, R, k), without the rounding of a small damping."""
        rows = self.factor.rows
        if self.factor.small:
            return self.times(rows.mT @ target)
        return self.factor.over * rows.mT @ (self.matrix @ target)


def solve_kfac(
    structure: KFAC,
    signals: Signals,
    gradient: Gradient,
    damping: Array | float,
    placement: Placement,
) -> tuple[LayerUpdate, ...]:
    """What ``structure.solve`` returns, at a positive damping.

    Args:
      structure: the structure.
      signals: of the whole batch, samples sharded.
      gradient: what is solved for.
      damping: as in ``Structure.solve``.
      placement: the devices.
    """
    updates = list(structure.solve(signals, gradient, damping))
    pairs = {
        index: _factors(structure, signals, index, rho, placement)
        for index, rho in enumerate(per_layer(damping, len(signals.layers)))
        if not isinstance(signals.layers[index], ExplicitSignals)
    }
    tasks = [factor.task() for pair in pairs.values() for factor in pair]
    matrices = iter(distribute(tasks, placement.mesh))
    for index, pair in pairs.items():
        a, b = (_Inverse(factor, next(matrices)) for factor in pair)
        # in place of what one device would do, which XLA drops
        updates[index] = _solve_layer(signals.layers[index], gradient.of_layer(index), a, b)
    return tuple(updates)


def _factors(
    structure: KFAC, signals: Signals, index: int, rho: Array | float, placement: Placement
) -> tuple[_Factor, _Factor]:
    """Those of A* and B*."""
    layer = signals.layers[index]
    assert isinstance(layer, (DenseSignals, SharedSignals))
    overs = structure.divisors(signals, index)
    rhos = structure.dampings(layer, overs, rho)
    left, right = factor_rows(layer, structure.sharing)
    a, b = (
        _Factor(rows, over, shift, in_parameters(structure.space, *rows.shape[1:]), placement)
        for rows, over, shift in zip((left, right), overs, rhos, strict=True)
    )
    return a, b


def _solve_layer(layer: LayerSignals, gradient: Gradient, a: _Inverse, b: _Inverse) -> LayerUpdate:
    """A^{-1} G B^{-1}."""
    if isinstance(layer, DenseSignals) and isinstance(gradient, Residual):
        half = _directions(layer, gradient, b) / layer.num_samples
        return layer.update(a.times_rows(half[None])[0])
    (g,) = gradient.vector((layer,))
    half = a.times(grouped(matrix_of(g), len(a.matrix)))
    return layer.update(ungrouped(b.times(half.mT).mT))


def _directions(layer: DenseSignals, residual: Residual, b: _Inverse) -> Array:
    """r^T D B^{-1} sample by sample, shape (N, M)."""
    if residual.coefficients is None or b.factor.small:
        return b.times(residual.cotangent(layer, 0).T[None])[0].T
    n, s = residual.coefficients.shape
    rows = jnp.einsum("ns,nsm->nm", residual.coefficients, b.matrix.reshape(n, s, n * s))
    return b.factor.over * rows @ layer.flat_derivatives()
