"""The diagonal with the coupling of each weight to its bias."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import untuned

CONTESTANTS = (
    *variants(
        ng.QuasiDiagonal(),
        rates=(0.0003, 0.1),
    ),
    untuned(ng.QuasiDiagonal()),
)
