"""Natural-gradient descent as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.averages import (
    AveragedStep,
    Averages,
    MovingAverage,
    check_average,
    empty_averages,
)
from natgrad_flax.checks import (
    check_fisher_batch,
    check_integer,
    check_learning_rate,
    check_microbatches,
    check_momentum,
    check_settings,
)
from natgrad_flax.fisher import FisherKind
from natgrad_flax.gradient import AtBatch, as_state, by_path, compute, inner_product
from natgrad_flax.independence import check_samples_alone
from natgrad_flax.layer_signals import named_updates
from natgrad_flax.losses import Loss
from natgrad_flax.momentum import Momentum
from natgrad_flax.plans import hashable_filter
from natgrad_flax.preparation import prepare
from natgrad_flax.structures import AveragedStructure, Structure
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
    wrt: Any = nnx.Param,
    average: MovingAverage | None = None,
    example: tuple[nnx.Module, Any] | None = None,
    momentum: float = 0.0,
    microbatches: int = 1,
    check_samples: bool = True,
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
      wrt: the parameters that move, the same as the ``wrt`` of ``nnx.Optimizer``.
      average: averages the statistics of ng.KFAC, ng.EKFAC, ng.Diagonal and ng.QuasiDiagonal over
        batches, and renews them and their inverses at intervals; needs ``example``.
      example: the model and a batch of inputs (or their ``jax.ShapeDtypeStruct``), from which the
        state gets its shapes; a transformation's ``init`` sees parameters only, and in
        ``lax.scan`` a state cannot change its shapes later. Nothing is computed of it.
      momentum: mu of ng.Exact and ng.BlockDiagonal: the previous step, projected to what this
        batch does not determine (SPRING; see ``natgrad_flax.momentum``). 0 is none.
      microbatches: parts, a divisor of N, in which the model runs one after the other, so that only
        one part's activations are held.
      check_samples: as in ``natural_gradient``; steps inside ``jit`` are not checked.

    Returns:
      An optax transformation with the extra arguments ``module`` (the model, or a copy of it, whose
      parameters are those of this step; or a function that returns it, ``lambda: model``, which
      ``nnx.Optimizer`` leaves alone while it takes the Variables off a model: needed where weights
      are tied, or where a module of yours keeps Variables that are no parameters), ``x`` (N, ...)
      and ``y`` (N, C). ``fisher_x`` and
      ``fisher_y`` are a batch for the Fisher alone, as in ``natural_gradient``.

    Raises:
      ValueError, TypeError: bad settings here, a bad batch in ``update``.
    """
    wrt = hashable_filter(wrt)
    check_settings(structure, loss, fisher, damping, mc_samples)
    check_learning_rate(learning_rate)

    check_average(average, structure, example)
    check_momentum(momentum, structure, damping)
    check_integer("microbatches", microbatches, 1)
    averaged: AveragedStep | None = None
    empty: Callable[[], Averages] | None = None
    if average is not None:
        assert isinstance(structure, AveragedStructure)
        assert example is not None
        averaged = AveragedStep(average, structure, loss, fisher, mc_samples, wrt, microbatches)
        empty = empty_averages(structure, *example, wrt, average, microbatches)

    def step(
        module: nnx.Module,
        x: Any,
        y: Array,
        rho: Any,
        state: NaturalGradientState,
        key: Array,
        fisher_x: Any = None,
        fisher_y: Array | None = None,
    ) -> Step:
        fisher_x, fisher_y = check_fisher_batch(module, fisher, x, y, fisher_x, fisher_y)
        check_microbatches(microbatches, x, fisher_x)
        at = (x, y) if fisher_x is None else (fisher_x, fisher_y)
        size = averaged.structure.factor_size if averaged else None
        shapes = prepare(structure, module, *at, loss, fisher, mc_samples, rho, wrt, size)
        if check_samples:
            check_samples_alone(module, x)
        if averaged is not None:
            kept: Any
            solved, slope, outputs, kept = averaged(
                module, x, y, shapes, state.kept, state.steps, rho, key, fisher_x, fisher_y
            )
            found = AtBatch(outputs, lambda: inner_product(slope, solved))
        else:
            carried = Momentum(momentum, by_path(state.kept)) if momentum else None
            solved, _, found = compute(
                module,
                x,
                y,
                structure=structure,
                loss=loss,
                damping=rho,
                fisher=fisher,
                key=key,
                mc_samples=mc_samples,
                wrt=wrt,
                fisher_x=fisher_x,
                fisher_y=fisher_y,
                microbatches=microbatches,
                momentum=carried,
            )
            kept = as_state(state.kept, named_updates(shapes.layers, solved)) if momentum else ()
        down = jax.tree.map(jnp.negative, solved)
        return Step(
            named_updates(shapes.layers, down),
            found.inner,
            change_of_loss(loss, module, x, y, found.outputs),
            kept,
        )

    def init_kept(params: Any) -> Any:
        if empty is not None:
            return empty()
        return jax.tree.map(jnp.zeros_like, params) if momentum else ()

    return transformation(
        "natural_gradient_descent",
        learning_rate,
        damping,
        loss,
        seed,
        step,
        init_kept,
        accepts=("fisher_x", "fisher_y"),
        wrt=wrt,
    )
