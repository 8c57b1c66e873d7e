"""NAdamW with warm-up and a cosine: what others have to beat."""

import optax

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import ADAM_RATES, STANDARD_ADAM_RATES, WEIGHT_DECAY, cosine

CONTESTANTS = (
    Contestant(
        name="nadamw-cosine",
        title="NAdamW, cosine",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.nadamw(
            cosine(workload, rate), weight_decay=WEIGHT_DECAY
        ),
        rates=ADAM_RATES,
        standard_rates=STANDARD_ADAM_RATES,
    ),
)
