"""One Fisher block a layer."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import spring, untuned

CONTESTANTS = (
    *variants(
        ng.BlockDiagonal(),
        damping=0.0,
        rates=(0.01, 1.0),
    ),
    spring(
        ng.BlockDiagonal(),
        damping=1e-2,
        rates=(0.003, 1.0),
    ),
    untuned(ng.BlockDiagonal()),
)
