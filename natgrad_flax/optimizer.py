"""Natural-gradient descent as an optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.checks import check_batch, check_learning_rate, check_settings
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping
from natgrad_flax.fisher import FisherKind
from natgrad_flax.gradient import as_state, compute, leaf_names, prepare
from natgrad_flax.losses import Loss
from natgrad_flax.structures import Structure


class NaturalGradientState(NamedTuple):
    """State of ``natural_gradient_descent``."""

    steps: Array  # shape=(), dtype=int32; steps taken
    damping: Array  # shape=(), dtype=float32; the damping of the next step, adaptive or not
    key: Array  # a jax.random key; draws the targets of a Monte-Carlo Fisher


def natural_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    structure: Structure,
    loss: Loss,
    damping: float | optax.Schedule | RelativeDamping | LevenbergMarquardt = 0.0,
    fisher: FisherKind = "exact",
    mc_samples: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Natural-gradient descent: theta <- theta - eta G^{-1} dL (Karakida & Osawa 2020, Eq. 7).

    ``update`` needs the batch: ``tx.update(grads, state, params, module=model, x=x, y=y)``, or
    through ``nnx.Optimizer``: ``optimizer.update(model, grads, module=model, x=x, y=y)``. The
    natural gradient is a function of the batch, not of the incoming updates; these are taken only
    for their tree (inside ``jit`` computing them costs nothing, XLA drops it). So this
    transformation stands first in an ``optax.chain``; clipping, momentum and weight decay that
    follow act on the natural-gradient step. An ``optax.MultiSteps`` around it would average
    natural gradients.

    Args:
      learning_rate: eta, a number or a schedule over steps.
      structure: the Fisher approximation.
      loss: the loss.
      damping: rho in the 1/N convention: a number, a schedule over steps, relative to the Gram
        diagonal, or adapted by Levenberg-Marquardt.
      fisher: "exact", "mc" or "empirical".
      mc_samples: targets drawn a sample and step, for "mc".
      seed: of the drawn targets.

    Returns:
      An optax transformation with the extra arguments ``module`` (the model, or a copy of it, whose
      parameters are those of this step), ``x`` (N, M_0) and ``y`` (N, C).

    Raises:
      ValueError, TypeError: bad settings here, a bad batch in ``update``.
    """
    check_settings(structure, loss, fisher, damping, mc_samples)
    check_learning_rate(learning_rate)
    adaptive = damping if isinstance(damping, LevenbergMarquardt) else None

    def init(params: optax.Params) -> NaturalGradientState:
        del params
        fixed = damping if isinstance(damping, (int, float)) else 0.0
        start = adaptive.initial if adaptive else fixed
        return NaturalGradientState(
            jnp.zeros((), jnp.int32), jnp.asarray(start, jnp.float32), jax.random.key(seed)
        )

    def update(
        updates: optax.Updates,
        state: NaturalGradientState,
        params: optax.Params | None = None,
        *,
        module: nnx.Module | None = None,
        x: Array | None = None,
        y: Array | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        del extra
        if module is None or x is None or y is None:
            raise ValueError(
                "natural_gradient_descent needs the batch: pass module=model, x=x, y=y to update"
            )
        x, y = check_batch(module, x, y, loss)
        rho: Any = damping
        if adaptive:
            rho = state.damping
        elif callable(damping):
            rho = damping(state.steps)
        prepare(structure, module, x, y, loss, fisher, mc_samples, rho)
        key, draw = jax.random.split(state.key)
        solved, signals, residual = compute(
            module,
            x,
            y,
            structure=structure,
            loss=loss,
            damping=rho,
            fisher=fisher,
            key=draw,
            mc_samples=mc_samples,
        )
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        direction = as_state(updates, solved)
        step = jax.tree.map(lambda leaf: (-rate * leaf).astype(leaf.dtype), direction)
        next_damping = state.damping
        if adaptive:
            slope = _slope(signals, residual, solved)
            predicted = (-rate + rate**2 / 2) * slope
            before = loss(signals.outputs, y)
            actual = loss(moved(module, step)(x), y) - before
            next_damping = adaptive.adapt(state.damping, actual, predicted)
        elif callable(damping):
            next_damping = jnp.asarray(rho, jnp.float32)
        return step, NaturalGradientState(state.steps + 1, next_damping, key)

    return optax.GradientTransformationExtraArgs(init, update)


def _slope(signals: Any, residual: Any, solved: dict[Any, Any]) -> Array:
    """<gradient, natural gradient>."""
    total = jnp.zeros((), signals.outputs.dtype)
    for index, layer in enumerate(signals.layers):
        moved = layer.push_forward(solved[layer.path])
        total = total + jnp.sum(moved * residual.direction(layer, index))
    return total / signals.num_samples


def moved(model: nnx.Module, step: Any) -> nnx.Module:
    """A copy of the model one step further."""
    graphdef, state = nnx.split(model)
    leaves = {leaf_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(step)}

    def move(path: tuple[Any, ...], leaf: Array) -> Array:
        name = leaf_names(path)
        return leaf + leaves[name] if name in leaves else leaf

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(move, state))
