"""Adam."""

import optax

from benchmarks.leaderboard.contestant import Contestant

CONTESTANTS = (
    Contestant(
        name="adam",
        title="Adam",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.adam(rate),
        rates=(0.001, 0.3),
        standard_rates=(0.0001, 0.03),
    ),
)
