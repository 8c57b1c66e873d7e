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
        rates=(0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        standard_rates=(0.005, 0.015, 0.05, 0.15, 0.5, 1.5),
    ),
)
