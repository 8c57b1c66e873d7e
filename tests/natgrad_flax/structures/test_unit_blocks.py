"""Blocks below units, beside the structures that they lie between."""

import jax
import numpy as np
import pytest
from random_signals import dense, network, shared

import natgrad_flax as ng
from natgrad_flax.structures import Geometry

pytestmark = pytest.mark.usefixtures("x64")


def test_the_smallest_is_diagonal_and_the_largest_unit_wise():
    rng = np.random.default_rng(0)
    layers = ((dense, 5, 3), (shared, 3, 1, 2, 3))
    signals, residual = network(rng, 4, 2, *layers)

    @jax.jit
    def answers(signals, residual):
        def of(structure):
            step = structure.solve(signals, residual, 0.1)
            return (
                structure.to_dense(signals, 0.1),
                step,
                structure.coefficient(*[signals] * 2, 0.1),
            )

        return [of(s) for s in (ng.UnitBlocks(1), ng.Diagonal(), ng.UnitBlocks(9), ng.UnitWise())]

    smallest, diagonal, largest, units = answers(signals, residual)
    for found, wanted in ((smallest, diagonal), (largest, units)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, wanted)


def test_entries_are_those_that_are_not_zero():
    geometry = Geometry(((7, 5), (5, 2)), 4, 2)
    nonzeros, stored = ng.UnitBlocks(3).entries(geometry)
    assert nonzeros == 5 * (9 + 9 + 1) + 2 * (9 + 4)
    assert stored == 5 * (6 + 6 + 1) + 2 * (6 + 3)


@pytest.mark.parametrize("size", [0, 2.5, None])
def test_a_size_is_a_positive_integer(size):
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        ng.UnitBlocks(size)
