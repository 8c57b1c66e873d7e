"""Natural-gradient descent as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.arguments.scalars import check_integer, check_learning_rate, check_seed
from natgrad_flax.damping import LevenbergMarquardt
from natgrad_flax.losses import LossLike
from natgrad_flax.optimizer.averages import (
    AveragedStep,
    Averages,
    MovingAverage,
    check_average,
)
from natgrad_flax.optimizer.checks import (
    check_fisher_batch,
    check_microbatches,
    check_momentum,
    check_settings,
)
from natgrad_flax.optimizer.gradient import compute
from natgrad_flax.optimizer.momentum import SPRING, Momentum
from natgrad_flax.optimizer.preflight import preflight
from natgrad_flax.optimizer.quadratic_model import (
    QuadraticModel,
    check_one_momentum,
    quadratic_terms,
)
from natgrad_flax.optimizer.transformation import (
    Damping,
    NaturalGradientState,
    Step,
    change_of_loss,
    transformation,
)
from natgrad_flax.optimizer.trees import as_state, by_path
from natgrad_flax.signals.base import named_updates
from natgrad_flax.signals.fisher import Batch, FisherKind
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.model import Path
from natgrad_flax.structures import AveragedStructure, Structure

GradientSource = Literal["batch", "incoming"]


def natural_gradient_descent(
    learning_rate: optax.ScalarOrSchedule | QuadraticModel | None = None,
    *,
    structure: Structure,
    loss: LossLike,
    damping: Damping | None = None,
    fisher: FisherKind = "exact",
    mc_samples: int = 1,
    seed: int = 0,
    wrt: Any = nnx.Param,
    average: MovingAverage | None = None,
    example: tuple[nnx.Module, Any] | None = None,
    momentum: float | SPRING = 0.0,
    microbatches: int = 1,
    check_samples: bool = True,
    gradient: GradientSource = "batch",
) -> optax.GradientTransformationExtraArgs:
    """Natural-gradient descent: theta <- theta - eta G^{-1} dL (Karakida & Osawa 2020, Eq. 7).

    ``update`` needs the batch: ``tx.update(grads, state, params, module=model, x=x, y=y)``, or
    through ``nnx.Optimizer``: ``optimizer.update(model, grads, module=model, x=x, y=y)``. With
    ``gradient="batch"`` the natural gradient is a function of the batch, not of the incoming
    updates; these are taken only for their tree (inside ``jit`` computing them costs nothing, XLA
    drops it), so this transformation stands first in an ``optax.chain``. With
    ``gradient="incoming"`` it is G^{-1} of the incoming updates, and what stands before it acts on
    the gradient. Clipping, momentum and weight decay that follow act on the natural-gradient step.
    An ``optax.MultiSteps`` around it would average natural gradients.

    What ``optax.masked`` and ``optax.partition`` hold back of the tree is held, too: the step is
    that of the Fisher of the parameters that are left. ``optax.flatten`` hides the names of the
    parameters, so it can only stand behind. ``optax.inject_hyperparams`` calls whatever is callable
    as a schedule, the loss as well, so let it see numbers alone:
    ``optax.inject_hyperparams(lambda rate: ng.natural_gradient_descent(rate, ...))(rate=0.1)``.

    Without a learning rate nothing has to be chosen: see ``ng.QuadraticModel``.

    Args:
      learning_rate: eta, a number or a schedule over steps, or ``ng.QuadraticModel()``, which
        chooses it (and a momentum) at every step; None for that.
      structure: the Fisher approximation.
      loss: the loss, or those of several heads (``ng.Heads``).
      damping: rho in the 1/N convention: a number, a schedule over steps, relative to the Gram
        diagonal, or adapted by Levenberg-Marquardt. None is 0 beside a learning rate, and
        ``ng.LevenbergMarquardt(decrease=0.95)`` without one.
      fisher: "exact", "mc", "empirical" or "improved".
      mc_samples: targets drawn a sample and step, for "mc".
      seed: of the drawn targets.
      wrt: the parameters that move, the same as the ``wrt`` of ``nnx.Optimizer``.
      average: averages the statistics of ng.KFAC, ng.EKFAC, ng.Diagonal and ng.QuasiDiagonal over
        batches, and renews them and their inverses at intervals; needs ``example``.
      example: the model and a batch of inputs (or their ``jax.ShapeDtypeStruct``), from which the
        state gets its shapes; a transformation's ``init`` sees parameters only, and in
        ``lax.scan`` a state cannot change its shapes later. Nothing is computed of it.
      momentum: mu of ng.Exact and ng.BlockDiagonal: the previous step, projected to what this
        batch does not determine (SPRING; see ``natgrad_flax.optimizer.momentum``). 0 is none. An
        ``ng.SPRING`` has its bias correction and norm constraint besides.
      microbatches: parts, a divisor of N, in which the model runs one after the other, so that only
        one part's activations are held.
      check_samples: as in ``natural_gradient``; steps inside ``jit`` are not checked.
      gradient: "batch", the gradient of the loss on x and y, every layer as ``module`` holds it; or
        "incoming", the updates that come in: the gradient of any loss, of a training pass with
        dropout and batch statistics, with penalties, masks or weights. ``module`` is then the model
        that the Fisher is taken of, with dropout off and statistics held (``nnx.view``), ``loss``
        says which Fisher, and y is looked at for fisher="empirical" and "improved" only. Damp it:
        at 0 what of the gradient lies outside of the range of G is lost.

    Returns:
      An optax transformation with the extra arguments ``module`` (the model, or a copy of it, whose
      parameters are those of this step; or a function that returns it, ``lambda: model``, which
      ``nnx.Optimizer`` leaves alone while it takes the Variables off a model: needed where weights
      are tied, or where a module of yours keeps Variables that are no parameters), ``x`` (N, ...)
      and ``y`` (N, ..., C) or class numbers. ``weights``, and ``fisher_x``, ``fisher_y`` and
      ``fisher_weights``, a batch for the Fisher alone, are as in ``natural_gradient``.

    Raises:
      ValueError, TypeError: bad settings here, a bad batch in ``update``.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, loss = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), ng.MeanSquaredError()
      >>> tx = ng.natural_gradient_descent(
      ...     0.1, structure=ng.KFAC(), loss=loss, damping=0.01
      ... )
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
      ...     optimizer.update(model, grads, module=model, x=x, y=y)
      ...     return value
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> values = [train_step(model, optimizer, x, y) for _ in range(20)]
      >>> bool(values[-1] < values[0] / 100)
      True
    """
    if damping is None:
        # slowly down: a batch predicts itself better than the next one
        damping = LevenbergMarquardt(decrease=0.95) if learning_rate is None else 0.0
    learning_rate = QuadraticModel() if learning_rate is None else learning_rate
    settings = check_settings(structure, loss, fisher, damping, mc_samples, wrt)
    if not isinstance(learning_rate, QuadraticModel):
        learning_rate = check_learning_rate(learning_rate, schedule=True)
    seed = check_seed(seed)
    check_average(average, structure, example)
    spring = check_momentum(momentum, structure, damping)
    check_one_momentum(learning_rate, spring)
    settings = replace(settings, microbatches=check_integer("microbatches", microbatches, 1))
    _check_gradient(gradient, damping)
    averaged: AveragedStep | None = None
    empty: Callable[[Any], Averages] | None = None
    if average is not None:
        assert isinstance(structure, AveragedStructure)
        assert example is not None
        averaged = AveragedStep(average, structure, settings)
        model, bound = settings.bound(*example)
        empty = replace(averaged, fisher=bound).empty(model, example[1])

    def step(
        module: nnx.Module,
        x: Any,
        y: Any,
        rho: Any,
        state: NaturalGradientState,
        key: Array,
        fisher_x: Any = None,
        fisher_y: Any = None,
        weights: Any = None,
        fisher_weights: Any = None,
        *,
        wrt: Any,
        incoming: dict[Path, Array],
    ) -> Step:
        given = incoming if gradient == "incoming" else None
        batch = Batch(x, y, weights, fisher_x, fisher_y, fisher_weights, key, given)
        batch = check_fisher_batch(settings, batch)
        module, which = replace(settings, wrt=wrt).bound(module, x)
        check_microbatches(which.microbatches, x, batch.fisher_x)
        size = averaged.structure.factor_size if averaged else None
        preflight(structure, module, which, batch, rho, size)
        if check_samples:
            check_samples_alone(module, x)
        kept: Any
        if averaged is not None:
            step = replace(averaged, fisher=which)
            found, kept = step(module, batch, state.kept, state.steps, rho)
        else:
            before = by_path(state.kept)
            if spring and set(before) != set(incoming):
                raise ValueError(
                    "the step that momentum= keeps has other parameters than the updates: pass "
                    "init the same tree as update"
                )
            carried = Momentum(spring.decay, before) if spring else None
            found = compute(module, batch, rho, structure=structure, fisher=which, momentum=carried)
            kept = as_state(state.kept, found.named()) if spring else ()
        direction = spring.corrected(found.updates, state.steps) if spring else found.updates
        down = jax.tree.map(jnp.negative, direction)
        return Step(
            named_updates(found.signals.layers, down),
            found.inner,
            change_of_loss(which.loss, module, x, y, found.outputs, weights),
            kept,
            partial(quadratic_terms, module, batch, which, structure.passes),
        )

    def init_kept(params: Any) -> Any:
        if empty is not None:
            return empty(params)
        return jax.tree.map(jnp.zeros_like, params) if spring else ()

    return transformation(
        "natural_gradient_descent",
        learning_rate,
        damping,
        settings.loss,
        seed,
        step,
        init_kept,
        accepts=("fisher_x", "fisher_y", "weights", "fisher_weights", "wrt", "incoming"),
        wrt=wrt,
        needs_targets=gradient == "batch" or settings.made_of_targets,
        max_norm=spring.max_norm if spring else None,
    )


def _check_gradient(gradient: object, damping: object) -> None:
    """Raises ValueError or TypeError on a source of gradients that does not serve."""
    if gradient not in get_args(GradientSource):
        raise ValueError(f'gradient must be "batch" or "incoming", got {gradient!r}')
    if gradient == "incoming" and isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "ng.LevenbergMarquardt predicts the change of the loss on x and y, which the incoming "
            'gradient need not be of: with gradient="incoming" give a number, a schedule or an '
            "ng.RelativeDamping as damping"
        )
