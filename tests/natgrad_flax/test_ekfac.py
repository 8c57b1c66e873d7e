"""EKFAC against its definition in NumPy, on signals of every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_signals import dense, explicit, jacobian_of, network, rows_of, shared

import natgrad_flax as ng
from natgrad_flax.shared_signals import ExplicitSignals
from natgrad_flax.structures import ekfac
from natgrad_flax.structures.base import gradient, ravel

pytestmark = pytest.mark.usefixtures("x64")

MIXED = (
    (dense, 3, 4),
    (dense, 9, 2, None),  # more inputs than samples
    (shared, 3, 1, 2, 3),
    (shared, 2, 2, 2, 2, None),
    (explicit, 2, 3),
    (explicit, 1, 3),
    (dense, 4, 2),
)


def reference(signals, sharing, rho):
    """G by its definition, layer after layer, with the eigenvectors of NumPy."""
    n, blocks = signals.num_samples, []
    for layer in signals.layers:
        jacobian = jacobian_of(layer)
        if isinstance(layer, ExplicitSignals):
            unit = np.arange(jacobian.shape[1]) % layer.num_units
            blocks.append((unit[:, None] == unit) * (jacobian.T @ jacobian) / n)
            continue
        a, d = rows_of(layer)
        groups, fan_in, units = a.shape[2], a.shape[3], d.shape[4]
        left = a.mean(axis=1, keepdims=True) if sharing == "reduce" else a
        right = d.sum(axis=2, keepdims=True) if sharing == "reduce" else d
        block = np.zeros((fan_in, groups, units, fan_in, groups, units))
        for g in range(groups):
            one = jacobian.reshape(-1, fan_in, groups, units)[:, :, g]
            u = np.linalg.eigh(np.einsum("ntk,ntj->kj", left[:, :, g], left[:, :, g]))[1]
            v = np.linalg.eigh(np.einsum("nstm,nstk->mk", right[..., g, :], right[..., g, :]))[1]
            squares = np.sum((u.T @ one @ v) ** 2, axis=0) / n
            basis = np.kron(u, v)
            part = (basis * squares.ravel()) @ basis.T
            block[:, g, :, :, g, :] = part.reshape(fan_in, units, fan_in, units)
        blocks.append(block.reshape(fan_in * groups * units, -1))
    total = sum(len(block) for block in blocks)
    matrix, start = rho * np.eye(total), 0
    for block in blocks:
        stop = start + len(block)
        matrix[start:stop, start:stop] += block
        start = stop
    return matrix


def everything(structure, signals, residual, rho):
    """All that a structure answers, in one program."""

    @jax.jit
    def run(signals, residual):
        slope = gradient(signals, residual)
        return (
            structure.to_dense(signals, rho),
            ravel(structure.solve(signals, residual, rho)),
            ravel(structure.precondition(signals, jax.tree.map(jnp.cos, slope), rho)),
            ravel(jax.tree.map(jnp.cos, slope)),
            structure.coefficient(signals, signals, rho),
        )

    return run(signals, residual)


@pytest.mark.parametrize("rho", [0.05, 0.0])
def test_expand_is_its_definition(rho):
    signals, residual = network(np.random.default_rng(0), 5, 2, *MIXED)
    found = everything(ng.EKFAC(), signals, residual, rho)
    check_against_dense(found, reference(signals, "expand", rho), signals, residual)


def test_reduce_is_its_definition():
    layers = ((dense, 3, 4), (shared, 4, 1, 2, 3), (shared, 2, 2, 2, 2, None))
    signals, residual = network(np.random.default_rng(1), 5, 2, *layers)
    found = everything(ng.EKFAC(sharing="reduce"), signals, residual, 0.05)
    check_against_dense(found, reference(signals, "reduce", 0.05), signals, residual)


def check_against_dense(found, matrix, signals, residual):
    metric, solved, other, cosines, coefficient = map(np.asarray, found)
    jacobian = np.concatenate([jacobian_of(layer) for layer in signals.layers], axis=1)
    n = signals.num_samples
    inverse = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    slope = jacobian.T @ np.asarray(residual.coefficients).ravel() / n
    np.testing.assert_allclose(metric, matrix, atol=1e-11)
    for value, wanted in (
        (solved, inverse @ slope),
        (other, inverse @ cosines),
        (coefficient, jacobian @ inverse @ jacobian.T / n),
    ):
        np.testing.assert_allclose(value, wanted, atol=1e-8 * np.abs(wanted).max())


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
        np.testing.assert_allclose(ekfac._mean_squares(layer, u, v)[0], wanted, rtol=1e-12)
    assert ways == [True, False]


def test_relative_damping_is_relative_to_the_mean_diagonal():
    signals, _ = network(np.random.default_rng(5), 5, 2, *MIXED)
    structure = ng.EKFAC()

    @jax.jit
    def scales(signals):
        factors = structure.statistics(signals)
        basis = structure.basis(factors)
        moments = ng.structures.Moments(factors, basis, structure.rotated(signals, basis))
        return structure.damping_scale(signals), structure.scale_of(moments, 5)

    wanted = [np.mean(np.sum(jacobian_of(a) ** 2, axis=0)) / 5 for a in signals.layers]
    for found in scales(signals):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_rounding_outside_of_the_basis_is_not_magnified():
    """A damping that is small beside the scaling divides what should be 0 there."""
    signals, residual = network(np.random.default_rng(7), 4, 1, (dense, 400, 300))
    rho = 1e-3 * float(ng.EKFAC().damping_scale(signals)[0])
    wanted = ravel(jax.jit(ng.EKFAC().solve)(signals, residual, rho))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (signals, residual))
    found = ravel(jax.jit(ng.EKFAC().solve)(*low, jnp.float32(rho)))
    assert jnp.linalg.norm(found - wanted) < 1e-3 * jnp.linalg.norm(wanted)


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
