"""NAdamW with warm-up and a cosine: what others have to beat."""

import optax

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import WEIGHT_DECAY, cosine

CONTESTANTS = (
    Contestant(
        name="nadamw-cosine",
        title="NAdamW, cosine",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.nadamw(
            cosine(workload, rate), weight_decay=WEIGHT_DECAY
        ),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        standard_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    ),
)
