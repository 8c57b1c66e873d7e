"""SOAP: Adam in the eigenbasis of Shampoo (Vyas et al. 2024)."""

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import ADAM_RATES, STANDARD_ADAM_RATES, WEIGHT_DECAY, cosine

CONTESTANTS = (
    Contestant(
        name="soap-cosine",
        title="SOAP, cosine",
        family="natural-gradient",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: ng.soap(
            cosine(workload, rate), weight_decay=WEIGHT_DECAY
        ),
        rates=ADAM_RATES,
        standard_rates=STANDARD_ADAM_RATES,
    ),
)
