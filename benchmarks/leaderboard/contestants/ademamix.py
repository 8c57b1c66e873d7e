"""AdEMAMix: Adam with a second, slow average of the gradients (Pagliardini et al. 2024)."""

from functools import partial

import optax.contrib

from benchmarks.leaderboard.schedules import as_far_as_adam

# the slow average of the paper, over 10 000 steps, is longer than any budget here: its own advice
# for few steps is 0.999
SLOW = 0.999

CONTESTANTS = (
    as_far_as_adam(
        "ademamix-cosine",
        "AdEMAMix, cosine",
        "first-order",
        partial(optax.contrib.ademamix, b3=SLOW),
    ),
)
