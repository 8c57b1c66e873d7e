"""Learning rates from coefficient matrices, and where there are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_MOST_ASYMMETRIC = 1e-3


def check_coefficient(matrix: Any, name: str) -> None:
    """Raises ValueError on a coefficient matrix of a structure that is not finite.

    Args:
      matrix: Theta-bar, any shape.
      name: of the structure.
    """
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"the coefficient matrix of {name} is not finite: its Fisher is singular in "
            f"{np.asarray(matrix).dtype} at this damping, or numbers overflow; use a larger "
            "damping, 0 for the pseudo-inverse, or scale the inputs"
        )


def check_symmetric(matrix: Any, name: str) -> None:
    """Raises ValueError on a Theta-bar(x, x) that rounding has made asymmetric.

    By theory it is symmetric, so what is left of an antisymmetric part says how large its errors
    are: they grow with the condition numbers of the kernels that were inverted.

    Args:
      matrix: shape (n, n), finite.
      name: of the structure.
    """
    size = float(np.max(np.abs(matrix), initial=0))
    asymmetry = float(np.max(np.abs(matrix - matrix.T), initial=0))
    if asymmetry > _MOST_ASYMMETRIC * size:
        raise ValueError(
            f"the coefficient matrix of {name} is lost in rounding: entries and their mirror "
            f"images differ by {asymmetry:.2g} of {size:.2g}, so ill-conditioned are the kernels "
            "that it inverts (saturated units, samples of very different size); standardise the "
            "inputs, or use a damping"
        )


def largest_eigenvalue(matrix: Any, name: str) -> float:
    """The largest real part of the eigenvalues of a square Theta-bar.

    Raises:
      ValueError: it is not finite.
    """
    check_coefficient(matrix, name)
    return float(np.linalg.eigvals(matrix).real.max())


def rate_of_largest(largest: float, name: str) -> float:
    """1 / lambda_max, the best constant learning rate of the linearised network.

    Raises:
      ValueError: lambda_max is not positive, or so small that its inverse is not finite.
    """
    if not (0 < largest < math.inf and 1 / largest < math.inf):
        raise ValueError(
            f"{name} has no learning rate here: the largest eigenvalue of its coefficient matrix "
            f"is {largest:.3g}, so no step moves the outputs towards their targets. Are all inputs "
            "0, or all units of a layer dead? Use other inputs or other initial parameters"
        )
    return 1 / largest


def rate_of_alpha(alpha: float, name: str) -> float:
    """1 / alpha, with which the linearised network converges in one step.

    Raises:
      ValueError: alpha is not positive, as that of an indefinite coupling can be.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"{name} has no learning rate here: its alpha is {alpha:.3g}, and training needs a "
            "positive one; choose another coupling between the layers"
        )
    return 1 / alpha
