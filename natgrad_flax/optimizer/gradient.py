"""The natural gradient of a model on a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import own_promotion, solve_dtype
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import RelativeDamping, damping_as, is_zero
from natgrad_flax.linalg import full_products
from natgrad_flax.losses import Loss
from natgrad_flax.optimizer.checks import (
    check_fisher_batch,
    check_microbatches,
    check_needed_batch,
    check_one_damping,
    check_settings,
)
from natgrad_flax.optimizer.momentum import Momentum
from natgrad_flax.optimizer.preflight import preflight
from natgrad_flax.optimizer.trees import as_state, by_path, moved_by_gradient
from natgrad_flax.signals.base import LayerUpdate, layer_updates, named_updates
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import (
    FisherKind,
    check_key,
    fisher_signals,
    in_range,
    population_signals,
)
from natgrad_flax.signals.gradient import Gradient, ParameterGradient
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.microbatches import Passes, in_microbatches
from natgrad_flax.signals.plan import hashable_filter
from natgrad_flax.signals.recording import Path, outputs_of, with_fast_gradients
from natgrad_flax.structures import Structure

Damping = float | Array | RelativeDamping


@own_promotion()
def natural_gradient(
    model: nnx.Module,
    x: Any,
    y: Array | None,
    *,
    structure: Structure,
    loss: Loss,
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
) -> nnx.State:
    """G^{-1} dL, the natural gradient of the loss (Karakida & Osawa 2020, Eq. 7).

    Works eagerly (compiled once a shape) and inside ``jax.jit``, ``nnx.jit`` and ``lax.scan``.

    Args:
      model: any nnx module whose outputs for a sample do not depend on the other samples.
        ``ng.describe`` tells which formula serves which of its layers.
      x: inputs, an array (N, ...) of any dtype that the model takes, or a tree (dictionary, tuple,
        ...) of such arrays, which the model gets as its one argument.
      y: targets, shape (N, C).
      structure: the Fisher approximation.
      loss: the loss; its mean over the N samples is differentiated.
      damping: rho, added to the Fisher in the 1/N convention; 0 means the pseudo-inverse.
      fisher: "exact" (expectation over targets), "mc" (sampled targets) or "empirical".
      key: a jax.random key, for "mc".
      mc_samples: targets drawn a sample, for "mc".
      wrt: the parameters to move, as ``nnx.Optimizer`` takes it; the Fisher is that of these.
      fisher_x: inputs (N', ...) of a batch of its own for the Fisher, so that G is that of the
        population or of more samples than the gradient's; None for the Fisher at x.
      fisher_y: targets (N', C) of that batch, for "empirical".
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
    """
    wrt = hashable_filter(wrt)
    check_settings(structure, loss, fisher, damping)
    mc_samples = check_integer("mc_samples", mc_samples, 1)
    check_one_damping(damping)
    check_key(fisher, key)
    needed = gradient is None or (fisher == "empirical" and fisher_x is None)
    x, y = check_needed_batch(model, x, y, loss, needed)
    fisher_x, fisher_y = check_fisher_batch(model, fisher, x, y, fisher_x, fisher_y)
    microbatches = check_microbatches(microbatches, x, fisher_x)
    at = (x, y) if fisher_x is None else (fisher_x, fisher_y)
    if gradient is not None:
        wrt = moved_by_gradient(model, gradient, wrt)
    preflight(structure, model, *at, loss, fisher, mc_samples, damping, wrt)
    if check_samples:
        check_samples_alone(model, x)
    static = static_damping(damping)
    graphdef, state = nnx.split(model)
    updates = _compiled(
        state,
        x,
        y,
        None if static is not None else jnp.asarray(damping),
        key,
        fisher_x,
        fisher_y,
        gradient,
        graphdef=graphdef,
        structure=structure,
        loss=loss,
        fisher=fisher,
        mc_samples=mc_samples,
        static_damping=static,
        wrt=wrt,
        microbatches=microbatches,
    )
    return as_state(nnx.state(model, wrt) if gradient is None else gradient, updates)


class AtBatch(NamedTuple):
    """What adaptive damping asks of the batch.

    Attributes:
      outputs: f, shape (N, C); None where the gradient came from elsewhere.
      inner: the product of the gradient of the loss with the step that was found.
    """

    outputs: Array | None
    inner: Callable[[], Array]


def compute(
    model: nnx.Module,
    x: Any,
    y: Array | None,
    *,
    structure: Structure,
    loss: Loss,
    damping: Damping,
    fisher: FisherKind,
    key: Array | None,
    mc_samples: int,
    wrt: Any = nnx.Param,
    fisher_x: Any = None,
    fisher_y: Array | None = None,
    microbatches: int = 1,
    momentum: Momentum | None = None,
    gradient: dict[Path, Array] | None = None,
) -> tuple[tuple[LayerUpdate, ...], Signals, AtBatch]:
    """The natural gradient layer by layer, without checks; to be traced.

    The arguments are those of ``natural_gradient``, and the momentum, where there is one; the
    gradient is by the paths of the parameters.
    """
    settings: dict[str, Any] = {
        "loss": loss,
        "fisher": fisher,
        "key": key,
        "num_samples": mc_samples,
        "wrt": wrt,
        "microbatches": microbatches,
    }
    null: dict[str, Any] = {"loss": loss, "fisher": fisher, "damping": damping}
    right: Gradient
    if fisher_x is None and gradient is None:
        assert y is not None
        signals, residual = fisher_signals(model, x, y, **settings)
        signals, right = in_range(signals, residual, **null)
        outputs = signals.outputs
    else:
        at = fisher_targets(fisher, x, y, fisher_x, fisher_y)
        signals, _ = in_range(population_signals(model, *at, **settings), None, **null)
        outputs = signals.outputs
        if gradient is None:
            assert y is not None
            gradient, outputs = loss_gradient(
                model, x, y, loss=loss, wrt=wrt, microbatches=microbatches
            )
        right = ParameterGradient(layer_updates(signals.layers, gradient))
    with full_products():
        rho = resolve_damping(structure, signals, damping)
        if momentum is None:
            solved = structure.solve(signals, right, rho)
        else:
            solved = momentum.solve(structure, signals, right, rho)
    return solved, signals, AtBatch(outputs, lambda: right.inner(signals.layers, solved))


def fisher_targets(
    fisher: FisherKind, x: Array, y: Array | None, fisher_x: Array | None, fisher_y: Array | None
) -> tuple[Array, Array | None]:
    """The batch of a Fisher without a residual: targets for the empirical one alone."""
    if fisher_x is not None:
        return fisher_x, fisher_y
    return x, y if fisher == "empirical" else None


def loss_gradient(
    model: nnx.Module,
    x: Any,
    y: Array,
    *,
    loss: Loss,
    wrt: Any,
    microbatches: int = 1,
    passes: Passes = in_microbatches,
) -> tuple[dict[Path, Array], Array]:
    """J^T r / N by the paths of the parameters, and the outputs (N, C); plain backpropagation."""
    graphdef, chosen, rest = nnx.split(model, wrt, ...)  # type: ignore[misc]

    def run(first: Array | int, x: Any, y: Array) -> tuple[dict[Path, Array], Array]:
        del first

        def forward(state: Any) -> Array:
            return outputs_of(with_fast_gradients(nnx.merge(graphdef, state, rest)), x)

        computed, backward = jax.vjp(forward, chosen)
        leaves = jax.tree.leaves(chosen)
        dtype = solve_dtype(computed.dtype, *(leaf.dtype for leaf in leaves))
        outputs = computed.astype(dtype)
        residual = loss.residual(outputs, y.astype(dtype)) / len(y)
        (gradient,) = backward(residual.astype(computed.dtype))
        return by_path(jax.tree.map(lambda leaf: leaf.astype(dtype), gradient)), outputs

    return passes(run, (x, y), microbatches)


def static_damping(damping: Damping) -> float | RelativeDamping | None:
    """What of a damping decides how a step is compiled; None for a number that is an argument."""
    if isinstance(damping, RelativeDamping):
        return damping
    return 0.0 if is_zero(damping) else None


def resolve_damping(structure: Structure, signals: Signals, damping: Damping) -> Array | float:
    """The damping in the 1/N convention; a relative one is scaled by the structure's Gram."""
    if isinstance(damping, RelativeDamping):
        damping = damping.times(structure.damping_scale(signals))
    return damping_as(damping, signals.outputs.dtype)


@partial(
    jax.jit,
    static_argnames=(
        *("structure", "loss", "fisher", "mc_samples", "static_damping", "wrt", "microbatches"),
    ),
)
def _compiled(
    state: Any,
    x: Any,
    y: Array | None,
    damping: Array | None,
    key: Array | None,
    fisher_x: Any,
    fisher_y: Array | None,
    gradient: Any,
    *,
    graphdef: Any,
    structure: Structure,
    loss: Loss,
    fisher: FisherKind,
    mc_samples: int,
    static_damping: float | RelativeDamping | None,
    wrt: Any,
    microbatches: int,
) -> dict[Path, dict[str, Array]]:
    chosen = static_damping if damping is None else damping
    assert chosen is not None
    solved, signals, _ = compute(
        nnx.merge(graphdef, state),
        x,
        y,
        structure=structure,
        loss=loss,
        damping=chosen,
        fisher=fisher,
        key=key,
        mc_samples=mc_samples,
        wrt=wrt,
        fisher_x=fisher_x,
        fisher_y=fisher_y,
        microbatches=microbatches,
        gradient=None if gradient is None else by_path(gradient),
    )
    return named_updates(signals.layers, solved)
