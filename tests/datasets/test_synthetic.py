"""Synthetic Gaussian data."""

import numpy as np
from natgrad_datasets.synthetic import gaussian


def test_standard_normal():
    x_train, _, x_test, _ = gaussian(4000, 3000, input_dim=5, num_classes=3, seed=0)
    assert x_train.shape == (4000, 5)
    assert x_test.shape == (3000, 5)
    # Six standard errors of the mean and of the covariances.
    assert np.abs(x_train.mean(axis=0)).max() < 6 / np.sqrt(4000)
    assert np.abs(np.cov(x_train.T) - np.eye(5)).max() < 6 * np.sqrt(2 / 4000)


def test_labels_are_linear_and_shared_by_both_sets():
    x_train, labels_train, x_test, labels_test = gaussian(5000, 500, 4, 2, seed=1)
    weights, *_ = np.linalg.lstsq(x_train, 1.0 - 2.0 * labels_train, rcond=None)
    assert np.mean((x_test @ weights < 0) == labels_test) > 0.97


def test_all_classes_occur():
    _, labels, _, _ = gaussian(500, 1, 6, 4, seed=2)
    assert set(labels) == {0, 1, 2, 3}


def test_first_samples_do_not_depend_on_the_number():
    few = gaussian(10, 5, 3, 2, seed=4)
    many = gaussian(30, 50, 3, 2, seed=4)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b[: len(a)])


def test_seed_and_streams():
    same, other = gaussian(10, 10, 3, 2, seed=5), gaussian(10, 10, 3, 2, seed=6)
    np.testing.assert_array_equal(same[0], gaussian(10, 10, 3, 2, seed=5)[0])
    assert not np.allclose(same[0], other[0])
    assert not np.allclose(same[0], same[2])
