"""Regression on a random linear network with ill-conditioned inputs."""

import numpy as np
import pytest
from natgrad_datasets import DatasetError
from natgrad_datasets.linear_teacher import (
    LINEAR_TEACHER_SETTINGS,
    linear_teacher,
    random_linear_network,
)


def arrays(data):
    return data.x_train, data.y_train, data.x_test, data.y_test


def test_the_covariance_has_the_spectrum_of_the_paper():
    data = linear_teacher((10, 7, 3), 10, 10, seed=0)
    values = np.linalg.eigvalsh(data.covariance)[::-1]
    np.testing.assert_allclose(values, np.exp(-5 * np.arange(10) / 10), rtol=1e-10)
    assert np.abs(data.covariance - np.diag(np.diagonal(data.covariance))).max() > 0.05


def test_inputs_have_that_covariance_in_both_sets():
    data = linear_teacher((6, 4), 20_000, 20_000, seed=1)
    for x in (data.x_train, data.x_test):
        # Six standard errors; no entry has a larger variance than 2.
        assert np.abs(x.T @ x / len(x) - data.covariance).max() < 6 * np.sqrt(2 / len(x))


def test_targets_are_the_network_plus_noise():
    factors = random_linear_network((5, 4, 3), seed=2)
    assert [w.shape for w in factors] == [(5, 4), (4, 3)]
    data = linear_teacher((5, 4, 3), 20_000, 10, seed=2, noise_variance=0.25)
    np.testing.assert_allclose(data.weights, factors[0] @ factors[1], rtol=1e-12)
    noise = data.y_train - data.x_train @ data.weights
    assert abs(np.mean(noise**2) / 0.25 - 1) < 6 * np.sqrt(2 / noise.size)
    assert np.abs(data.x_train.T @ noise / len(noise)).max() < 6 * np.sqrt(0.25 / len(noise))


def test_entries_have_the_variance_of_the_fan_in():
    first, second = random_linear_network((300, 200, 100), seed=3)
    assert abs(300 * first.var() - 1) < 6 * np.sqrt(2 / first.size)
    assert abs(200 * second.var() - 1) < 6 * np.sqrt(2 / second.size)


def test_first_samples_do_not_depend_on_the_number():
    few = linear_teacher((4, 3), 10, 5, seed=4)
    many = linear_teacher((4, 3), 30, 50, seed=4)
    for a, b in zip(arrays(few), arrays(many), strict=True):
        np.testing.assert_allclose(a, b[: len(a)], rtol=1e-12)


def test_seed_and_streams():
    same, other = (linear_teacher((4, 3), 10, 10, seed=s) for s in (5, 6))
    for a, b in zip(arrays(same), arrays(linear_teacher((4, 3), 10, 10, seed=5)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(same.x_train, other.x_train)
    assert not np.allclose(same.x_train, same.x_test)
    assert not np.allclose(same.weights, other.weights)


def test_settings_of_the_figure():
    a, b, c = LINEAR_TEACHER_SETTINGS.values()
    assert list(LINEAR_TEACHER_SETTINGS) == ["BE-Fig1A", "BE-Fig1B", "BE-Fig1C"]
    assert [len(s.widths) - 1 for s in (a, b, c)] == [16, 16, 12]
    assert set(a.widths) == {20}
    assert b.widths[:3] == (20, 30, 40)
    for setting in (b, c):
        assert setting.widths == setting.widths[::-1]
    assert (max(b.widths), min(c.widths)) == (100, 2)
    assert [s.examples // s.natural_gradient_batch for s in (a, b, c)] == [80, 80, 200]
    assert [s.examples // s.sgd_batch for s in (a, b, c)] == [4000, 4000, 10000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), 5, 5, 0), r"widths needs two entries at least, got \(4,\)"),
        (((4, 0), 5, 5, 0), r"widths\[1\] must be an integer of at least 1, got 0"),
        (((4, 3), 0, 5, 0), "num_train must be an integer of at least 1"),
        (((4, 3), 5, 0.5, 0), "num_test must be an integer of at least 1"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(DatasetError, match=message):
        linear_teacher(*arguments)


@pytest.mark.parametrize("name", ["noise_variance", "decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_bad_numbers(name, value):
    with pytest.raises(DatasetError, match=f"{name} must be 0 or positive and finite"):
        linear_teacher((4, 3), 5, 5, 0, **{name: value})
