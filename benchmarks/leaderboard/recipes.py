"""How people run optimizers, in one place: warm-up and cosine, weight decay, a bound on the step.

Every contestant that wants one of them takes it from here, so that they mean the same for all: the
schedule goes over the budget of the workload in steps, whatever a method needs of it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant, in_words
from benchmarks.leaderboard.natural import (
    Damping,
    descent,
    example_of,
    fisher_on,
    is_fit,
    of_structure,
    unsuitable,
    unsuitable_average,
)
from benchmarks.leaderboard.schedules import WEIGHT_DECAY, cosine
from benchmarks.leaderboard.studies import Space
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.signals.fisher import FisherKind
from natgrad_flax.structures import AveragedStructure

# an average over the last ten renewals, each ten steps after the one before
AVERAGE = ng.MovingAverage(decay=0.9, every=10)
MOMENTUM = 0.9
LONGEST = 1e-3
"""What eta^2 u^T G u of a step of averaged factors is at most: about twice a change in nats."""
SPRING = ng.SPRING(decay=0.9, max_norm=3.0)
# on a full batch of squared error nothing is drawn, and nothing is left to other batches
FULL_BATCH = ng.RelativeDamping(1e-6)


def norm_constraint(
    bound: float, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Shortens directions whose step would be long in the metric that they come from.

    A direction u = G^{-1} g at the learning rate eta is multiplied by
    min(1, sqrt(bound / (eta^2 u^T G u))), where u^T G u is its product with the gradient g (Ba,
    Grosse & Martens 2017, Section 5). Incoming are -u, for a descent.

    Args:
      bound: positive.
      schedule: eta by the number of the step.

    Returns:
      A transformation whose ``update`` needs the gradient as ``grad``.
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates,
        **further: object,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params, further
        eta = jnp.asarray(schedule(state.count))
        squared = -(eta**2) * optax.tree.vdot(updates, grad)
        # nothing is as short as rounding makes a product negative
        factor = jnp.sqrt(bound / jnp.maximum(squared, bound))
        shorter = jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, updates)
        return shorter, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def trained(structure: AveragedStructure, *, damping: Damping, rates: Space) -> Contestant:
    """A structure as networks are trained with it.

    Factors averaged over batches, renewed with their inverses in every tenth step; the direction
    is bounded in their metric, then momentum, decoupled weight decay, and a cosine with warm-up.

    Args:
      structure: one that is a function of means over samples.
      damping: of the averaged Fisher; not adaptive.
      rates: the ends of its search space, of peak learning rates.
    """
    # one factor of the inputs is the same for every Fisher; this one needs no pass of its own
    fisher: FisherKind = "empirical" if isinstance(structure, ng.Foof) else "mc"

    def optimizer(
        workload: Workload, rate: Array | float, seed: int
    ) -> optax.GradientTransformation:
        schedule, example = cosine(workload, rate), example_of(workload)
        further = {"average": AVERAGE, "example": example, "gradient": "incoming"}
        return optax.chain(
            descent(structure, fisher, damping, workload, 1.0, seed, **further),
            norm_constraint(LONGEST, schedule),
            optax.trace(MOMENTUM),
            optax.add_decayed_weights(-WEIGHT_DECAY),
            optax.scale_by_schedule(schedule),
        )

    return of_structure(
        structure,
        "-cosine",
        ", averaged, momentum, norm constraint, cosine",
        rate_rule="tuned",
        optimizer=optimizer,
        rates=rates,
        fisher=fisher,
        damping=damping,
        unsuitable=partial(unsuitable_average, structure),
    )


def spring(structure: ng.Structure, *, damping: float, rates: Space) -> Contestant:
    """A structure that solves every batch anew, with SPRING and the cosine.

    The previous step is projected to what a batch does not determine, with the correction of its
    start, and no step is longer than ``SPRING.max_norm``.

    Args:
      structure: ``ng.Exact`` or ``ng.BlockDiagonal``.
      damping: on mini-batches and under other losses than squared error; ``FULL_BATCH`` else.
      rates: the ends of its search space, of peak learning rates.
    """

    def chosen(workload: Workload) -> Damping:
        return FULL_BATCH if is_fit(workload) else damping

    def optimizer(
        workload: Workload, rate: Array | float, seed: int
    ) -> optax.GradientTransformation:
        schedule = cosine(workload, rate)
        rho = chosen(workload)
        return descent(structure, "mc", rho, workload, schedule, seed, momentum=SPRING)

    return of_structure(
        structure,
        "-spring",
        ", SPRING, cosine",
        rate_rule="tuned",
        optimizer=optimizer,
        rates=rates,
        fisher="mc",
        damping_words=(
            f"{in_words(damping)}; on a full batch of squared error {in_words(FULL_BATCH)}"
        ),
        unsuitable=lambda workload: unsuitable(structure, "mc", chosen(workload), workload),
    )


def untuned(structure: ng.Structure) -> Contestant:
    """A structure as it is without any settings.

    Learning rate and momentum of each step are those of the quadratic model of the loss, and
    damping adapts (``ng.QuadraticModel``, ``ng.LevenbergMarquardt``).

    Args:
      structure: any.
    """

    def optimizer(
        workload: Workload, rate: Array | float, seed: int
    ) -> optax.GradientTransformation:
        del rate
        return ng.natural_gradient_descent(
            structure=structure, loss=workload.loss, fisher=fisher_on(workload, "mc"), seed=seed
        )

    damping = ng.LevenbergMarquardt()
    return of_structure(
        structure,
        "-quadratic",
        ", rate and momentum of the quadratic model",
        rate_rule="quadratic model",
        optimizer=optimizer,
        fisher="mc",
        damping_words=f"Levenberg-Marquardt from {damping.initial:g}, as the library has it",
        unsuitable=partial(unsuitable, structure, "mc", damping),
    )
