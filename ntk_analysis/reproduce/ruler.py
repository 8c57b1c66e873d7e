"""How far a result is from what is expected: the errors and the pseudo-inverse of all checks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntk_analysis.empirical import Matrix

CUTOFF = 1e-12
"""Singular values below this fraction of the largest count as zero, in every check."""


class Error(float):
    """A distance that knows its norm; ``max`` and ``min`` of several keep it.

    Attributes:
      norm: in words, for tables.
    """

    norm: str

    def __new__(cls, value: Any, norm: str) -> Error:
        """The distance in a norm."""
        error = super().__new__(cls, value)
        error.norm = norm
        return error


def max_abs_error(found: Any, expected: Any) -> Error:
    """The largest entry of the difference."""
    return Error(np.abs(np.asarray(found) - np.asarray(expected)).max(), "largest entry")


def relative_error(found: Any, expected: Any) -> Error:
    """The Frobenius norm of the difference over that of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    # squares of entries that are near the largest number are none any more
    scale = np.abs(expected).max()
    difference = np.linalg.norm((found - expected) / scale)
    return Error(difference / np.linalg.norm(expected / scale), "relative, Frobenius")


def pseudo_inverse(matrix: Any, symmetric: bool = False) -> Matrix:
    """The Moore-Penrose inverse, with ``CUTOFF``.

    Args:
      matrix: shape (M, N).
      symmetric: by eigenvalues, of either sign, which is faster.
    """
    return np.linalg.pinv(np.asarray(matrix), rcond=CUTOFF, hermitian=symmetric).astype(np.float64)
