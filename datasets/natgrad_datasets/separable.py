"""Linearly separable two-class data: a toy in the plane, and a sparse linear teacher."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import check_integer
from .errors import DatasetError
from .memory import check_fits

_PLANAR = (
    (0.9, 1.6),
    (1.7, -0.3),
    (1.15, 0.9),
    (1.0, 2.2),
    (1.05, 2.5),
    (1.1, 2.0),
    (0.95, 1.9),
    (1.2, 2.4),
    (1.9, 0.4),
    (1.0, 2.8),
)


class SparseClassification(NamedTuple):
    """Two-class data with few relevant inputs.

    Attributes:
        x_train: Training inputs (num_train, input_dim).
        y_train: Training labels, -1 or +1, (num_train,).
        x_test: Test inputs (num_test, input_dim).
        y_test: Test labels (num_test,).
        teacher: The coefficients whose sign of x . teacher is the label, (input_dim,).
    """

    x_train: NDArray[np.float64]
    y_train: NDArray[np.float64]
    x_test: NDArray[np.float64]
    y_test: NDArray[np.float64]
    teacher: NDArray[np.float64]


def planar(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ten points in the plane that tell max-margin separators of different norms apart.

    The products y_n x_n are fixed; the seed draws the labels, five of each, and with them the
    signs of the points. The l_2 max-margin separator is at 24.62 degrees from the first axis, the
    l_1/2 one at 0 degrees, the limit of natural-gradient flow from zero at 19.65 degrees. Kerekes
    et al. (2021) do not state the points of their Fig. 2; these are ours.

    Args:
        seed: Seed of the labels.

    Returns:
        Inputs (10, 2) and labels -1 or +1 (10,).

    Raises:
        DatasetError: The seed is not an integer of at least 0.

    Example:
        >>> import natgrad_datasets
        >>> x, y = natgrad_datasets.planar(seed=0)
        >>> x.shape, int((y == 1).sum()), int((y == -1).sum())
        ((10, 2), 5, 5)
    """
    generator = np.random.default_rng(check_integer(seed, "seed", 0))
    labels = generator.permutation(np.repeat([-1.0, 1.0], len(_PLANAR) // 2))
    return labels[:, None] * np.array(_PLANAR), labels


def sparse_classification(
    num_train: int, num_test: int, input_dim: int, num_relevant: int, seed: int
) -> SparseClassification:
    """Draw standard normal inputs, labelled by the sign of the sum of the first few.

    The setting of Kerekes et al. (2021): input_dim 1000 with 20 relevant inputs in Fig. 4, 50 with
    5 in Fig. 6. Training and test set are drawn from streams of their own, so the first n samples
    do not depend on how many are drawn.

    Args:
        num_train: Number of training samples.
        num_test: Number of test samples.
        input_dim: Dimension of the inputs.
        num_relevant: Number of ones in the teacher; the other coefficients are 0.
        seed: Seed of all random numbers.

    Returns:
        Both sets and the teacher.

    Raises:
        DatasetError: A number is out of range, or the samples would not fit into memory.

    Example:
        >>> import natgrad_datasets, numpy as np
        >>> data = natgrad_datasets.sparse_classification(20, 10, 50, 5, seed=0)
        >>> data.x_train.shape, int(data.teacher.sum())
        ((20, 50), 5)
        >>> bool((np.sign(data.x_train @ data.teacher) == data.y_train).all())
        True
    """
    num_train = check_integer(num_train, "num_train", 1)
    num_test = check_integer(num_test, "num_test", 1)
    num_relevant = check_integer(num_relevant, "num_relevant", 1)
    input_dim = check_integer(input_dim, "input_dim", 1)
    if num_relevant > input_dim:
        raise DatasetError(
            f"num_relevant must be at most input_dim = {input_dim}, got {num_relevant}"
        )
    seeds = np.random.SeedSequence(check_integer(seed, "seed", 0)).spawn(2)
    samples = num_train + num_test
    check_fits((samples + 1) * input_dim, f"{samples} samples of {input_dim} components")
    teacher = np.zeros(input_dim)
    teacher[:num_relevant] = 1
    x_train, x_test = (
        np.random.default_rng(stream).standard_normal((num, input_dim))
        for stream, num in zip(seeds, (num_train, num_test), strict=True)
    )
    # a score of exactly 0 would have no sign
    y_train, y_test = (np.where(x @ teacher >= 0, 1.0, -1.0) for x in (x_train, x_test))
    return SparseClassification(x_train, y_train, x_test, y_test, teacher)
