"""The diagonal of the Fisher."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import untuned

CONTESTANTS = (
    *variants(
        ng.Diagonal(),
        rates=(0.0003, 0.1),
    ),
    untuned(ng.Diagonal()),
)
