"""Synthetic Gaussian data with the labels of a random linear teacher."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arguments import check_integer
from .memory import check_fits


def gaussian(
    num_train: int, num_test: int, input_dim: int, num_classes: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Draw standard normal inputs and label them by a random linear teacher.

    The inputs are i.i.d. N(0, I); the label is the index of the largest of num_classes linear
    scores with standard normal weights. Teacher, training and test set are drawn from streams
    of their own, so the first n samples do not depend on how many are drawn.

    Args:
        num_train: Number of training samples.
        num_test: Number of test samples.
        input_dim: Dimension of the inputs.
        num_classes: Number of classes.
        seed: Seed of all random numbers.

    Returns:
        Training inputs (num_train, input_dim), training labels (num_train,), and the same for
        the test set.

    Raises:
        DatasetError: A number is out of range, or the samples would not fit into memory.
    """
    num_train, num_test, input_dim, num_classes, seed = (
        check_integer(value, name, minimum)
        for value, name, minimum in (
            (num_train, "num_train", 1),
            (num_test, "num_test", 1),
            (input_dim, "input_dim", 1),
            (num_classes, "num_classes", 2),
            (seed, "seed", 0),
        )
    )
    samples = num_train + num_test
    entries = samples * (input_dim + num_classes) + input_dim * num_classes
    check_fits(entries, f"{samples} samples of {input_dim} components and {num_classes} scores")
    teacher_seed, train_seed, test_seed = np.random.SeedSequence(seed).spawn(3)
    teacher = np.random.default_rng(teacher_seed).standard_normal((input_dim, num_classes))
    x_train = np.random.default_rng(train_seed).standard_normal((num_train, input_dim))
    x_test = np.random.default_rng(test_seed).standard_normal((num_test, input_dim))
    labels_train = np.argmax(x_train @ teacher, axis=1).astype(np.int64)
    labels_test = np.argmax(x_test @ teacher, axis=1).astype(np.int64)
    return x_train, labels_train, x_test, labels_test
