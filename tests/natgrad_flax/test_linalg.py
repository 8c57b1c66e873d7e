"""Dense solves and their rank decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_flax.linalg.dense import inverse_psd, lu_solve, pinv_solve, solve_psd

pytestmark = pytest.mark.usefixtures("x64")


def spd(n, rank=None):
    factor = np.random.default_rng(n).normal(size=(n, rank or n + 5))
    return factor @ factor.T


@pytest.mark.parametrize("n", [1, 7, 161, 515, 1001])
def test_inverse_of_a_definite_matrix(n):
    matrix = spd(n) + 0.1 * np.eye(n)
    found = jax.jit(lambda m: inverse_psd(m, shifted=True))(matrix)
    np.testing.assert_allclose(found @ matrix, np.eye(n), atol=1e-8)


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
