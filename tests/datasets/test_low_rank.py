"""Low-rank matrices with observed entries."""

import numpy as np
import pytest
from natgrad_datasets.errors import DatasetError
from natgrad_datasets.low_rank import low_rank_matrix, observed_mask


def test_rank_and_scale():
    matrix = low_rank_matrix(30, 4, seed=0)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert np.sum(values > 1e-10) == 4
    np.testing.assert_allclose(np.linalg.norm(matrix), 30)
    np.testing.assert_array_equal(matrix, low_rank_matrix(30, 4, seed=0))
    assert not np.allclose(matrix, low_rank_matrix(30, 4, seed=1))
    # two different factors: the matrix is not symmetric
    assert not np.allclose(matrix, matrix.T)


def test_masks_are_nested():
    few, many = (observed_mask((12, 9), count, seed=2) for count in (20, 60))
    assert few.sum() == 20
    assert many.sum() == 60
    assert few.shape == (12, 9)
    assert np.all(many[few])
    assert observed_mask((12, 9), 108, seed=2).all()
    assert (few != observed_mask((12, 9), 20, seed=3)).any()


def test_masks_are_uniform():
    frequency = np.mean([observed_mask((4, 5), 10, seed=seed) for seed in range(2000)], axis=0)
    # five standard errors of a frequency of 1/2
    assert np.abs(frequency - 0.5).max() < 5 * 0.5 / np.sqrt(2000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: low_rank_matrix(0, 1, 0), "size must be an integer of at least 1"),
        (lambda: low_rank_matrix(4, 5, 0), "rank must be at most size = 4"),
        (lambda: low_rank_matrix(4, 0, 0), "rank"),
        (lambda: low_rank_matrix(4, 2, None), "seed"),
        (lambda: observed_mask((4, 4), 17, 0), "at most 4 x 4 = 16"),
        (lambda: observed_mask((4, 4), 0, 0), "num_observed"),
        (lambda: observed_mask((4, 0), 1, 0), "every side of the shape"),
        (lambda: observed_mask((4,), 1, 0), r"shape must be \(rows, columns\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DatasetError, match=message):
        call()
