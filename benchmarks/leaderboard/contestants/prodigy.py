"""Prodigy: Adam that finds its learning rate as it goes (Mishchenko & Defazio 2023)."""

import optax.contrib

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import WEIGHT_DECAY, cosine

CONTESTANTS = (
    Contestant(
        name="prodigy",
        title="Prodigy, cosine",
        family="first-order",
        rate_rule="fixed",
        # its rate is a multiple of what it finds; with a warm-up, for which its safeguard is
        optimizer=lambda workload, rate, seed: optax.contrib.prodigy(
            cosine(workload, 1.0), weight_decay=WEIGHT_DECAY, safeguard_warmup=True
        ),
    ),
)
