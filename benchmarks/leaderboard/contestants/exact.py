"""The whole Fisher."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants

CONTESTANTS = variants(
    "exact",
    "Exact",
    ng.Exact(),
    damping=0.0,
    rates=(0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
)
