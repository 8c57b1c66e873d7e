"""Regression on a random linear network with ill-conditioned Gaussian inputs.

The data of Bernacchia, Lengyel & Hennequin (2018, Section 5 and Fig. 1): a random deep linear
network is to be recovered from its noisy outputs on correlated inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .arguments import check_integer, check_number, is_sequence
from .errors import DatasetError
from .memory import check_fits


@dataclass(frozen=True)
class LinearTeacherSetting:
    """One of the three linear experiments of the paper.

    Attributes:
        widths: (n_0, ..., n_L), of teacher and student alike.
        sgd_learning_rate: The learning rate of stochastic gradient descent in the paper.
        examples: Number of training examples seen at the end of the figure.
        num_train: Size of the training set.
        num_test: Size of the test set.
        sgd_batch: Batch of stochastic gradient descent.
        natural_gradient_batch: Batch of natural-gradient descent, whose learning rate is 1.
    """

    widths: tuple[int, ...]
    sgd_learning_rate: float
    examples: int
    num_train: int = 10_000
    num_test: int = 1_000
    sgd_batch: int = 20
    natural_gradient_batch: int = 1_000


LINEAR_TEACHER_SETTINGS: Mapping[str, LinearTeacherSetting] = MappingProxyType(
    {
        "BE-Fig1A": LinearTeacherSetting((20,) * 17, 0.08, 80_000),
        "BE-Fig1B": LinearTeacherSetting((*range(20, 101, 10), *range(90, 19, -10)), 0.08, 80_000),
        "BE-Fig1C": LinearTeacherSetting(
            (200, 80, 34, 20, 10, 5, 2, 5, 10, 20, 34, 80, 200), 0.02, 200_000
        ),
    }
)
"""The settings of Fig. 1 A (square), B (not square) and C (with a bottleneck), by identifier."""


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """Samples of a linear teacher, and what is known of their distribution.

    Attributes:
        x_train: Training inputs, shape (num_train, n_0).
        y_train: Training targets, shape (num_train, n_L).
        x_test: Test inputs, shape (num_test, n_0).
        y_test: Test targets, shape (num_test, n_L).
        weights: W*, the teacher as one matrix: y = x W* + noise; shape (n_0, n_L).
        covariance: That of the inputs, shape (n_0, n_0).
        noise_variance: That of each target about x W*: the least achievable mean squared error.
    """

    x_train: NDArray[np.float64]
    y_train: NDArray[np.float64]
    x_test: NDArray[np.float64]
    y_test: NDArray[np.float64]
    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    noise_variance: float


def linear_teacher(
    widths: Sequence[int],
    num_train: int,
    num_test: int,
    seed: int,
    *,
    noise_variance: float = 1e-6,
    decay: float = 5.0,
) -> LinearTeacher:
    """Draw a linear teacher and samples of it.

    Inputs are N(0, Sigma) with random orthogonal eigenvectors and the eigenvalues
    exp(-decay i / n_0), i = 0, ..., n_0 - 1; targets are those of a random deep linear network plus
    N(0, noise_variance) noise. Teacher, eigenvectors, inputs and noise of both sets are drawn from
    streams of their own, so the first n samples do not depend on how many are drawn. The paper does
    not state the distribution of the teacher: see ``random_linear_network``.

    Args:
        widths: (n_0, ..., n_L) of the teacher.
        num_train: Number of training samples.
        num_test: Number of test samples.
        seed: Seed of all random numbers.
        noise_variance: Variance of the noise of each target.
        decay: How fast the eigenvalues fall; 5 in the paper, a condition number below 148.

    Returns:
        The samples, the teacher and the covariance.

    Raises:
        DatasetError: Widths or numbers of samples that are not positive integers, fewer than two
            widths, a seed, variance or decay that is negative or no number, or samples that would
            not fit into memory.

    Example:
        >>> import natgrad_datasets, numpy as np
        >>> data = natgrad_datasets.linear_teacher(
        ...     (4, 6, 2), 100, 10, seed=0, noise_variance=0.0
        ... )
        >>> data.x_train.shape, data.y_train.shape, data.weights.shape
        ((100, 4), (100, 2), (4, 2))
        >>> bool(np.allclose(data.y_train, data.x_train @ data.weights))
        True
    """
    samples = check_integer(num_train, "num_train", 1) + check_integer(num_test, "num_test", 1)
    noise_variance = check_number(noise_variance, "noise_variance")
    decay = check_number(decay, "decay")
    sizes = _checked(widths)
    ends = sizes[0] + sizes[-1]
    check_fits(samples * ends + sizes[0] ** 2, f"{samples} samples of {ends} inputs and outputs")
    factors = random_linear_network(widths, seed)
    weights = np.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]
    axes_seed, *sample_seeds = np.random.SeedSequence(seed).spawn(6)[1:]
    inputs, outputs = weights.shape
    gaussian = np.random.default_rng(axes_seed).standard_normal((inputs, inputs))
    axes, triangle = np.linalg.qr(gaussian)
    # with this choice of signs the eigenvectors are uniform over the orthogonal group
    axes = axes * np.sign(np.diagonal(triangle))
    with np.errstate(over="ignore"):  # of a decay after which nothing is left
        eigenvalues = np.exp(-decay * np.arange(inputs) / inputs)
    root = np.sqrt(eigenvalues)[:, None] * axes.T

    def draw(number: int, seeds: list[np.random.SeedSequence]) -> tuple[NDArray[np.float64], ...]:
        x = np.random.default_rng(seeds[0]).standard_normal((number, inputs)) @ root
        noise = np.random.default_rng(seeds[1]).standard_normal((number, outputs))
        return x, x @ weights + np.sqrt(noise_variance) * noise

    x_train, y_train = draw(num_train, sample_seeds[:2])
    x_test, y_test = draw(num_test, sample_seeds[2:])
    return LinearTeacher(
        x_train,
        y_train,
        x_test,
        y_test,
        weights,
        covariance=(axes * eigenvalues) @ axes.T,
        noise_variance=noise_variance,
    )


def random_linear_network(widths: Sequence[int], seed: int) -> list[NDArray[np.float64]]:
    """The weights of a random linear network, entries N(0, 1 / fan-in).

    The paper says "random network" only, of teacher and of initial weights; this is our choice. The
    teacher of ``linear_teacher`` is the network of its seed: give students another.

    Args:
        widths: (n_0, ..., n_L).
        seed: Seed of all random numbers.

    Returns:
        W_1, ..., W_L of shapes (n_{i-1}, n_i): the network is x W_1 ... W_L.

    Raises:
        DatasetError: Fewer than two widths, one that is no positive integer, a seed that is none,
            or weights that would not fit into memory.

    Example:
        >>> import natgrad_datasets
        >>> [w.shape for w in natgrad_datasets.random_linear_network((4, 6, 2), seed=1)]
        [(4, 6), (6, 2)]
    """
    pairs = list(itertools.pairwise(_checked(widths)))
    check_fits(sum(a * b for a, b in pairs), f"the weights of {len(pairs)} layers")
    seeds = np.random.SeedSequence(check_integer(seed, "seed", 0))
    stream = np.random.default_rng(seeds.spawn(1)[0])
    return [
        stream.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in) for fan_in, fan_out in pairs
    ]


def _checked(widths: Sequence[int]) -> list[int]:
    if not is_sequence(widths):
        raise DatasetError(f"widths must be a sequence of positive integers, got {widths!r}")
    if len(widths) < 2:
        raise DatasetError(f"widths needs two entries at least, got {tuple(widths)}")
    return [check_integer(width, f"widths[{i}]", 1) for i, width in enumerate(widths)]
