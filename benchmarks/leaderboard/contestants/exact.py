"""The whole Fisher."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import projected_momentum, variants
from benchmarks.leaderboard.recipes import spring, untuned

CONTESTANTS = (
    *variants(
        ng.Exact(),
        damping=0.0,
        rates=(0.01, 1.0),
    ),
    projected_momentum(
        ng.Exact(),
        damping=1e-2,
        rates=(0.003, 1.0),
    ),
    spring(
        ng.Exact(),
        damping=1e-2,
        rates=(0.003, 1.0),
    ),
    untuned(ng.Exact()),
)
