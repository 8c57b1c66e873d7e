"""Kronecker factors."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants

CONTESTANTS = variants(
    "kfac",
    "K-FAC",
    ng.KFAC(),
    damping=0.0,
    rates=(0.0005, 0.0015, 0.005, 0.015, 0.05, 0.15, 0.5, 1.0),
)
