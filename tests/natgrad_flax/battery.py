"""The structures of the tests: every approximation with its constructor options, once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import natgrad_flax as ng


def coupling(depth: int, *, definite: bool = True) -> np.ndarray:
    """A random symmetric nonsingular Sigma, shape (L, L)."""
    sigma = np.random.default_rng(depth).normal(size=(depth, depth))
    return sigma @ sigma.T / depth + np.eye(depth) if definite else sigma + sigma.T


STRUCTURES: dict[str, Callable[[int, str], ng.Structure]] = {
    "exact": lambda depth, space: ng.Exact(space),
    "block-diagonal": lambda depth, space: ng.BlockDiagonal(space),
    "block-tri-diagonal": lambda depth, space: ng.BlockTriDiagonal(space),
    "layer-wise": lambda depth, space: ng.LayerWise(coupling(depth), space),
    "layer-wise-indefinite": lambda depth, space: ng.LayerWise(
        coupling(depth, definite=False), space
    ),
    "kfac": lambda depth, space: ng.KFAC(space=space),
    "kfac-literal-pi": lambda depth, space: ng.KFAC("literal", "pi", "scaled", space),
    "kfac-reduce": lambda depth, space: ng.KFAC(space=space, sharing="reduce"),
    "ekfac": lambda depth, space: ng.EKFAC(),
    "ekfac-reduce": lambda depth, space: ng.EKFAC("reduce"),
    "unit-wise": lambda depth, space: ng.UnitWise(space),
    "diagonal": lambda depth, space: ng.Diagonal(),
    "quasi-diagonal": lambda depth, space: ng.QuasiDiagonal(),
}
"""By name: from the number of layers and a space ("auto", "sample", "parameter") to the structure.

Those without a space take none.
"""
