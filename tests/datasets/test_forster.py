"""The Forster transform."""

import numpy as np
import pytest
import scipy.linalg
from natgrad_datasets import DatasetError, forster_transform


def gaussian(num_points, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((num_points, dim))


def assert_isotropic(z, rank, tolerance=1e-9):
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1.0, rtol=1e-13)
    np.testing.assert_allclose(z.T @ z, len(z) / rank * np.eye(rank), atol=tolerance)


def test_isotropic_position():
    result = forster_transform(gaussian(20, 6))
    assert_isotropic(result.x_train, 6)
    assert result.rank == 6
    assert result.matrix.shape == (6, 6)
    assert result.iterations < 60
    assert result.x_test is None


def test_tolerance_is_the_stopping_criterion():
    loose = forster_transform(gaussian(20, 6), tolerance=1e-3)
    tight = forster_transform(gaussian(20, 6), tolerance=1e-10)
    target = 20 / 6 * np.eye(6)

    def residual(z):
        return np.linalg.norm(z.T @ z - target) / np.linalg.norm(target)

    assert 1e-10 < residual(loose.x_train) < 1e-3
    assert residual(tight.x_train) < 1e-10
    assert loose.iterations < tight.iterations


def test_one_linear_map_equals_the_steps():
    x = gaussian(20, 6)
    result = forster_transform(x)
    z = x
    for _ in range(result.iterations):
        z = z @ scipy.linalg.inv(scipy.linalg.sqrtm(z.T @ z))
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
    # The row space is expressed in another orthonormal basis, which angles do not see.
    np.testing.assert_allclose(result.x_train @ result.x_train.T, z @ z.T, atol=1e-12)
    by_map = x @ result.matrix
    by_map /= np.linalg.norm(by_map, axis=1, keepdims=True)
    np.testing.assert_allclose(result.x_train, by_map, atol=1e-12)


@pytest.mark.parametrize(
    ("points", "rank"),
    [
        (np.hstack([gaussian(30, 4), np.zeros((30, 2)), np.ones((30, 1))]), 5),
        (gaussian(30, 4) @ gaussian(4, 9, seed=1), 4),
        (gaussian(5, 12), 5),
    ],
    ids=["constant components", "low rank", "fewer points than components"],
)
def test_rank_deficient(points, rank):
    result = forster_transform(points, points[:3])
    assert result.rank == rank
    assert result.matrix.shape == (points.shape[1], rank)
    assert_isotropic(result.x_train, rank)
    np.testing.assert_allclose(result.x_test, result.x_train[:3], atol=1e-12)


def test_rank_tolerance_drops_small_directions():
    points = np.hstack([gaussian(30, 3), 1e-7 * gaussian(30, 1, seed=5)])
    assert forster_transform(points).rank == 4
    result = forster_transform(points, rank_tolerance=1e-4)
    assert result.rank == 3
    assert_isotropic(result.x_train, 3)


def test_test_points_get_the_map_of_the_training_points():
    train, test = gaussian(40, 5), gaussian(15, 5, seed=9)
    result = forster_transform(train, test)
    expected = test @ result.matrix
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(result.x_test, expected, atol=1e-13)
    np.testing.assert_array_equal(result.apply(test), result.x_test)
    np.testing.assert_array_equal(forster_transform(train).matrix, result.matrix)
    # Fitted on the training points only: the test points are not in isotropic position.
    assert np.abs(result.x_test.T @ result.x_test - 3 * np.eye(5)).max() > 0.1


def test_lengths_of_the_points_do_not_matter():
    x = gaussian(20, 6)
    lengths = np.random.default_rng(3).uniform(1e-3, 1e3, (20, 1))
    result = forster_transform(lengths * x)
    reference = forster_transform(x)
    np.testing.assert_allclose(
        result.x_train @ result.x_train.T, reference.x_train @ reference.x_train.T, atol=1e-11
    )


def test_badly_conditioned_points():
    points = gaussian(30, 4) * [1.0, 1.0, 1e-5, 1e-10]
    result = forster_transform(points)
    assert result.rank == 4
    assert_isotropic(result.x_train, 4)
    np.testing.assert_allclose(result.apply(points), result.x_train, atol=1e-5)


def test_not_in_general_position():
    # Half of the points on one line in three dimensions: more than a third.
    points = gaussian(20, 3)
    points[:10] = [1.0, 0.0, 0.0]
    with pytest.raises(DatasetError, match=r"did not converge.*not in general position"):
        forster_transform(points, max_iterations=200)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forster_transform([[1.0, 0.0], [0.0, 0.0]]), "row 1 of x_train is zero"),
        (lambda: forster_transform(np.eye(2), np.zeros((1, 2))), "row 0 of x_test is zero"),
        (lambda: forster_transform([[1.0, np.nan]]), "x_train holds NaN"),
        (lambda: forster_transform(np.eye(2), [[np.inf, 0.0]]), "x_test holds NaN or inf"),
        (lambda: forster_transform(np.ones((2, 2, 2))), r"shape \(N, M0\)"),
        (lambda: forster_transform(np.eye(2), np.eye(3)), "3 components per point, x_train has 2"),
        (
            lambda: forster_transform([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [[0.0, 0.0, 2.0]]),
            "row 0 of x_test is orthogonal",
        ),
        (lambda: forster_transform(np.eye(2), tolerance=0.0), "tolerance must be"),
        (lambda: forster_transform(np.eye(2), max_iterations=0), "max_iterations must be"),
        (lambda: forster_transform(np.eye(2), rank_tolerance=-1.0), "rank_tolerance must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DatasetError, match=message):
        call()
