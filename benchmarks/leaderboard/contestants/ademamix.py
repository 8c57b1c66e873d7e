"""AdEMAMix: Adam with a second, slow average of the gradients (Pagliardini et al. 2024)."""

import optax.contrib

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.schedules import WEIGHT_DECAY, cosine

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
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        standard_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    ),
)
