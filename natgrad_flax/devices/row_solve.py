"""Structures of sample space whose Gram matrices stay sharded by rows.

With N samples and S output directions the matrix is N S x N S; each of k devices holds N S / k of
its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.devices.linear_solve import Solution, cholesky_solve, conjugate_gradients
from natgrad_flax.devices.placement import Placement
from natgrad_flax.operators.coupling import mix
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient
from natgrad_flax.signals.shared import SharedSignals
from natgrad_flax.structures import BlockDiagonal, Exact, LayerWise, Structure


@dataclass(frozen=True)
class RowSolver:
    """How a system is solved whose rows lie on different devices.

    Attributes:
      placement: the devices.
      name: "cholesky" or "cg".
      tolerance: of conjugate gradients, |A v - b| / |b|.
      max_iterations: of conjugate gradients.
    """

    placement: Placement
    name: str
    tolerance: float
    max_iterations: int


def serves(structure: Structure, depth: int) -> bool:
    """Whether the systems of a structure can be solved with sharded rows: they are definite."""
    if isinstance(structure, LayerWise):
        return bool(np.linalg.eigvalsh(structure.coupling(depth))[0] > 1e-9)
    return isinstance(structure, Exact)


def solve_rows(
    structure: Structure,
    signals: Signals,
    gradient: Gradient,
    damping: Array | float,
    solver: RowSolver,
) -> tuple[tuple[LayerUpdate, ...], Solution]:
    """What ``structure.solve`` or ``structure.precondition`` returns, and how the solves went.

    Args:
      structure: one that ``serves``.
      signals: of the whole batch, samples sharded.
      gradient: what is solved for.
      damping: as in ``Structure.solve``.
      solver: how.

    Raises:
      ValueError: no damping for a vector that may lie outside of the span of the batch.
    """
    if gradient.coefficients is None and is_zero(damping):
        raise ValueError(
            f'solver="{solver.name}" needs a positive damping where the Fisher has a batch of its '
            'own, or use solver="replicated"'
        )
    layers = signals.layers
    if isinstance(structure, BlockDiagonal):
        return _solve_blocks(structure, signals, gradient, damping, solver)
    shift = signals.num_samples * damping
    inside = gradient.coefficients is not None
    if isinstance(structure, Exact):
        target = gradient.target(layers)
        solution = _solve_sum(layers, target, shift, solver, zero=is_zero(damping))
        duals = [solution.value] * len(layers)
    else:
        assert isinstance(structure, LayerWise)
        sigma, parts = structure.coupling(len(layers)), gradient.targets(layers)
        solution = _solve_coupled(sigma, layers, parts, shift, solver, inside=inside)
        duals = list(solution.value)
    return gradient.updates(layers, duals, shift), solution


def _solve_blocks(
    structure: BlockDiagonal,
    signals: Signals,
    gradient: Gradient,
    damping: Array | float,
    solver: RowSolver,
) -> tuple[tuple[LayerUpdate, ...], Solution]:
    """One system a layer; those that are smaller in parameter space are solved there, by all."""
    updates: list[LayerUpdate] = []
    solutions = []
    rhos = per_layer(damping, len(signals.layers))
    for index, (layer, rho) in enumerate(zip(signals.layers, rhos, strict=True)):
        part = gradient.of_layer(index)
        if layer.num_params < signals.size and structure.space == "auto":
            updates += structure.solve(Signals((layer,), signals.outputs), part, rho)
            continue
        shift = signals.num_samples * rho
        target = part.target((layer,))
        solution = _solve_sum((layer,), target, shift, solver, zero=is_zero(damping))
        updates += part.updates((layer,), [solution.value], shift)
        solutions.append(solution)
    worst = Solution(
        jnp.zeros(()),
        jnp.all(jnp.stack([s.converged for s in solutions] or [jnp.array(True)])),
        jnp.max(jnp.stack([s.iterations for s in solutions] or [jnp.array(0)])),
        jnp.max(jnp.stack([s.residual for s in solutions] or [jnp.array(0.0)])),
    )
    return tuple(updates), worst


def _solve_sum(
    layers: tuple[LayerSignals, ...],
    target: Array,
    shift: Array | float,
    solver: RowSolver,
    *,
    zero: bool,
) -> Solution:
    """(sum_l K_l + s) v = t."""
    axis = solver.placement.axis
    layers = tuple(map(_as_it_travels, layers))

    def local(layers: tuple[LayerSignals, ...], target: Array, shift: Array) -> Solution:
        grams = [gram_rows(layer, axis) for layer in layers]
        rows = _add_to_diagonal(sum(grams[1:], start=grams[0]), shift, axis)
        if solver.name == "cholesky":
            return cholesky_solve(rows, target, axis, shifted=not zero)
        found = conjugate_gradients(
            lambda v: (rows @ lax.all_gather(v[0], axis, tiled=True))[None],
            [_own_block(rows, axis)],
            target[None],
            axis,
            tolerance=solver.tolerance,
            max_iterations=solver.max_iterations,
        )
        return found._replace(value=found.value[0])

    return _on_devices(local, solver, PartitionSpec(axis))(
        layers, target, jnp.asarray(shift, target.dtype)
    )


def _solve_coupled(
    sigma: np.ndarray,
    layers: tuple[LayerSignals, ...],
    targets: list[Array],
    shift: Array | float,
    solver: RowSolver,
    *,
    inside: bool,
) -> Solution:
    """(s Sigma^{-1} (x) I + blockdiag(K_l)) u = Sigma^{-1} t; outside of the span = t."""
    axis, inverse = solver.placement.axis, np.linalg.inv(sigma)
    layers = tuple(map(_as_it_travels, layers))
    if inside:
        targets = mix(inverse, targets)

    def local(layers: tuple[LayerSignals, ...], targets: list[Array], shift: Array) -> Solution:
        grams = [gram_rows(layer, axis) for layer in layers]
        coupling = jnp.asarray(inverse, targets[0].dtype) * shift

        def times(vectors: Array) -> Array:
            whole = lax.all_gather(vectors, axis, axis=1, tiled=True)
            products = [rows @ part for rows, part in zip(grams, whole, strict=True)]
            return coupling @ vectors + jnp.stack(products)

        blocks = [
            _own_block(_add_to_diagonal(rows, coupling[index, index], axis), axis)
            for index, rows in enumerate(grams)
        ]
        return conjugate_gradients(
            times,
            blocks,
            jnp.stack(targets),
            axis,
            tolerance=solver.tolerance,
            max_iterations=solver.max_iterations,
        )

    return _on_devices(local, solver, PartitionSpec(None, axis))(
        layers, targets, jnp.asarray(shift, targets[0].dtype)
    )


def _on_devices(local: Any, solver: RowSolver, value: PartitionSpec) -> Any:
    """A function of samples, right-hand sides and a shift, run on every device's own part."""
    rows, whole = PartitionSpec(solver.placement.axis), PartitionSpec()
    report: Any = Solution(*(value, whole, whole, whole))  # type: ignore[arg-type]
    return jax.shard_map(
        local,
        mesh=solver.placement.mesh,
        in_specs=(rows, rows, whole),
        out_specs=report,
        check_vma=False,
    )


def gram_rows(layer: LayerSignals, axis: str) -> Array:
    """This device's rows of K_l, shape (N S / k, N S); inside of ``jax.shard_map``.

    Signals go round the ring of devices, so that no device holds more than two parts of them. Half
    a round is enough: block (p, q) is sent on as block (q, p).
    """
    k, me = lax.axis_size(axis), lax.axis_index(axis)
    blocks = {0: layer.gram()}
    visitor = layer
    for distance in range(1, k // 2 + 1):
        visitor = lax.ppermute(visitor, axis, [((p + 1) % k, p) for p in range(k)])
        blocks[distance] = layer.gram(visitor)
        if 2 * distance != k:
            there = [(p, (p + distance) % k) for p in range(k)]
            blocks[k - distance] = lax.ppermute(blocks[distance].T, axis, there)
    # block d is that of device me + d
    by_device = jnp.roll(jnp.stack([blocks[distance] for distance in range(k)]), me, axis=0)
    return by_device.swapaxes(0, 1).reshape(blocks[0].shape[0], -1)


def _as_it_travels(layer: LayerSignals) -> LayerSignals:
    """Signals in the form whose products give the Gram matrix, so that it is made but once."""
    if isinstance(layer, SharedSignals) and not layer.pairs_are_cheaper():
        return layer.explicit()
    return layer


def _add_to_diagonal(rows: Array, shift: Array, axis: str) -> Array:
    own = jnp.arange(rows.shape[0])
    return rows.at[own, lax.axis_index(axis) * rows.shape[0] + own].add(shift)


def _own_block(rows: Array, axis: str) -> Array:
    m = rows.shape[0]
    return lax.dynamic_slice_in_dim(rows, lax.axis_index(axis) * m, m, 1)
