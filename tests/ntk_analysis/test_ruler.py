"""The errors and the pseudo-inverse that all checks measure with."""

from __future__ import annotations

import numpy as np
import pytest

from ntk_analysis.reproduce.registry import above, below, close
from ntk_analysis.reproduce.ruler import CUTOFF, max_abs_error, pseudo_inverse, relative_error


def test_errors_are_those_of_their_names():
    found, expected = np.array([[1.0, 5.0], [0.0, 0.0]]), np.array([[1.0, 2.0], [4.0, 2.0]])
    assert max_abs_error(found, expected) == 4
    assert relative_error(found, expected) == pytest.approx(np.sqrt(29 / 25))
    # neither overflows where its result does not
    assert relative_error(1.5e200 * expected, 1e200 * expected) == pytest.approx(0.5)


def test_a_bound_on_an_error_says_in_which_norm():
    errors = [relative_error([1.0], [2.0]), relative_error([3.0], [2.0])]
    assert below("a", max(errors), 1).expected == "≤ 1 (relative, Frobenius)"
    assert above("a", min(errors), 1).expected == "≥ 1 (relative, Frobenius)"
    assert below("a", max_abs_error([1.0], [2.0]), 1).expected == "≤ 1 (largest entry)"
    assert below("a", 0.5, 1).expected == "≤ 1"
    assert close("a", 0.5, 1, 1).expected == "1 ± 1"


@pytest.mark.parametrize("symmetric", [True, False])
def test_pseudo_inverse_of_an_indefinite_matrix(symmetric):
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    # the last is on the other side of the cut-off
    matrix = vectors @ np.diag([3.0, -2.0, 0.5, 1e-9, 0.01 * CUTOFF]) @ vectors.T
    expected = vectors @ np.diag([1 / 3, -1 / 2, 2.0, 1e9, 0.0]) @ vectors.T
    np.testing.assert_allclose(pseudo_inverse(matrix, symmetric), expected, atol=1e4)
    again = vectors[:, :3] * [3.0, -2.0, 0.5]
    wanted = np.diag([1 / 3, -1 / 2, 2.0]) @ vectors[:, :3].T
    np.testing.assert_allclose(pseudo_inverse(again), wanted, atol=1e-12)
