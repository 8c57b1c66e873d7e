"""The Forster transform: points in radial isotropic position.

For N points that span r dimensions there is, in general position, a linear map after which the
normalised points Z have Z^T Z = (N/r) I (Forster 2002). Zhang, Martens & Grosse (2019) assume
inputs so transformed in their analysis of K-FAC.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from .arguments import check_integer, check_number
from .errors import DatasetError
from .preparation import finite_samples, in_range, unit_norm


@dataclass(frozen=True, eq=False)
class ForsterTransform:
    """A fitted Forster transform and the points it was applied to.

    Attributes:
        x_train: Transformed training points Z, shape (N, r), rows of norm 1, with
            Z^T Z = (N/r) I up to the tolerance.
        x_test: Transformed test points, shape (N_test, r), rows of norm 1; None without any.
        matrix: The map T, shape (M0, r): a point x becomes xT / ||xT||.
        iterations: Number of iterations until convergence.
        rank: The rank r of the training points.

    Example:
        >>> import natgrad_datasets, numpy as np
        >>> x, x_test = np.random.default_rng(0).standard_normal((2, 9, 3))
        >>> found = natgrad_datasets.forster_transform(x, x_test)
        >>> z = x_test @ found.matrix
        >>> bool(np.allclose(found.x_test, z / np.linalg.norm(z, axis=1, keepdims=True)))
        True
    """

    x_train: NDArray[np.float64]
    x_test: NDArray[np.float64] | None
    matrix: NDArray[np.float64]
    iterations: int
    rank: int

    def apply(self, x: ArrayLike) -> NDArray[np.float64]:
        """Apply the fitted map to other points.

        Args:
            x: Points, shape (N, M0).

        Returns:
            The transformed points, shape (N, r), rows of norm 1.

        Raises:
            DatasetError: Points of the wrong shape, zero or not finite; or a point orthogonal to
                all training points, which the map takes to zero.
        """
        points = _points(x, "x_test")
        if points.shape[1] != len(self.matrix):
            raise DatasetError(
                f"x_test has {points.shape[1]} components per point, x_train has {len(self.matrix)}"
            )
        points = unit_norm(points)
        basis, _ = np.linalg.qr(self.matrix)
        inside = np.linalg.norm(points @ basis, axis=1)
        outside = np.flatnonzero(inside < len(self.matrix) * np.finfo(np.float64).eps)
        if outside.size:
            raise DatasetError(
                f"row {outside[0]} of x_test is orthogonal to all training points, so the "
                f"Forster transform maps it to zero"
            )
        return unit_norm(points @ self.matrix)


def _points(x: ArrayLike, name: str) -> NDArray[np.float64]:
    points = finite_samples(x, name)
    if points.ndim != 2:
        raise DatasetError(f"{name} must have the shape (N, M0), got {points.shape}")
    zero = np.flatnonzero(~points.any(axis=1))
    if zero.size:
        raise DatasetError(
            f"the Forster transform needs non-zero points: row {zero[0]} of {name} is zero"
        )
    return points


def check_rank_tolerance(value: object) -> float | None:
    """Check a rank tolerance, which may be None.

    Raises:
        DatasetError: It is no number in [0, 1).
    """
    if value is None:
        return None
    checked = check_number(value, "rank_tolerance")
    if checked >= 1:
        raise DatasetError(f"rank_tolerance must be in [0, 1), got {value!r}")
    return checked


def _whiten(
    points: NDArray[np.float64], rank_tolerance: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orthonormal columns U (N, r) that span those of the points, and W (M0, r) with U = XW.

    This is the first step of the iteration on the row space, by a singular value decomposition
    of X rather than by X^T X, which would square the condition number.
    """
    left, singular, right = scipy.linalg.svd(points, full_matrices=False)
    if rank_tolerance is None:
        rank_tolerance = max(points.shape) * np.finfo(np.float64).eps
    rank = int(np.count_nonzero(singular > rank_tolerance * singular[0]))
    return left[:, :rank], right[:rank].T / singular[:rank]


def _fit(
    points: NDArray[np.float64], tolerance: float, max_iterations: int
) -> tuple[NDArray[np.float64], int]:
    """Find the (r, r) map for whitened points that span all r dimensions."""
    num_points, rank = points.shape
    target = num_points / rank
    matrix = np.eye(rank)
    # the columns of the whitened points are orthonormal
    gram = np.eye(rank)
    residual = np.inf
    for iteration in range(1, max_iterations + 1):
        try:
            root = scipy.linalg.cholesky(gram)
        except scipy.linalg.LinAlgError:
            break
        # Z R^(-1) with Z^T Z = R^T R is Z (Z^T Z)^(-1/2) up to a rotation, which the next step and
        # the residual do not see
        matrix = scipy.linalg.solve_triangular(root, matrix.T, trans="T").T
        # of the scale, which the normalisation of the rows cancels, many steps would run out
        matrix /= np.abs(matrix).max()
        transformed = unit_norm(points @ matrix)
        gram = transformed.T @ transformed
        residual = float(np.linalg.norm(gram / target - np.eye(rank)) / np.sqrt(rank))
        if residual < tolerance:
            return matrix, iteration
    raise DatasetError(
        f"the Forster transform did not converge: relative residual {residual:.1e} after "
        f"{iteration} iteration(s), wanted {tolerance:.1e}. The {num_points} points of rank "
        f"{rank} are probably not in general position: some k-dimensional subspace holds more "
        f"than k*{target:.4g} of them (a component that is non-zero in few samples is enough). "
        f"Remove such components or samples, or raise rank_tolerance or max_iterations"
    )


def forster_transform(
    x_train: ArrayLike,
    x_test: ArrayLike | None = None,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
    rank_tolerance: float | None = None,
) -> ForsterTransform:
    """Bring the training points into radial isotropic position.

    Iterates Z <- Z (Z^T Z)^(-1/2), up to a rotation of all rows, followed by their normalisation,
    until ||Z^T Z - (N/r) I||_F < tolerance * ||(N/r) I||_F. All steps together are one linear map T
    followed by one normalisation. Points that do not span all dimensions are projected onto
    their row space first. T is fitted on the training points only and then applied to the test
    points. See Forster (2002) and Zhang, Martens & Grosse (2019).

    Args:
        x_train: Training points, shape (N, M0).
        x_test: Test points, shape (N_test, M0).
        tolerance: Relative tolerance of the stopping criterion above.
        max_iterations: Largest number of iterations.
        rank_tolerance: Singular values below this fraction of the largest one count as zero;
            by default max(N, M0) times the machine epsilon.

    Returns:
        The transformed points, the map T of shape (M0, r), the iterations and the rank r.

    Raises:
        DatasetError: Points of the wrong shape, zero or not finite; a test point orthogonal to
            all training points; parameters out of range; no convergence, because the points are
            not in general position.

    Example:
        >>> import natgrad_datasets, numpy as np
        >>> x = np.random.default_rng(0).standard_normal((9, 3))
        >>> z = natgrad_datasets.forster_transform(x).x_train
        >>> bool(np.allclose(z.T @ z, 9 / 3 * np.eye(3)))
        True
    """
    if not 0.0 < check_number(tolerance, "tolerance") < 1.0:
        raise DatasetError(f"tolerance must be between 0 and 1, got {tolerance}")
    max_iterations = check_integer(max_iterations, "max_iterations", 1)
    rank_tolerance = check_rank_tolerance(rank_tolerance)
    # the map is the same for points of any common scale
    train = in_range(_points(x_train, "x_train"))
    whitened, whitening = _whiten(train, rank_tolerance)
    inner, iterations = _fit(whitened, tolerance, max_iterations)
    fitted = ForsterTransform(
        x_train=unit_norm(whitened @ inner),
        x_test=None,
        matrix=whitening @ inner,
        iterations=iterations,
        rank=whitened.shape[1],
    )
    return fitted if x_test is None else replace(fitted, x_test=fitted.apply(x_test))
