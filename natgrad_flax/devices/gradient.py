"""The natural gradient of a batch that lies on several devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, Sharding

from natgrad_flax.arguments.arrays import batch_size, own_promotion
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import RelativeDamping
from natgrad_flax.devices.linear_solve import Solution
from natgrad_flax.devices.passes import over_devices
from natgrad_flax.devices.placement import (
    check_automatic,
    check_divisible,
    local_model,
    local_part,
    on_mesh,
)
from natgrad_flax.devices.structure import Sharded, SolverName, or_nan
from natgrad_flax.linalg import full_products
from natgrad_flax.losses import Loss
from natgrad_flax.optimizer.checks import (
    check_fisher_batch,
    check_microbatches,
    check_needed_batch,
    check_one_damping,
    check_settings,
    is_concrete,
)
from natgrad_flax.optimizer.gradient import (
    Damping,
    fisher_targets,
    loss_gradient,
    resolve_damping,
    static_damping,
)
from natgrad_flax.optimizer.preflight import preflight
from natgrad_flax.optimizer.trees import as_state, by_path, moved_by_gradient
from natgrad_flax.signals.base import LayerUpdate, layer_updates, named_updates
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import FisherKind, check_key, in_range, microbatch_signals, sampler
from natgrad_flax.signals.gradient import Gradient, ParameterGradient
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.plan import hashable_filter
from natgrad_flax.signals.recording import Path
from natgrad_flax.structures import Structure


class UnsolvedError(RuntimeError):
    """A system with sharded rows was not solved: not definite, or the tolerance not reached."""


@own_promotion()
def sharded_natural_gradient(
    model: nnx.Module,
    x: Any,
    y: Array | None,
    *,
    structure: Structure,
    loss: Loss,
    mesh: Mesh,
    axis: str = "data",
    damping: Damping = 0.0,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    mc_samples: int = 1,
    wrt: Any = nnx.Param,
    fisher_x: Any = None,
    fisher_y: Array | None = None,
    microbatches: int = 1,
    check_samples: bool = True,
    gradient: Any = None,
    solver: SolverName = "auto",
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> nnx.State:
    """``natural_gradient`` with the batch sharded over one axis of a mesh.

    The result is that of one device, to rounding: targets of a Monte-Carlo Fisher are the same,
    too. Each device runs the model on its own samples; what follows is partitioned as ``Sharded``
    says. Parameters may be sharded over other axes of the mesh; each update lies where its
    parameter does. It works eagerly and inside ``jax.jit``, on one process and on several; on
    several, ``x`` and ``y`` come from ``shard_batch``, and every process makes the same call.

    Args:
      model: the model; parameters that are not on the mesh are copied to all of its devices.
      x: inputs, shape (N, ...), on the mesh or not.
      y: targets, shape (N, C).
      structure: the Fisher approximation.
      loss: the loss.
      mesh: the devices.
      axis: the mesh axis over which samples are sharded; its size must divide N.
      damping: as in ``natural_gradient``.
      fisher: as in ``natural_gradient``.
      key: as in ``natural_gradient``.
      mc_samples: as in ``natural_gradient``.
      wrt: as in ``natural_gradient``.
      fisher_x: as in ``natural_gradient``, sharded like x.
      fisher_y: as in ``natural_gradient``.
      microbatches: parts of each device's samples, one after the other.
      check_samples: as in ``natural_gradient``, on one process.
      gradient: as in ``natural_gradient``: already the mean over the samples of all devices.
      solver: as in ``Sharded``.
      tolerance: as in ``Sharded``.
      max_iterations: as in ``Sharded``.

    Returns:
      The update with the tree of ``nnx.state(model, wrt)``.

    Raises:
      ValueError, TypeError: before any work, as ``natural_gradient`` and ``Sharded``; a batch that
        cannot be dealt out, or a structure that this solver does not serve.
      UnsolvedError: a system with sharded rows is not positive definite, or conjugate gradients end
        above the tolerance. Inside ``jax.jit`` the update is NaN instead.
    """
    sharded = Sharded(structure, mesh, axis, solver, tolerance, max_iterations)
    placement = sharded.placement
    check_automatic(*jax.tree.leaves((x, y)))
    wrt = hashable_filter(wrt)
    check_settings(structure, loss, fisher, damping)
    mc_samples = check_integer("mc_samples", mc_samples, 1)
    microbatches = check_integer("microbatches", microbatches, 1)
    check_one_damping(damping)
    check_key(fisher, key)
    on_this_process = local_model(model)
    needed = gradient is None or (fisher == "empirical" and fisher_x is None)
    own = jax.tree.map(local_part, (x, y, fisher_x, fisher_y))
    seen = check_needed_batch(on_this_process, own[0], own[1], loss, needed)
    if gradient is not None:
        wrt = moved_by_gradient(model, gradient, wrt)
    seen_by_fisher = check_fisher_batch(on_this_process, fisher, *seen, own[2], own[3])
    if jax.process_count() == 1:
        (x, y), (fisher_x, fisher_y) = seen, seen_by_fisher
    for batch in (x, fisher_x):
        if batch is not None:
            check_divisible(placement, batch_size(batch))
            check_microbatches(microbatches, jnp.zeros(batch_size(batch) // placement.size))
    graphdef, state = nnx.split(model)
    moved = on_mesh(placement, state, placement.whole)
    y = y if needed else None
    at = (x, y) if fisher_x is None else (fisher_x, fisher_y)
    inputs, targets = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(np.shape(array), jnp.result_type(array)), at
    )
    on_devices = nnx.merge(graphdef, moved)
    preflight(sharded, on_devices, inputs, targets, loss, fisher, mc_samples, damping, wrt)
    if check_samples:
        check_samples_alone(on_devices, on_mesh(placement, x, placement.rows))
    static = static_damping(damping)
    updates, solution = _compiled(
        moved,
        on_mesh(placement, (x, y, fisher_x, fisher_y), placement.rows),
        on_mesh(
            placement,
            (None if static is not None else jnp.asarray(damping), key, gradient),
            placement.whole,
        ),
        graphdef=graphdef,
        structure=sharded,
        loss=loss,
        fisher=fisher,
        mc_samples=mc_samples,
        static_damping=static,
        wrt=wrt,
        microbatches=microbatches,
        shardings=_shardings(moved),
    )
    solved = solution is None or not is_concrete(solution.converged) or solution.converged
    if not bool(solved):
        raise UnsolvedError(_why(solution, sharded))
    return as_state(nnx.state(model, wrt) if gradient is None else gradient, updates)


def compute_on_devices(
    model: nnx.Module,
    x: Any,
    y: Array | None,
    *,
    structure: Sharded,
    loss: Loss,
    damping: Damping,
    fisher: FisherKind,
    key: Array | None,
    mc_samples: int,
    wrt: Any,
    fisher_x: Any,
    fisher_y: Array | None,
    microbatches: int,
    gradient: dict[Path, Array] | None = None,
) -> tuple[tuple[LayerUpdate, ...], Signals, Solution | None]:
    """The natural gradient layer by layer, without checks; to be traced.

    The arguments are those of ``sharded_natural_gradient``.

    Returns:
      The updates, the signals of the Fisher, and how the solves with sharded rows went.
    """
    placement = structure.placement
    passes: dict[str, Any] = {"loss": loss, "fisher": fisher, "wrt": wrt}
    given = gradient is not None or fisher_x is not None
    at = fisher_targets(fisher, x, y, fisher_x, fisher_y) if given else (x, y)
    draw = sampler(loss, key, mc_samples, batch_size(at[0]))

    def run(first: Array | int, x: Any, y: Array | None = None) -> tuple[tuple[()], Any]:
        return (), microbatch_signals(model, x, y, first, draw=draw, **passes)

    over = partial(over_devices, placement=placement)
    arrays = tuple(part for part in at if part is not None)
    _, (signals, residual) = over(run, arrays, microbatches)
    signals, residual = in_range(signals, residual, loss=loss, fisher=fisher, damping=damping)
    right: Gradient = residual
    if given:
        if gradient is None:
            assert y is not None
            gradient, _ = loss_gradient(
                model, x, y, loss=loss, wrt=wrt, microbatches=microbatches, passes=over
            )
        right = ParameterGradient(layer_updates(signals.layers, gradient))
    with full_products():
        rho = resolve_damping(structure, signals, damping)
        solved, solution = structure.solve_and_report(signals, right, rho)
    return or_nan(solved, solution), signals, solution


@partial(
    jax.jit,
    static_argnames=(
        *("structure", "loss", "fisher", "mc_samples", "static_damping", "wrt"),
        *("microbatches", "shardings"),
    ),
)
def _compiled(
    state: Any,
    batches: tuple[Any, Array | None, Any, Array | None],
    single: tuple[Array | None, Array | None, Any],
    *,
    graphdef: Any,
    structure: Sharded,
    static_damping: float | RelativeDamping | None,
    shardings: tuple[tuple[Path, Sharding], ...],
    **settings: Any,
) -> tuple[dict[Path, dict[str, Array]], Solution | None]:
    placement = structure.placement
    batches = lax.with_sharding_constraint(batches, placement.rows)
    x, y, fisher_x, fisher_y = batches
    damping, key, gradient = single
    chosen = static_damping if damping is None else damping
    assert chosen is not None
    solved, signals, solution = compute_on_devices(
        nnx.merge(graphdef, state),
        x,
        y,
        structure=structure,
        damping=chosen,
        key=key,
        fisher_x=fisher_x,
        fisher_y=fisher_y,
        gradient=None if gradient is None else by_path(gradient),
        **settings,
    )
    where = dict(shardings)
    placed = {
        path: {
            name: lax.with_sharding_constraint(leaf, where.get((*path, name), placement.whole))
            for name, leaf in layer.items()
        }
        for path, layer in named_updates(signals.layers, solved).items()
    }
    if solution is None:
        return placed, None
    report = solution._replace(value=jnp.zeros(()))
    return placed, lax.with_sharding_constraint(report, placement.whole)


def _shardings(state: Any) -> tuple[tuple[Path, Sharding], ...]:
    """Where concrete parameters lie, by path."""
    return tuple(
        (path, leaf.sharding) for path, leaf in by_path(state).items() if is_concrete(leaf)
    )


def _why(solution: Solution, structure: Sharded) -> str:
    if int(solution.iterations) == 0:
        return (
            "a Gram matrix is not positive definite in this precision, so its Cholesky "
            'factorisation failed: raise the damping, or use solver="replicated", which falls '
            "back to the pseudo-inverse"
        )
    return (
        f"conjugate gradients ended after {int(solution.iterations)} iterations (at most "
        f"{structure.max_iterations}) at a relative residual of {float(solution.residual):.2e}, "
        f"above the tolerance of {structure.tolerance:.2e}: raise the damping, max_iterations or "
        'the tolerance, or use solver="cholesky"'
    )
