"""Gradient descent with Nesterov's momentum of 0.9."""

import optax

from benchmarks.leaderboard.contestant import Contestant

CONTESTANTS = (
    Contestant(
        name="momentum",
        title="SGD, Nesterov momentum 0.9",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.sgd(rate, momentum=0.9, nesterov=True),
        rates=(0.1, 30.0),
        standard_rates=(0.0015, 0.5),
    ),
)
