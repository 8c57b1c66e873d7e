"""Stochastic gradient descent with a constant learning rate."""

import optax

from benchmarks.leaderboard.contestant import Contestant

CONTESTANTS = (
    Contestant(
        name="sgd",
        title="SGD",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.sgd(rate),
        rates=(0.3, 100.0),
        standard_rates=(0.005, 1.5),
    ),
)
