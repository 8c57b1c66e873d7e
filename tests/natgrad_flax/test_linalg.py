"""Dense solves and their rank decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_flax.linalg.dense import inverse_pd, inverse_psd, lu_solve, pinv_solve, solve_psd
from natgrad_flax.operators.coupling import solve_tridiagonal

pytestmark = pytest.mark.usefixtures("x64")


def spd(n, rank=None):
    factor = np.random.default_rng(n).normal(size=(n, rank or n + 5))
    return factor @ factor.T


@pytest.mark.parametrize("n", [1, 7, 161, 515, 1001])
def test_inverse_of_a_definite_matrix(n):
    matrix = spd(n) + 0.1 * np.eye(n)
    found = jax.jit(lambda m: inverse_psd(m, shifted=True))(matrix)
    np.testing.assert_allclose(found @ matrix, np.eye(n), atol=1e-8)


def test_inverse_of_a_matrix_that_is_known_to_be_definite():
    matrix, change = jnp.asarray(spd(9)), jnp.asarray(spd(9, rank=2))
    found, moved = jax.jvp(inverse_pd, (matrix,), (change,))
    expected = np.linalg.inv(matrix)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(moved, -expected @ change @ expected, rtol=1e-9, atol=1e-12)
    assert np.isnan(inverse_pd(-matrix)).all()


@pytest.mark.parametrize("shift", [1e-20, 1e-14])  # without and with a Cholesky factor
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_tridiagonal_systems_of_lost_rank_are_solved_in_the_ranges(depth, shift):
    jacobians = [np.random.default_rng(i).normal(size=(8, 5)) for i in range(depth)]
    sigma = np.eye(depth) + np.eye(depth, k=1) + np.eye(depth, k=-1)
    target = np.random.default_rng(9).normal(size=8)
    duals = solve_tridiagonal(
        sigma, [jnp.asarray(j @ j.T) for j in jacobians], [target] * depth, shift, refine=False
    )
    found = np.concatenate([j.T @ dual for j, dual in zip(jacobians, duals, strict=True)])
    fisher = np.block(
        [
            [s * (i.T @ j) for j, s in zip(jacobians, row, strict=True)]
            for i, row in zip(jacobians, sigma, strict=True)
        ]
    )
    expected = np.linalg.lstsq(fisher, np.concatenate([j.T @ target for j in jacobians]))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("columns", [(), (3,)])
def test_rank_deficient_systems_get_the_pseudo_inverse(columns):
    matrix = spd(9, rank=4)
    rhs = np.random.default_rng(0).normal(size=(9, *columns))
    expected = np.linalg.pinv(matrix, rtol=1e-10) @ rhs
    for found in (
        solve_psd(jnp.asarray(matrix), jnp.asarray(rhs), shifted=False),
        pinv_solve(jnp.asarray(matrix), jnp.asarray(rhs)),
        inverse_psd(jnp.asarray(matrix), shifted=False) @ rhs,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_zero_matrix_has_the_zero_pseudo_inverse():
    np.testing.assert_array_equal(
        solve_psd(jnp.zeros((3, 3)), jnp.ones(3), shifted=False), np.zeros(3)
    )


@pytest.mark.parametrize("columns", [(), (3,)])
def test_definite_and_general_systems(columns):
    rhs = np.random.default_rng(0).normal(size=(9, *columns))
    matrix = spd(9)
    found = solve_psd(jnp.asarray(matrix), jnp.asarray(rhs), shifted=False)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, rhs), atol=1e-9)
    general = np.random.default_rng(1).normal(size=(9, 9))
    found = lu_solve(jnp.asarray(general), jnp.asarray(rhs))
    np.testing.assert_allclose(found, np.linalg.solve(general, rhs), atol=1e-9)
