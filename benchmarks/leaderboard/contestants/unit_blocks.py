"""Blocks of 32 inputs of a unit, averaged: between the diagonal and the blocks of whole units."""

import natgrad_flax as ng
from benchmarks.leaderboard.recipes import trained

CONTESTANTS = (
    trained(
        ng.UnitBlocks(32),
        damping=1e-3,
        rates=(0.003, 1.0),
    ),
)
