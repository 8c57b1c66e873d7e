"""Neighbouring layers coupled."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import untuned

CONTESTANTS = (
    *variants(
        ng.BlockTriDiagonal(),
        damping=0.0,
        rates=(0.01, 1.0),
    ),
    untuned(ng.BlockTriDiagonal()),
)
