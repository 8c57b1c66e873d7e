"""AdEMAMix: Adam with a second, slow average of the gradients (Pagliardini et al. 2024)."""

import optax.contrib

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import ADAM_RATES, STANDARD_ADAM_RATES, WEIGHT_DECAY, cosine

# the slow average of the paper, over 10 000 steps, is longer than any budget here: its own advice
# for few steps is 0.999
SLOW = 0.999

CONTESTANTS = (
    Contestant(
        name="ademamix-cosine",
        title="AdEMAMix, cosine",
        family="first-order",
        rate_rule="tuned",
        optimizer=lambda workload, rate, seed: optax.contrib.ademamix(
            cosine(workload, rate), b3=SLOW, weight_decay=WEIGHT_DECAY
        ),
        rates=ADAM_RATES,
        standard_rates=STANDARD_ADAM_RATES,
    ),
)
