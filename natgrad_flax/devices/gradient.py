"""The natural gradient of a batch that lies on several devices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, Sharding

from natgrad_flax.arguments.arrays import batch_size, is_concrete, own_promotion
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import RelativeDamping
from natgrad_flax.devices.linear_solve import Solution
from natgrad_flax.devices.placement import (
    check_automatic,
    check_divisible,
    local_model,
    local_part,
    on_mesh,
)
from natgrad_flax.devices.structure import Sharded, SolverName
from natgrad_flax.losses import LossLike
from natgrad_flax.losses.by_head import ordered_targets, ordered_weights
from natgrad_flax.optimizer.checks import (
    check_arrays,
    check_microbatches,
    check_one_damping,
    check_settings,
)
from natgrad_flax.optimizer.gradient import Damping, compute, static_damping
from natgrad_flax.optimizer.preflight import check_known_numbers, preflight
from natgrad_flax.optimizer.trees import as_state, by_path, moved_by_gradient
from natgrad_flax.signals.fisher import Batch, Fisher, FisherKind, check_key
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.model import Path
from natgrad_flax.structures import Structure


class UnsolvedError(RuntimeError):
    """A system with sharded rows was not solved: not definite, or the tolerance not reached.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> from natgrad_flax.devices import UnsolvedError, sharded_natural_gradient
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.ones((4, 1))
      >>> x = jnp.ones((4, 4))  # the same sample four times, and no damping
      >>> options = {
      ...     "structure": ng.Exact(),
      ...     "loss": ng.MeanSquaredError(),
      ...     "solver": "cholesky",
      ... }
      >>> try:
      ...     step = sharded_natural_gradient(model, x, y, mesh=mesh, **options)
      ... except UnsolvedError as error:
      ...     print(str(error).split(",")[0])
      a Gram matrix is not positive definite in this precision
    """


@own_promotion()
def sharded_natural_gradient(
    model: nnx.Module,
    x: Any,
    y: Any,
    *,
    structure: Structure,
    loss: LossLike,
    mesh: Mesh,
    axis: str = "data",
    damping: Damping = 0.0,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    mc_samples: int = 1,
    wrt: Any = nnx.Param,
    fisher_x: Any = None,
    fisher_y: Any = None,
    weights: Any = None,
    fisher_weights: Any = None,
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
      weights: as in ``natural_gradient``, sharded like x; the mean is over all devices.
      fisher_weights: as in ``natural_gradient``.
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

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> from natgrad_flax.devices import sharded_natural_gradient
      >>> # or more of them
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {
      ...     "structure": ng.KFAC(),
      ...     "loss": ng.MeanSquaredError(),
      ...     "damping": 1e-3,
      ... }
      >>> step = sharded_natural_gradient(model, x, y, mesh=mesh, **options)
      >>> step["layers"][0]["kernel"].shape
      (4, 8)
    """
    sharded = Sharded(structure, mesh, axis, solver, tolerance, max_iterations)
    placement = sharded.placement
    check_automatic(*jax.tree.leaves((x, y)))
    which = check_settings(structure, loss, fisher, damping, mc_samples, wrt)
    microbatches = check_integer("microbatches", microbatches, 1)
    which = replace(which, microbatches=microbatches)
    check_one_damping(damping)
    check_key(fisher, key)
    batch = Batch(x, y, weights, fisher_x, fisher_y, fisher_weights, key, gradient)
    own = batch.map_samples(partial(jax.tree.map, local_part))
    checked = check_arrays(local_model(model), which, own)
    if gradient is not None:
        which = replace(which, wrt=moved_by_gradient(model, gradient, which.wrt))
        batch = batch._replace(gradient=by_path(gradient))
    if jax.process_count() == 1:
        batch = checked._replace(gradient=batch.gradient)
    else:
        batch = _ordered(batch, which)
    for inputs in (batch.x, batch.fisher_x):
        if inputs is not None:
            check_divisible(placement, batch_size(inputs))
            check_microbatches(microbatches, jnp.zeros(batch_size(inputs) // placement.size))
    over_devices = partial(on_mesh, placement, default=placement.rows)
    module, which = which.bound(model, batch.x)
    graphdef, state = nnx.split(module)
    moved = on_mesh(placement, state, placement.whole)
    shapes = jax.eval_shape(lambda arrays: arrays, batch)
    on_devices = nnx.merge(graphdef, moved)
    signals = preflight(sharded, on_devices, which, shapes, damping)
    check_known_numbers(local_model(module), which.loss, checked, signals)
    if check_samples:
        check_samples_alone(on_devices, over_devices(batch.x))
    static = static_damping(damping)
    updates, solution = _compiled(
        moved,
        on_mesh(placement, batch.map_samples(over_devices), placement.whole),
        on_mesh(placement, None if static is not None else jnp.asarray(damping), placement.whole),
        graphdef=graphdef,
        structure=sharded,
        fisher=which,
        static_damping=static,
        shardings=_shardings(moved),
    )
    solved = solution is None or not is_concrete(solution.converged) or solution.converged
    if not bool(solved):
        raise UnsolvedError(_why(solution, sharded))
    return as_state(nnx.state(model, which.wrt) if gradient is None else gradient, updates)


@partial(jax.jit, static_argnames=("structure", "fisher", "static_damping", "shardings"))
def _compiled(
    state: Any,
    batch: Batch,
    damping: Array | None,
    *,
    graphdef: Any,
    structure: Sharded,
    fisher: Fisher,
    static_damping: float | RelativeDamping | None,
    shardings: tuple[tuple[Path, Sharding], ...],
) -> tuple[dict[Path, dict[str, Array]], Solution | None]:
    placement = structure.placement
    chosen = static_damping if damping is None else damping
    assert chosen is not None
    batch = batch.map_samples(lambda tree: lax.with_sharding_constraint(tree, placement.rows))
    found = compute(nnx.merge(graphdef, state), batch, chosen, structure=structure, fisher=fisher)
    where = dict(shardings)
    placed = {
        path: {
            name: lax.with_sharding_constraint(leaf, where.get((*path, name), placement.whole))
            for name, leaf in layer.items()
        }
        for path, layer in found.named().items()
    }
    if found.report is None:
        return placed, None
    report = found.report._replace(value=jnp.zeros(()))
    return placed, lax.with_sharding_constraint(report, placement.whole)


def _shardings(state: Any) -> tuple[tuple[Path, Sharding], ...]:
    """Where concrete parameters lie, by path."""
    return tuple(
        (path, leaf.sharding) for path, leaf in by_path(state).items() if is_concrete(leaf)
    )


def _ordered(batch: Batch, fisher: Fisher) -> Batch:
    """The arrays of all processes as a step takes them; each has checked its own."""
    return batch._replace(
        y=ordered_targets(fisher.loss, batch.y, "y") if fisher.needs_targets(batch) else None,
        weights=ordered_weights(fisher.loss, batch.weights, "weights"),
        fisher_y=ordered_targets(fisher.loss, batch.fisher_y, "fisher_y"),
        fisher_weights=ordered_weights(fisher.loss, batch.fisher_weights, "fisher_weights"),
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
