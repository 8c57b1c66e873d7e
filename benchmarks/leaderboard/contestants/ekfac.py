"""Kronecker factors with their eigenvalues corrected (George et al. 2018)."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import averaged, variants
from benchmarks.leaderboard.recipes import trained, untuned

CONTESTANTS = (
    *variants(
        ng.EKFAC(),
        rates=(0.001, 0.3),
    ),
    averaged(
        ng.EKFAC(),
        damping=1e-3,
        rates=(0.001, 0.3),
    ),
    trained(
        ng.EKFAC(),
        damping=1e-3,
        rates=(0.003, 1.0),
    ),
    untuned(ng.EKFAC()),
)
