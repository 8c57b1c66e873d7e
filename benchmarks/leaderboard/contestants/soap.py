"""SOAP: Adam in the eigenbasis of Shampoo (Vyas et al. 2024)."""

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import WEIGHT_DECAY, cosine

CONTESTANTS = (
    Contestant(
        name="soap-cosine",
        title="SOAP, cosine",
        family="natural-gradient",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: ng.soap(
            cosine(workload, rate), weight_decay=WEIGHT_DECAY
        ),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        standard_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    ),
)
