"""What is true of EKFAC alone; against its definition it is in ``test_structure_battery.py``."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_signals import dense, explicit, jacobian_of, network, shared

import natgrad_flax as ng
from natgrad_flax.structures import ekfac
from natgrad_flax.structures.base import ravel

pytestmark = pytest.mark.usefixtures("x64")


def test_one_sample_of_a_dense_layer_has_its_exact_block():
    """J = a d^T, so both factors have one eigenvector, and S* one entry."""
    signals, _ = network(np.random.default_rng(2), 1, 1, (dense, 3, 4))
    exact = np.asarray(ng.BlockDiagonal().to_dense(signals))
    np.testing.assert_allclose(ng.EKFAC().to_dense(signals), exact, atol=1e-12)
    assert np.abs(np.asarray(ng.EKFAC().to_dense(signals, 0.1)) - exact).max() > 0.05


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_no_diagonal_in_the_eigenbasis_is_nearer_to_the_fisher(sharing):
    """George et al. 2018, Proposition 2: nearer than K-FAC, and by what the diagonals differ."""
    layers = ((dense, 3, 4), (shared, 4, 1, 2, 3))
    signals, _ = network(np.random.default_rng(3), 6, 2, *layers)
    structures = (
        ng.EKFAC(sharing=sharing),
        ng.KFAC(sharing=sharing, last_layer="literal"),
        ng.BlockDiagonal(),
    )
    dense_all = jax.jit(lambda signals: [s.to_dense(signals) for s in structures])
    mine, factors, fisher = map(np.asarray, dense_all(signals))
    near, far = np.linalg.norm(fisher - mine), np.linalg.norm(fisher - factors)
    assert near < 0.99 * far
    # F - G has no part in the space of matrices diagonal in the basis
    np.testing.assert_allclose(far**2, near**2 + np.linalg.norm(mine - factors) ** 2, rtol=1e-10)


def test_both_ways_to_turn_the_jacobians_are_taken_and_agree():
    rng = np.random.default_rng(4)
    cheap_rows, cheap_jacobians = shared(rng, 4, 3, 2, 1, 6, 6), shared(rng, 4, 1, 9, 1, 2, 2)
    ways = []
    for layer in (cheap_rows, cheap_jacobians):
        u = jnp.asarray(np.linalg.qr(rng.normal(size=(layer.fan_in,) * 2))[0])[None]
        v = jnp.asarray(np.linalg.qr(rng.normal(size=(layer.num_units,) * 2))[0])[None]
        ways.append(ekfac._turns_rows(layer, u, v))
        jacobian = jacobian_of(layer).reshape(-1, layer.fan_in, layer.num_units)
        wanted = np.sum((np.asarray(u[0]).T @ jacobian @ np.asarray(v[0])) ** 2, axis=0) / 4
        squares = ekfac._mean_squares(layer, {"inputs": u, "units": v})
        np.testing.assert_allclose(squares[0], wanted, rtol=1e-12)
    assert ways == [True, False]


def test_rounding_outside_of_the_basis_is_not_magnified():
    """A damping that is small beside the scaling divides what should be 0 there."""
    signals, residual = network(np.random.default_rng(7), 4, 1, (dense, 400, 300))
    rho = 1e-3 * float(ng.EKFAC().damping_scale(signals)[0])
    wanted = ravel(jax.jit(ng.EKFAC().solve)(signals, residual, rho))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (signals, residual))
    found = ravel(jax.jit(ng.EKFAC().solve)(*low, jnp.float32(rho)))
    assert jnp.linalg.norm(found - wanted) < 1e-3 * jnp.linalg.norm(wanted)


def test_products_of_small_eigenvalues_are_no_rounding():
    """Each factor has a rank that float32 tells, their product reaches far below its epsilon."""
    signals, residual = network(np.random.default_rng(8), 12, 1, (dense, 6, 5))
    (layer,) = signals.layers
    decay = [0.1 ** np.sqrt(np.arange(size)) for size in (layer.inputs.shape[-1], layer.num_units)]
    layer = replace(layer, inputs=layer.inputs * decay[0], derivatives=layer.derivatives * decay[1])
    given = replace(signals, layers=(layer,)), residual
    wanted = ravel(ng.EKFAC().solve(*given, 0.0))
    squares = ng.EKFAC().moments(given[0]).rotated[0]["squares"]
    assert squares.min() < 1e-8 * squares.max()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given)
    found = ravel(ng.EKFAC().solve(*low, 0.0))
    assert jnp.linalg.norm(found - wanted) < 0.02 * jnp.linalg.norm(wanted)


def test_the_largest_system_is_named():
    rng = np.random.default_rng(6)
    signals, _ = network(rng, 5, 2, (dense, 19, 12), (explicit, 3, 3))
    assert ng.EKFAC().gram_size(signals) == 10
    signals, _ = network(rng, 5, 2, (shared, 2, 1, 19, 3))
    assert ng.EKFAC().gram_size(signals) == 10
    assert ng.EKFAC(sharing="reduce").gram_size(signals) == 20


def test_bad_settings():
    with pytest.raises(ValueError, match="sharing must be one of"):
        ng.EKFAC(sharing="both")
    with pytest.raises(ValueError, match="EKFAC has no alpha"):
        ng.optimal_learning_rate(ng.EKFAC(), ng.MLP((3, 4, 1), rngs=nnx.Rngs(0)), 2)
