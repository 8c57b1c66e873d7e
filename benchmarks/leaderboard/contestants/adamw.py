"""Adam with decoupled weight decay."""

import optax

from benchmarks.leaderboard.contestant import Contestant

CONTESTANTS = (
    Contestant(
        name="adamw",
        title="AdamW, weight decay 1e-4",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.adamw(rate, weight_decay=1e-4),
        rates=(0.001, 0.3),
        standard_rates=(0.0001, 0.03),
    ),
)
