"""Shampoo and the nearest Kronecker product, beside theory."""

import jax
import numpy as np
import pytest
from random_signals import dense, network

import natgrad_flax as ng

pytestmark = pytest.mark.usefixtures("x64")


def test_a_single_sample_is_a_kronecker_product():
    """F = a a^T (x) d d^T, which KFOC finds at once, and which Shampoo squared is."""
    signals, _ = network(np.random.default_rng(0), 1, 1, (dense, 4, 3), (dense, 3, 2, None))
    fisher, found, roots = jax.jit(
        lambda s: [g.to_dense(s) for g in (ng.BlockDiagonal(), ng.KFOC(1), ng.Shampoo(0.5))]
    )(signals)
    np.testing.assert_allclose(found, fisher, atol=1e-12)
    np.testing.assert_allclose(roots, fisher, atol=1e-12)


def test_no_other_product_is_nearer():
    signals, _ = network(np.random.default_rng(1), 6, 2, (dense, 4, 3))
    nearer = map(ng.KFOC, (1, 3, 40))
    made = (ng.BlockDiagonal(), *nearer, ng.KFAC("literal"), ng.Shampoo(0.5))
    fisher, *found = jax.jit(lambda s: [g.to_dense(s) for g in made])(signals)
    distances = [np.linalg.norm(np.asarray(g) - fisher) for g in found]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < min(distances[3:]) - 1e-3


@pytest.mark.parametrize("power", [0, 1.5, "half"])
def test_powers_are_above_0_and_at_most_1(power):
    with pytest.raises((ValueError, TypeError), match="power must be"):
        ng.Shampoo(power)


def test_iterations_are_positive():
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1"):
        ng.KFOC(0)
