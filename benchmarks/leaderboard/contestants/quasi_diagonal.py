"""The diagonal with the coupling of each weight to its bias."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import untuned

CONTESTANTS = (
    *variants(
        ng.QuasiDiagonal(),
        rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    ),
    untuned(ng.QuasiDiagonal()),
)
