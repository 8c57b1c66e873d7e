"""Warm-up with a cosine, and weight decay: the same for every contestant that wants them."""

from __future__ import annotations

from collections.abc import Callable

import optax
from jax import Array

from benchmarks.leaderboard.contestant import Contestant, Family, is_standard
from benchmarks.leaderboard.workload import Workload

WARM_UP = 0.05
"""Share of the budget in steps in which a learning rate rises linearly from 0 to its peak."""
WEIGHT_DECAY = 1e-4
"""Of all that decay weights: decoupled, times the learning rate."""

ADAM_RATES = (0.001, 0.3)
STANDARD_ADAM_RATES = (0.0001, 0.03)
"""Spaces of peak learning rates of what moves as far as Adam does, in both parametrisations."""


def warm_up_steps(workload: Workload) -> int:
    """Steps until the learning rate is at its peak, at least 1."""
    return max(1, round(WARM_UP * workload.max_steps))


def cosine(workload: Workload, rate: Array | float) -> optax.Schedule:
    """The learning rate over the steps of a workload's budget: a warm-up, then a cosine to 0.

    Args:
      workload: whose budget in steps it spends.
      rate: the peak.
    """
    steps = warm_up_steps(workload)
    # the warm-up begins one step in: a step at a rate of 0 would be none
    shape = optax.warmup_cosine_decay_schedule(
        1 / (steps + 1), 1.0, steps, max(steps + 1, workload.max_steps)
    )
    return lambda count: rate * shape(count)


def as_far_as_adam(
    name: str, title: str, family: Family, optimizer: Callable[..., optax.GradientTransformation]
) -> Contestant:
    """A tuned contestant that moves as far as Adam does: its space, the cosine, weight decay.

    Args:
      name: of the contestant.
      title: for readers.
      family: as in ``Contestant``.
      optimizer: from a schedule and ``weight_decay`` to the transformation.
    """
    return Contestant(
        name=name,
        title=title,
        family=family,
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optimizer(
            cosine(workload, rate), weight_decay=WEIGHT_DECAY
        ),
        rates=ADAM_RATES,
        standard_rates=STANDARD_ADAM_RATES,
    )


def nominal(workload: Workload, rate: float) -> float:
    """A learning rate of Adam that was stated for networks in standard parametrisation.

    In NTK parametrisation it is ten times as large, as the spaces of tuned contestants are.
    """
    return rate if is_standard(workload) else 10 * rate
