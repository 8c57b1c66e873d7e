"""The natural gradient of a model on a batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import own_promotion, solve_dtype
from natgrad_flax.damping import RelativeDamping, damping_as, is_zero
from natgrad_flax.linalg.dense import full_products
from natgrad_flax.losses import LossLike
from natgrad_flax.losses.by_head import output_terms
from natgrad_flax.losses.targets import relative
from natgrad_flax.optimizer.checks import (
    check_arrays,
    check_microbatches,
    check_one_damping,
    check_settings,
)
from natgrad_flax.optimizer.momentum import Momentum
from natgrad_flax.optimizer.preflight import preflight
from natgrad_flax.optimizer.trees import as_state, by_path, moved_by_gradient
from natgrad_flax.signals.base import LayerUpdate, layer_updates, named_updates
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import Batch, Fisher, FisherKind, check_key
from natgrad_flax.signals.gradient import Gradient, ParameterGradient
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.microbatches import Passes, in_microbatches
from natgrad_flax.signals.model import Path, outputs_of, with_fast_gradients
from natgrad_flax.structures import Structure
from natgrad_flax.structures.stacked import Stacked, stacked, stacking_of

Damping = float | Array | RelativeDamping


@own_promotion()
def natural_gradient(
    model: nnx.Module,
    x: Any,
    y: Any,
    *,
    structure: Structure,
    loss: LossLike,
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
) -> nnx.State:
    """G^{-1} dL, the natural gradient of the loss (Karakida & Osawa 2020, Eq. 7).

    Works eagerly (compiled once a shape) and inside ``jax.jit``, ``nnx.jit`` and ``lax.scan``.

    Args:
      model: any nnx module whose outputs for a sample do not depend on the other samples.
        ``ng.describe`` tells which formula serves which of its layers.
      x: inputs, an array (N, ...) of any dtype that the model takes, or a tree (dictionary, tuple,
        ...) of such arrays, which the model gets as its one argument.
      y: targets, shape (N, C), or (N, ..., C) where the model returns outputs with positions; or
        class numbers, integers (N, ...), where the loss takes them. Values that it does not take
        are refused where they are known, so not inside of ``jit``.
      structure: the Fisher approximation.
      loss: the loss; its mean over the N samples, and over their positions, is differentiated. For
        a model that returns a dictionary or a tuple of outputs a dictionary or a tuple of losses,
        or ``ng.Heads`` of them; y and weights then have the same structure.
      damping: rho, added to the Fisher in the 1/N convention; 0 means the pseudo-inverse.
      fisher: "exact" (expectation over targets), "mc" (sampled targets), "empirical" (the data's
        residuals) or "improved" (those over their norms; Wu et al. 2024).
      key: a jax.random key, for "mc".
      mc_samples: targets drawn a sample, for "mc".
      wrt: the parameters to move, as ``nnx.Optimizer`` takes it; the Fisher is that of these.
      fisher_x: inputs (N', ...) of a batch of its own for the Fisher, so that G is that of the
        population or of more samples than the gradient's; None for the Fisher at x.
      fisher_y: targets (N', C) of that batch, for "empirical" and "improved".
      weights: w, 0 or positive, shape (N,) or one for each position, (N, ...): the loss is
        sum w l / sum w, and the Fisher that of the same mean. A mask is 0 and 1; targets of weight
        0 may be anything.
      fisher_weights: weights of the batch for the Fisher.
      microbatches: parts, a divisor of N and of N', in which the model runs one after the other.
        Only one part's activations are held; the result is that of the whole batch.
      check_samples: whether to try, at the first batch of a shape whose values are known, that the
        model makes of a batch what it makes of its samples one by one. Inside ``jit`` nothing can
        be tried. Without it the result is that of the samples one by one.
      gradient: g, a tree like ``nnx.state(model, wrt)``, for G^{-1} g: the gradient of a loss of
        your own, with penalties, masks, dropout or batch statistics in it. ``loss`` then says which
        Fisher, and y may be None where that is not the empirical one. With damping 0 what of g lies
        outside of the range of G is lost.

    Returns:
      The update with the tree of ``nnx.state(model, wrt)``, or of the gradient where there is one;
      theta - eta * update is the step.

    Raises:
      ValueError, TypeError: bad settings or a bad batch, before any work.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, loss = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), ng.MeanSquaredError()
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=ng.KFAC(), loss=loss, damping=0.01
      ... )
      >>> before, params = loss(model(x), y), nnx.state(model, nnx.Param)
      >>> nnx.update(model, jax.tree.map(lambda p, d: p - 0.1 * d, params, step))
      >>> bool(loss(model(x), y) < before)
      True
    """
    which = check_settings(structure, loss, fisher, damping, mc_samples, wrt)
    check_one_damping(damping)
    check_key(fisher, key)
    batch = check_arrays(
        model, which, Batch(x, y, weights, fisher_x, fisher_y, fisher_weights, key, gradient)
    )
    which = replace(which, microbatches=check_microbatches(microbatches, batch.x, batch.fisher_x))
    if gradient is not None:
        which = replace(which, wrt=moved_by_gradient(model, gradient, which.wrt))
        batch = batch._replace(gradient=by_path(gradient))
    module, which = which.bound(model, batch.x)
    preflight(structure, module, which, batch, damping)
    if check_samples:
        check_samples_alone(module, batch.x)
    static = static_damping(damping)
    graphdef, state = nnx.split(module)
    updates = _compiled(
        state,
        batch,
        None if static is not None else jnp.asarray(damping),
        graphdef=graphdef,
        structure=structure,
        fisher=which,
        static_damping=static,
    )
    return as_state(nnx.state(model, which.wrt) if gradient is None else gradient, updates)


class Solved(NamedTuple):
    """A natural gradient, and what it was made of.

    Attributes:
      updates: one a layer.
      signals: of the Fisher.
      gradient: what was solved for.
      outputs: f at x, shape (N, ..., C); those of the Fisher's batch where the gradient was given.
      report: how the structure's solve went, None where it has nothing to say.
    """

    updates: tuple[LayerUpdate, ...]
    signals: Signals
    gradient: Gradient
    outputs: Array
    report: Any

    def inner(self) -> Array:
        """The inner product of the gradient with the step, shape ()."""
        return self.gradient.inner(self.signals.layers, self.updates)

    def named(self) -> dict[Path, dict[str, Array]]:
        """The updates by the paths of the layers, in the shapes of the parameters."""
        return named_updates(self.signals.layers, self.updates)


def compute(
    model: nnx.Module,
    batch: Batch,
    damping: Damping,
    *,
    structure: Structure,
    fisher: Fisher,
    momentum: Momentum | None = None,
) -> Solved:
    """The natural gradient layer by layer, without checks; to be traced.

    Args:
      model: the model.
      batch: the arrays of this step.
      damping: as in ``natural_gradient``.
      structure: the Fisher approximation, on one device or on several.
      fisher: which Fisher.
      momentum: the step before, where it is taken along.
    """
    # the step before is projected layer by layer
    fisher = replace(fisher, stacking="none" if momentum else stacking_of(structure))
    signals, residual = fisher.signals(model, batch, structure.passes)
    signals, residual = fisher.in_range(signals, residual, damping)
    solver = stacked(structure, signals)
    outputs, gradient = signals.outputs, batch.gradient
    right: Gradient
    if gradient is None and batch.fisher_x is None:
        assert residual is not None
        right = residual
    else:
        if gradient is None:
            gradient, outputs = loss_gradient(model, batch, fisher, structure.passes)
        right = ParameterGradient(layer_updates(signals.layers, gradient))
    with full_products():
        rho = resolve_damping(solver, signals, damping)
        if momentum is None:
            updates, report = solver.solve_and_report(signals, right, rho)
        else:
            updates, report = momentum.solve(structure, signals, right, rho), None
    return Solved(updates, signals, right, outputs, report)


def loss_gradient(
    model: nnx.Module, batch: Batch, fisher: Fisher, passes: Passes = in_microbatches
) -> tuple[dict[Path, Array], Array]:
    """J^T r / N at x and y by the paths of the parameters, and the outputs (N, ..., C).

    Args:
      model: the model.
      batch: the arrays of this step.
      fisher: whose loss, parameters and microbatches count.
      passes: how the batch runs through the model.
    """
    graphdef, chosen, rest = nnx.split(model, fisher.wrt, ...)  # type: ignore[misc]

    def run(first: Array | int, x: Any, y: Any, weights: Any) -> tuple[dict[Path, Array], Array]:
        del first

        def forward(state: Any) -> Array:
            return outputs_of(with_fast_gradients(nnx.merge(graphdef, state, rest)), x)

        computed, backward = jax.vjp(forward, chosen)
        leaves = jax.tree.leaves(chosen)
        dtype = solve_dtype(computed.dtype, *(leaf.dtype for leaf in leaves))
        outputs = computed.astype(dtype)
        residual = output_terms(fisher.loss, outputs, y, weights).residual() / len(outputs)
        (gradient,) = backward(residual.astype(computed.dtype))
        return by_path(jax.tree.map(lambda leaf: leaf.astype(dtype), gradient)), outputs

    assert batch.y is not None
    weights = jax.tree.map(relative, batch.weights)
    return passes(run, (batch.x, batch.y, weights), fisher.microbatches)


def static_damping(damping: Damping) -> float | RelativeDamping | None:
    """What of a damping decides how a step is compiled; None for a number that is an argument."""
    if isinstance(damping, RelativeDamping):
        return damping
    return 0.0 if is_zero(damping) else None


def resolve_damping(
    structure: Structure | Stacked, signals: Signals, damping: Damping
) -> Array | float:
    """The damping in the 1/N convention; a relative one is scaled by the structure's Gram."""
    if isinstance(damping, RelativeDamping):
        damping = damping.times(structure.damping_scale(signals))
    return damping_as(damping, signals.outputs.dtype)


@partial(jax.jit, static_argnames=("structure", "fisher", "static_damping"))
def _compiled(
    state: Any,
    batch: Batch,
    damping: Array | None,
    *,
    graphdef: Any,
    structure: Structure,
    fisher: Fisher,
    static_damping: float | RelativeDamping | None,
) -> dict[Path, dict[str, Array]]:
    chosen = static_damping if damping is None else damping
    assert chosen is not None
    model = nnx.merge(graphdef, state)
    return compute(model, batch, chosen, structure=structure, fisher=fisher).named()
