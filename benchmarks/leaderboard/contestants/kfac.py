"""Kronecker factors: as the theory scales the last layer, and damped as they are."""

import natgrad_flax as ng
from benchmarks.leaderboard.natural import averaged, variants
from benchmarks.leaderboard.recipes import trained, untuned

CONTESTANTS = (
    *variants(
        ng.KFAC(),
        damping=0.0,
        # with more samples than inputs and units, the theory of the scaled last layer does not hold
        damped=ng.KFAC(last_layer="literal"),
        rates=(0.001, 0.5),
    ),
    averaged(
        ng.KFAC(last_layer="literal", split="pi"),
        damping=1e-3,
        rates=(0.001, 0.3),
    ),
    trained(
        ng.KFAC(last_layer="literal", split="pi"),
        damping=1e-3,
        rates=(0.003, 1.0),
    ),
    untuned(ng.KFAC(last_layer="literal", split="pi")),
)
