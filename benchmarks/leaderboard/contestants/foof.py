"""FOOF: the second moments of a layer's inputs alone (Benzing 2022), averaged."""

import natgrad_flax as ng
from benchmarks.leaderboard.recipes import trained

CONTESTANTS = (
    trained(
        ng.Foof("inputs"),
        damping=1e-2,
        rates=(0.001, 0.3),
    ),
)
