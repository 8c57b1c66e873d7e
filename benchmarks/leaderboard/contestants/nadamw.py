"""NAdamW with warm-up and a cosine: what others have to beat."""

import optax

from benchmarks.leaderboard.schedules import as_far_as_adam

CONTESTANTS = (as_far_as_adam("nadamw-cosine", "NAdamW, cosine", "first-order", optax.nadamw),)
