"""Preparation of inputs and labels, as in Karakida & Osawa (2020), section 4.3."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import check_integer
from .errors import DatasetError
from .memory import check_fits

# squares of numbers beyond 2 to this power, or below its inverse, overflow or vanish
_LARGEST_EXPONENT = 500
# of the mean of standardised data; more is rounding of nearly constant data
_CENTRED = 1e-10


def finite_samples(x: ArrayLike, name: str = "x") -> NDArray[np.float64]:
    """Check an array of samples and convert it to float64.

    Args:
        x: Samples along the first axis, shape (N, ...), with at least two axes.
        name: What to call the array in an error.

    Returns:
        The samples as float64, of the same shape.

    Raises:
        DatasetError: The array is not of real numbers, has masked entries, has fewer than two axes,
            is empty, or holds NaN or infinite values.
    """
    if isinstance(x, np.ma.MaskedArray) and x.mask.any():
        raise DatasetError(f"{name} has masked entries; fill or remove them first")
    try:
        values = np.asarray(x)
        if values.dtype.kind not in "biufO":
            raise TypeError(f"its type is {values.dtype}")
        with np.errstate(over="ignore"):  # to infinity, which is refused below
            samples = values.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{name} must be an array of real numbers: {error}") from error
    if samples.ndim < 2 or samples.size == 0:
        raise DatasetError(
            f"{name} must be non-empty with samples along the first of at least two axes, "
            f"got the shape {samples.shape}"
        )
    finite = np.isfinite(samples)
    if not finite.all():
        first = np.argwhere(~finite)[0]
        raise DatasetError(f"{name} holds NaN or infinite values, first in sample {first[0]}")
    return samples


def standardise(x: ArrayLike) -> NDArray[np.float64]:
    """Subtract the global mean and divide by the global standard deviation.

    One mean and one standard deviation over all samples and all components, as in Karakida &
    Osawa (2020), section 4.3; not one per component.

    Args:
        x: Samples, shape (N, ...).

    Returns:
        Array of the same shape with mean 0 and standard deviation 1.

    Raises:
        DatasetError: The data is constant, not finite, or not an array of samples.

    Example:
        >>> import natgrad_datasets
        >>> # one mean for all
        >>> natgrad_datasets.standardise([[1.0, 1.0], [3.0, 3.0]]).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """
    samples = finite_samples(x)
    if samples.min() == samples.max():
        raise DatasetError(
            f"cannot standardise constant data: all {samples.size} values are {samples.flat[0]}"
        )
    samples = in_range(samples)
    result: NDArray[np.float64] = samples - samples.mean()
    result /= result.std()
    if abs(remainder := result.mean()) > _CENTRED:
        result -= remainder
    return result


def in_range(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale samples by a power of 2, which is exact, where their squares could not be held.

    Args:
        samples: Finite, of any shape, not all zero.

    Returns:
        The samples, or a scaled copy whose largest entry is between 1/2 and 1.
    """
    exponent = int(np.frexp(max(samples.max(), -samples.min()))[1])
    return samples if abs(exponent) <= _LARGEST_EXPONENT else np.ldexp(samples, -exponent)


def unit_norm(x: ArrayLike) -> NDArray[np.float64]:
    """Divide every sample by its Euclidean norm.

    Args:
        x: Samples, shape (N, ...); the norm is taken over all axes but the first.

    Returns:
        Array of the same shape, every sample of norm 1 (Karakida & Osawa 2020, section 4.3).

    Raises:
        DatasetError: A sample has norm zero, or the data is not finite or not an array of samples.

    Example:
        >>> import natgrad_datasets
        >>> natgrad_datasets.unit_norm([[3.0, 4.0], [0.0, -2.0]]).tolist()
        [[0.6, 0.8], [0.0, -1.0]]
    """
    samples = finite_samples(x)
    rows = samples.reshape(len(samples), -1)
    # Scaling by the largest component first keeps tiny and huge samples from under- or overflow.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    zero = np.flatnonzero(largest == 0.0)
    if zero.size:
        raise DatasetError(
            f"cannot normalise {zero.size} sample(s) of norm zero, the first has index {zero[0]}"
        )
    scaled: NDArray[np.float64] = rows / largest
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled.reshape(samples.shape)


def prepare(x: ArrayLike) -> NDArray[np.float64]:
    """Standardise globally, then give every sample unit norm.

    To be applied to the training and the test set apart (Karakida & Osawa 2020, section 4.3).

    Args:
        x: Samples, shape (N, ...).

    Returns:
        Array of the same shape, every sample of norm 1.

    Raises:
        DatasetError: As `standardise` and `unit_norm`.

    Example:
        >>> import natgrad_datasets, numpy as np
        >>> x = natgrad_datasets.prepare([[1.0, 2.0], [3.0, 6.0]])
        >>> np.linalg.norm(x, axis=1).round(6).tolist()
        [1.0, 1.0]
    """
    return unit_norm(standardise(x))


def encode_labels(labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """Encode class indices as regression targets.

    Args:
        labels: Class indices in 0...num_classes-1, shape (N,).
        num_classes: Number of classes, at least 2.

    Returns:
        For two classes, shape (N, 1): +0.5 for index 0 and -0.5 for index 1. Otherwise one-hot,
        shape (N, num_classes). See Karakida & Osawa (2020), section 4.3.

    Raises:
        DatasetError: Fewer than two classes, or labels that are not a vector of such indices.

    Example:
        >>> import natgrad_datasets
        >>> natgrad_datasets.encode_labels([0, 1], 2).tolist()
        [[0.5], [-0.5]]
        >>> natgrad_datasets.encode_labels([2, 0], 3).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    num_classes = check_integer(num_classes, "num_classes", 2)
    try:
        indices = np.asarray(labels)
    except ValueError as error:
        raise DatasetError(f"labels must be a vector of integers: {error}") from error
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise DatasetError(
            f"labels must be a vector of integers, got the shape {indices.shape} and the type "
            f"{indices.dtype}"
        )
    if indices.size and (indices.min() < 0 or indices.max() >= num_classes):
        raise DatasetError(
            f"labels must be in 0...{num_classes - 1}, got values from {indices.min()} to "
            f"{indices.max()}"
        )
    if num_classes == 2:
        return np.where(indices == 0, 0.5, -0.5).reshape(-1, 1)
    check_fits(len(indices) * num_classes, f"{len(indices)} labels of {num_classes} classes")
    encoded = np.zeros((len(indices), num_classes))
    encoded[np.arange(len(indices)), indices] = 1.0
    return encoded
