"""Low-rank matrices of which some entries are observed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arguments import check_integer, is_sequence
from .errors import DatasetError
from .memory import check_fits


def low_rank_matrix(size: int, rank: int, seed: int) -> NDArray[np.float64]:
    """Draw a square matrix U V^T with standard normal factors, rescaled to unit mean square.

    The ground truth of matrix completion in Arora et al. (2019) and Kerekes et al. (2021), Fig. 5:
    size 100, rank 5, Frobenius norm 100.

    Args:
        size: Number of rows and of columns, n.
        rank: Number of columns of U and of V.
        seed: Seed of the factors.

    Returns:
        Matrix (size, size) with Frobenius norm n.

    Raises:
        DatasetError: A number is out of range, or the matrix would not fit into memory.

    Example:
        >>> import natgrad_datasets, numpy as np
        >>> matrix = natgrad_datasets.low_rank_matrix(10, 2, seed=0)
        >>> int(np.linalg.matrix_rank(matrix)), round(float(np.linalg.norm(matrix)), 6)
        (2, 10.0)
    """
    size, rank = check_integer(size, "size", 1), check_integer(rank, "rank", 1)
    if rank > size:
        raise DatasetError(f"rank must be at most size = {size}, got {rank}")
    seeds = np.random.SeedSequence(check_integer(seed, "seed", 0)).spawn(2)
    check_fits(size * (size + 2 * rank), f"a matrix of {size} x {size} with its factors")
    u, v = (np.random.default_rng(stream).standard_normal((size, rank)) for stream in seeds)
    matrix = u @ v.T
    return matrix * (size / np.linalg.norm(matrix))


def observed_mask(shape: tuple[int, int], num_observed: int, seed: int) -> NDArray[np.bool_]:
    """Choose observed entries uniformly without replacement.

    The choice is the beginning of one random order of all entries, so with the same seed and shape
    the entries of a smaller choice are among those of a larger one.

    Args:
        shape: Rows and columns.
        num_observed: Number of entries.
        seed: Seed of the order.

    Returns:
        Boolean matrix, True where observed.

    Raises:
        DatasetError: A number is out of range, there are not so many entries, or they would not
            fit into memory.

    Example:
        >>> import natgrad_datasets
        >>> few, many = (
        ...     natgrad_datasets.observed_mask((10, 10), n, seed=0) for n in (20, 50)
        ... )
        >>> int(few.sum()), bool((few <= many).all())  # one random order
        (20, True)
    """
    if not is_sequence(shape) or len(shape) != 2:
        raise DatasetError(f"shape must be (rows, columns), got {shape!r}")
    rows, columns = (check_integer(side, "every side of the shape", 1) for side in shape)
    num_observed = check_integer(num_observed, "num_observed", 1)
    if num_observed > rows * columns:
        raise DatasetError(
            f"num_observed must be at most {rows} x {columns} = {rows * columns}, "
            f"got {num_observed}"
        )
    check_fits(rows * columns, f"an order of {rows} x {columns} entries")
    order = np.random.default_rng(check_integer(seed, "seed", 0)).permutation(rows * columns)
    mask = np.zeros(rows * columns, bool)
    mask[order[:num_observed]] = True
    return mask.reshape(rows, columns)
