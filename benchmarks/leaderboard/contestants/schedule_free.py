"""Schedule-free AdamW (Defazio et al. 2024), judged at its average over steps."""

import optax.contrib
from jax import Array

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import (
    ADAM_RATES,
    STANDARD_ADAM_RATES,
    WEIGHT_DECAY,
    nominal,
    warm_up_steps,
)
from benchmarks.leaderboard.workload import Workload

# what optax has as its default
RATE = 0.0025


def _optimizer(workload: Workload, rate: Array | float, seed: int) -> optax.GradientTransformation:
    return optax.contrib.schedule_free_adamw(
        rate, warmup_steps=warm_up_steps(workload), weight_decay=WEIGHT_DECAY
    )


CONTESTANTS = (
    Contestant(
        name="schedule-free",
        title="Schedule-free AdamW",
        family="first-order",
        rate_rule="tuned",
        optimizer=_optimizer,
        rates=ADAM_RATES,
        standard_rates=STANDARD_ADAM_RATES,
        judged=optax.contrib.schedule_free_eval_params,
    ),
    Contestant(
        name="schedule-free-fixed",
        title=f"Schedule-free AdamW at {RATE:g}",
        family="first-order",
        rate_rule="fixed",
        optimizer=lambda workload, rate, seed: _optimizer(workload, nominal(workload, RATE), seed),
        judged=optax.contrib.schedule_free_eval_params,
    ),
)
