"""Natural-gradient descent as an optax transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.checks import check_learning_rate, check_settings
from natgrad_flax.fisher import FisherKind
from natgrad_flax.gradient import compute, prepare
from natgrad_flax.losses import Loss
from natgrad_flax.structures import Structure
from natgrad_flax.transformation import (
    Damping,
    NaturalGradientState,
    Step,
    change_of_loss,
    transformation,
)


def natural_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    structure: Structure,
    loss: Loss,
    damping: Damping = 0.0,
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

    def step(
        module: nnx.Module, x: Array, y: Array, rho: Any, state: NaturalGradientState, key: Array
    ) -> Step:
        prepare(structure, module, x, y, loss, fisher, mc_samples, rho)
        solved, signals, residual = compute(
            module,
            x,
            y,
            structure=structure,
            loss=loss,
            damping=rho,
            fisher=fisher,
            key=key,
            mc_samples=mc_samples,
        )
        return Step(
            jax.tree.map(jnp.negative, solved),
            lambda: _slope(signals, residual, solved),
            change_of_loss(loss, module, x, y, signals.outputs),
        )

    return transformation("natural_gradient_descent", learning_rate, damping, loss, seed, step)


def _slope(signals: Any, residual: Any, solved: dict[Any, Any]) -> Array:
    """<gradient, natural gradient>."""
    total = jnp.zeros((), signals.outputs.dtype)
    for index, layer in enumerate(signals.layers):
        pushed = layer.push_forward(solved[layer.path])
        total = total + jnp.sum(pushed * residual.direction(layer, index))
    return total / signals.num_samples
