"""Symmetric matrices that may be singular: which eigenvalues count as zero, and solves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_flax.linalg.dense import has_full_rank
from ntk_analysis.empirical import Matrix


def zero_below(side: int, largest: float, asymmetry: float = 0.0) -> float:
    """The size below which an eigenvalue counts as zero: what rounding makes of one.

    Args:
      side: n.
      largest: the largest |eigenvalue|.
      asymmetry: the largest entry of |X - X^T|, which is rounding where X is symmetric by theory.
    """
    return float(max(side * np.finfo(np.float64).eps * largest, side**0.5 * asymmetry))


def symmetric_solve(matrix: Matrix, vectors: Matrix) -> Matrix:
    """X^{-1} V, or X^+ V where X has no full rank.

    Args:
      matrix: X, shape (n, n), symmetric up to rounding; it need not be positive.
      vectors: V, shape (n, k).
    """
    # SciPy takes a third of a second to import, and few programs come here
    import scipy.linalg

    symmetric = (matrix + matrix.T) / 2
    with jax.enable_x64(True):
        regular = has_full_rank(jnp.asarray(symmetric))
    if regular:
        return np.asarray(scipy.linalg.solve(symmetric, vectors, assume_a="pos"))
    values, basis = np.linalg.eigh(symmetric)
    sizes = np.abs(values)
    cutoff = zero_below(len(values), sizes.max(), float(np.abs(matrix - matrix.T).max()))
    kept = sizes > cutoff
    return np.asarray(basis[:, kept] @ (basis[:, kept].T @ vectors / values[kept, None]))
