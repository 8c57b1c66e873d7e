"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz; Adam on the biases."""

import optax.contrib

from benchmarks.leaderboard.contestant import Contestant

CONTESTANTS = (
    Contestant(
        name="muon",
        title="Muon",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.contrib.muon(rate),
        rates=(0.005, 1.5),
        standard_rates=(0.0005, 0.15),
    ),
)
