"""Operators of sample space whose Gram matrices stay sharded by rows.

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
from natgrad_flax.linalg.dense import add_diagonal
from natgrad_flax.operators.base import Blocks, Operator
from natgrad_flax.operators.coupled import Coupled
from natgrad_flax.operators.coupling import mix
from natgrad_flax.operators.low_rank import LowRank
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.gradient import Gradient
from natgrad_flax.signals.shared import SharedSignals


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


def rows_side(operator: Operator) -> int:
    """The side of the largest system that can be solved with sharded rows, 0 where none can.

    It is definite and in sample space.
    """
    if isinstance(operator, Blocks):
        # blocks that are smaller in parameter space are solved there, by all
        sides = [
            block.num_rows
            for block in operator.blocks
            if isinstance(block, LowRank) and block.space != "parameter"
        ]
        return max(sides) if len(sides) == len(operator.blocks) else 0
    if not isinstance(operator, (LowRank, Coupled)) or operator.in_parameters:
        return 0
    if isinstance(operator, Coupled) and np.linalg.eigvalsh(operator.sigma)[0] <= 1e-9:
        return 0
    return operator.num_rows


def solve_rows(
    operator: Operator, gradient: Gradient, damping: Array | float, solver: RowSolver
) -> tuple[tuple[LayerUpdate, ...], Solution]:
    """What ``operator.solve`` returns, and how the solves went.

    Args:
      operator: one that has a ``rows_side``, of the whole batch, samples sharded.
      gradient: what is solved for.
      damping: as in ``Operator.solve``.
      solver: how.

    Raises:
      ValueError: no damping for a vector that may lie outside of the span of the batch.
    """
    inside, zero = gradient.coefficients is not None, is_zero(damping)
    if zero and not inside:
        raise ValueError(
            f'solver="{solver.name}" needs a positive damping where the Fisher has a batch of its '
            'own, or use solver="replicated"'
        )
    if isinstance(operator, Blocks):
        return _solve_blocks(operator, gradient, damping, solver)
    assert isinstance(operator, (LowRank, Coupled))
    layers, shift = operator.layers, operator.num_samples * damping
    groups: tuple[tuple[LayerSignals, ...], ...]
    if isinstance(operator, LowRank):
        groups, coupling, targets = (layers,), np.eye(1), [gradient.target(layers)]
    else:
        groups, coupling = tuple((layer,) for layer in layers), np.linalg.inv(operator.sigma)
        targets = gradient.targets(layers)
        if inside:
            targets = mix(coupling, targets)
    solution = _solve_groups(groups, coupling, jnp.stack(targets), shift, solver, shifted=not zero)
    duals = list(solution.value) * (len(layers) // len(groups))
    return gradient.updates(layers, duals, shift), solution


def _solve_blocks(
    operator: Blocks, gradient: Gradient, damping: Array | float, solver: RowSolver
) -> tuple[tuple[LayerUpdate, ...], Solution]:
    """One system a layer."""
    updates: list[LayerUpdate] = []
    solutions = []
    rhos = per_layer(damping, len(operator.blocks))
    for index, (block, rho) in enumerate(zip(operator.blocks, rhos, strict=True)):
        part = gradient.of_layer(index)
        assert isinstance(block, LowRank)
        if block.in_parameters:
            updates += block.solve(part, rho)
            continue
        solved, solution = solve_rows(block, part, rho, solver)
        updates += solved
        solutions.append(solution)
    worst = Solution(
        jnp.zeros(()),
        jnp.all(jnp.stack([s.converged for s in solutions] or [jnp.array(True)])),
        jnp.max(jnp.stack([s.iterations for s in solutions] or [jnp.array(0)])),
        jnp.max(jnp.stack([s.residual for s in solutions] or [jnp.array(0.0)])),
    )
    return tuple(updates), worst


def _solve_groups(
    groups: tuple[tuple[LayerSignals, ...], ...],
    coupling: np.ndarray,
    targets: Array,
    shift: Array | float,
    solver: RowSolver,
    *,
    shifted: bool,
) -> Solution:
    """(s C (x) I + blockdiag(K_1, ..., K_G)) v = t, where K_g is the sum over layers of a group.

    Args:
      groups: the signals.
      coupling: C, shape (G, G).
      targets: t, shape (G, N S); so is v.
      shift: s.
      solver: by a factorisation of one group only.
      shifted: whether s is other than 0.
    """
    axis = solver.placement.axis
    groups = tuple(tuple(map(_as_it_travels, group)) for group in groups)

    def local(groups: Any, targets: Array, shift: Array) -> Solution:
        parts = [[gram_rows(layer, axis) for layer in group] for group in groups]
        grams = [sum(rows[1:], start=rows[0]) for rows in parts]
        scaled = shift * jnp.asarray(coupling, targets.dtype)
        if solver.name == "cholesky":
            rows = _add_to_diagonal(grams[0], scaled[0, 0], axis)
            found = cholesky_solve(rows, targets[0], axis, shifted=shifted)
            return found._replace(value=found.value[None])

        def times(vectors: Array) -> Array:
            whole = lax.all_gather(vectors, axis, axis=1, tiled=True)
            products = [rows @ part for rows, part in zip(grams, whole, strict=True)]
            return scaled @ vectors + jnp.stack(products)

        return conjugate_gradients(
            times,
            [add_diagonal(_own_block(g, axis), scaled[i, i]) for i, g in enumerate(grams)],
            targets,
            axis,
            tolerance=solver.tolerance,
            max_iterations=solver.max_iterations,
        )

    rows, columns, whole = PartitionSpec(axis), PartitionSpec(None, axis), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=solver.placement.mesh,
        in_specs=(rows, columns, whole),
        out_specs=Solution(columns, whole, whole, whole),  # type: ignore[arg-type]
        check_vma=False,
    )(groups, targets, jnp.asarray(shift, targets.dtype))


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
