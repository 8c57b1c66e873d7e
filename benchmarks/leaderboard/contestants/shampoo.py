"""Shampoo with the lengths of Adam's steps, as it is trained at scale (Anil et al. 2020)."""

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import WEIGHT_DECAY, cosine

CONTESTANTS = (
    Contestant(
        name="shampoo-cosine",
        title="Shampoo, grafted to Adam, cosine",
        family="natural-gradient",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: ng.shampoo(
            cosine(workload, rate),
            decay=0.95,
            every=1,
            inverse_every=10,
            epsilon=1e-10,
            grafting="adam",
            momentum=0.9,
            weight_decay=WEIGHT_DECAY,
        ),
        # the momentum adds up ten steps
        rates=(0.0001, 0.03),
        standard_rates=(0.00001, 0.003),
    ),
)
