"""Separable two-class data."""

import numpy as np
import pytest
from natgrad_datasets.errors import DatasetError
from natgrad_datasets.separable import planar, sparse_classification


def test_planar_products_do_not_depend_on_the_seed():
    (x, y), (other_x, other_y) = planar(0), planar(1)
    assert x.shape == (10, 2)
    assert sorted(y) == [-1] * 5 + [1] * 5
    assert (y != other_y).any()
    np.testing.assert_array_equal(y[:, None] * x, other_y[:, None] * other_x)
    # every point is on the positive side of the first axis
    assert np.all(y * x[:, 0] >= 0.9)
    np.testing.assert_array_equal(x, planar(0)[0])


def test_labels_are_the_sign_of_the_relevant_inputs():
    data = sparse_classification(3000, 200, input_dim=6, num_relevant=2, seed=3)
    np.testing.assert_array_equal(data.teacher, [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(data.y_train, np.sign(data.x_train[:, :2].sum(axis=1)))
    np.testing.assert_array_equal(data.y_test, np.sign(data.x_test[:, :2].sum(axis=1)))
    # six standard errors
    assert abs(data.y_train.mean()) < 6 / np.sqrt(3000)
    assert np.abs(np.cov(data.x_train.T) - np.eye(6)).max() < 6 * np.sqrt(2 / 3000)


def test_first_samples_do_not_depend_on_the_number():
    few = sparse_classification(4, 3, 5, 2, seed=1)
    many = sparse_classification(20, 30, 5, 2, seed=1)
    for a, b in zip(few[:4], many[:4], strict=True):
        np.testing.assert_array_equal(a, b[: len(a)])


def test_sets_and_seeds_differ():
    one, other = (sparse_classification(5, 5, 4, 1, seed=seed) for seed in (0, 1))
    assert not np.allclose(one.x_train, one.x_test)
    assert not np.allclose(one.x_train, other.x_train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 4, 1, 0), "num_train must be an integer of at least 1"),
        ((5, 0, 4, 1, 0), "num_test"),
        ((5, 5, 0, 1, 0), "input_dim"),
        ((5, 5, 4, 5, 0), "num_relevant must be at most input_dim = 4"),
        ((5, 5, 4, 1, -1), "seed"),
        ((5, 5, 4, 1.0, 0), "num_relevant must be an integer"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(DatasetError, match=message):
        sparse_classification(*arguments)


def test_bad_seed_of_the_planar_points():
    with pytest.raises(DatasetError, match="seed must be an integer"):
        planar("0")
