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
        rates=(0.5, 1.5, 5.0, 15.0, 50.0, 150.0, 500.0, 1500.0),
    ),
)
