"""Preparation of inputs and labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from natgrad_datasets import DatasetError, encode_labels, prepare, standardise, unit_norm


@pytest.fixture
def samples():
    return np.random.default_rng(1).uniform(0.0, 3.0, (7, 4, 5))


def test_standardise_is_global(samples):
    result = standardise(samples)
    assert result.shape == samples.shape
    assert result.mean() == pytest.approx(0.0, abs=1e-14)
    assert result.std() == pytest.approx(1.0, abs=1e-14)
    # One affine map for all components, so differences keep their ratio.
    np.testing.assert_allclose(
        (result - result[0, 0, 0]) * samples.std(), samples - samples[0, 0, 0]
    )


def test_unit_norm(samples):
    result = unit_norm(samples)
    np.testing.assert_allclose(np.sqrt((result**2).sum(axis=(1, 2))), 1.0, rtol=1e-14)
    ratio = result / samples
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape))
    assert (ratio > 0).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_unit_norm_without_under_or_overflow(scale):
    np.testing.assert_allclose(unit_norm(np.array([[3.0, 4.0]]) * scale), [[0.6, 0.8]])


def test_prepare_is_standardise_then_unit_norm():
    x = np.array([[0.0, 1.0], [2.0, 5.0]])
    centred = x - 2.0
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(prepare(x), expected, rtol=1e-14)


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_prepare_ignores_scale_and_shift(scale, shift):
    x = np.array([[0.0, 1.0, 4.0], [2.0, 5.0, 3.0]])
    np.testing.assert_allclose(prepare(scale * x + shift), prepare(x), atol=1e-8)


def test_input_is_not_changed(samples):
    copy = samples.copy()
    prepare(samples)
    np.testing.assert_array_equal(samples, copy)


def test_two_classes_are_plus_and_minus_half():
    assert encode_labels([0, 1, 1, 0], 2).tolist() == [[0.5], [-0.5], [-0.5], [0.5]]


def test_more_classes_are_one_hot():
    assert encode_labels([2, 0], 3).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: standardise(np.full((2, 3), 7.0)), "constant data: all 6 values are 7.0"),
        (lambda: standardise([[1.0, np.nan], [0.0, 1.0]]), "NaN or infinite.*sample 0"),
        (lambda: unit_norm([[1.0, 0.0], [np.inf, 1.0]]), "NaN or infinite.*sample 1"),
        (lambda: unit_norm([[1.0, 0.0], [0.0, 0.0]]), "norm zero, the first has index 1"),
        (lambda: standardise(np.arange(3.0)), "non-empty with samples"),
        (lambda: prepare(np.zeros((0, 3))), "non-empty with samples"),
        (lambda: prepare([["a", "b"]]), "array of real numbers"),
        (lambda: encode_labels([0, 0], 1), "at least 2, got 1"),
        (lambda: encode_labels([0, 3], 3), r"in 0\.\.\.2, got values from 0 to 3"),
        (lambda: encode_labels([-1, 0], 2), r"in 0\.\.\.1, got values from -1 to 0"),
        (lambda: encode_labels([0.0, 1.0], 2), "vector of integers"),
        (lambda: encode_labels([[0], [1]], 2), "vector of integers"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DatasetError, match=message):
        call()


def test_dataset_error_is_a_value_error():
    assert issubclass(DatasetError, ValueError)
