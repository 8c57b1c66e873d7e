"""The diagonal of the Fisher."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import untuned

CONTESTANTS = (
    *variants(
        ng.Diagonal(),
        rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    ),
    untuned(ng.Diagonal()),
)
