"""One Fisher block a unit."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import variants
from benchmarks.leaderboard.recipes import untuned

CONTESTANTS = (
    *variants(
        ng.UnitWise(),
        rates=(0.001, 0.3),
    ),
    untuned(ng.UnitWise()),
)
