"""Load a data set: select, prepare, encode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import preparation
from .arguments import check_classes, check_dtype, check_flag, check_integer, find_entry
from .catalogue import CATALOGUE, Entry
from .errors import DatasetError
from .forster import check_rank_tolerance, forster_transform
from .images import read_images
from .synthetic import gaussian

_GAUSSIAN_INPUT_DIM = CATALOGUE["gaussian"].shape[0]
_GAUSSIAN_NUM_CLASSES = CATALOGUE["gaussian"].num_classes


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready for training.

    Attributes:
        name: Name of the data set.
        x_train: Training inputs, shape (N, input_dim) or (N, H, W, C).
        y_train: Encoded training labels, shape (N, output_dim); see `encode_labels`.
        x_test: Test inputs, in the layout of the training inputs.
        y_test: Encoded test labels.
        labels_train: Index into `classes` of every training sample, shape (N,).
        labels_test: Index into `classes` of every test sample.
        classes: The class ids of the full data set that were chosen, in the order of the indices.
        class_names: Names of the chosen classes.
        source: Folder of the files, "embedded" or "synthetic".
        notes: What a reader of results should know, such as a split that is not official.

    Example:
        >>> import natgrad_datasets
        >>> data = natgrad_datasets.load("digits", num_train=100)
        >>> data.x_train.shape, data.y_train.shape, data.classes
        ((100, 64), (100, 10), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
        >>> data.source
        'embedded'
    """

    name: str
    x_train: NDArray[np.floating]
    y_train: NDArray[np.floating]
    x_test: NDArray[np.floating]
    y_test: NDArray[np.floating]
    labels_train: NDArray[np.int64]
    labels_test: NDArray[np.int64]
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str
    notes: tuple[str, ...]

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self.x_train)

    @property
    def num_test(self) -> int:
        """Number of test samples."""
        return len(self.x_test)

    @property
    def input_dim(self) -> int:
        """Number of components of one input."""
        return math.prod(self.x_train.shape[1:])

    @property
    def output_dim(self) -> int:
        """Number of components of one encoded label."""
        return int(self.y_train.shape[1])


@dataclass(frozen=True, eq=False)
class _Samples:
    x_train: NDArray[np.float64]
    labels_train: NDArray[np.int64]
    x_test: NDArray[np.float64]
    labels_test: NDArray[np.int64]
    class_names: tuple[str, ...]
    source: str
    notes: tuple[str, ...]


def _select(
    images: NDArray[np.generic],
    labels: NDArray[np.integer],
    classes: tuple[int, ...],
    count: int | None,
    what: str,
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """First `count` samples, in file order, of the chosen classes; labels become indices."""
    chosen = np.flatnonzero(np.isin(labels, classes))
    if count is not None and count > len(chosen):
        raise DatasetError(
            f"num_{what}={count} is more than there are: {len(chosen)} {what} samples in the "
            f"classes {classes}"
        )
    chosen = chosen[:count]
    index_of = {class_id: index for index, class_id in enumerate(classes)}
    indices = np.array([index_of[int(label)] for label in labels[chosen]], dtype=np.int64)
    return images[chosen], indices


def _images(
    entry: Entry, classes: tuple[int, ...], num_train: int | None, num_test: int | None
) -> _Samples:
    for count, available, what in (
        (num_train, entry.num_train, "train"),
        (num_test, entry.num_test, "test"),
    ):
        if count is not None and count > available:
            raise DatasetError(
                f"num_{what}={count} is more than {entry.name} has: {available} {what} samples"
            )
    raw = read_images(entry)
    train, labels_train = _select(raw.images_train, raw.labels_train, classes, num_train, "train")
    test, labels_test = _select(raw.images_test, raw.labels_test, classes, num_test, "test")
    return _Samples(
        x_train=train.astype(np.float64) / entry.max_value,
        labels_train=labels_train,
        x_test=test.astype(np.float64) / entry.max_value,
        labels_test=labels_test,
        class_names=tuple(entry.class_names[class_id] for class_id in classes),
        source=raw.source,
        notes=raw.notes,
    )


def load(
    name: str = "digits",
    *,
    classes: Sequence[int] | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    layout: Literal["flat", "image"] = "flat",
    prepare: bool = True,
    forster: bool = False,
    dtype: DTypeLike = "float32",
    seed: int = 0,
    input_dim: int | None = None,
    num_classes: int | None = None,
    rank_tolerance: float | None = None,
) -> Dataset:
    """Load a data set.

    Files are searched in the folder named by NATGRAD_DATA, then in the user cache, then
    downloaded into the latter unless NATGRAD_OFFLINE is set. Every file is checked against its
    SHA-256.

    Args:
        name: One of `names()`.
        classes: Class ids to keep, at least two; all by default. Their order gives the indices
            of the labels. Not for "gaussian".
        num_train: Number of training samples: the first ones of the kept classes in file order;
            all by default (1000 for "gaussian").
        num_test: The same for the test set (200 by default for "gaussian").
        layout: "flat" for inputs (N, H*W*C), "image" for (N, H, W, C); the former is the latter
            reshaped, in row-major order.
        prepare: Whether to standardise globally, training and test set apart, and then give
            every sample unit norm (Karakida & Osawa 2020, section 4.3). Otherwise images are
            in [0, 1].
        forster: Whether to apply the Forster transform, fitted on the training inputs, after
            the preparation. The inputs then have as many components as the training inputs have
            rank; needs the layout "flat". Images with pixels that few samples use have no such
            transform, unless `rank_tolerance` drops them.
        dtype: "float32" or "float64", of inputs and encoded labels. All work is in float64.
        seed: Seed of "gaussian"; of no effect on other data sets.
        input_dim: Dimension of "gaussian", 20 by default; for no other data set.
        num_classes: Number of classes of "gaussian", 2 by default; for no other data set.
        rank_tolerance: As in `forster_transform`; only together with `forster`.

    Returns:
        The data set.

    Raises:
        DatasetError: Bad argument; more samples asked for than there are; data that cannot be
            prepared. `DataFileError`, `DownloadError`: its files are damaged or not to be had.

    Example:
        >>> import natgrad_datasets
        >>> data = natgrad_datasets.load(
        ...     "digits", classes=(0, 1), num_train=50, num_test=20
        ... )
        >>> data.x_train.shape, data.y_train.shape  # two classes: one column of +-0.5
        ((50, 64), (50, 1))
        >>> images = natgrad_datasets.load("digits", layout="image", prepare=False)
        >>> images.x_train.shape, float(images.x_train.max())
        ((1437, 8, 8, 1), 1.0)

        Those with files need them, or a network:

        >>> natgrad_datasets.load("mnist", num_train=1000).x_train.shape  # doctest: +SKIP
        (1000, 784)
    """
    entry = find_entry(name)
    float_type = check_dtype(dtype)
    if not isinstance(layout, str) or layout not in ("flat", "image"):
        raise DatasetError(f"layout must be 'flat' or 'image', got {layout!r}")
    prepare, forster = check_flag(prepare, "prepare"), check_flag(forster, "forster")
    rank_tolerance = check_rank_tolerance(rank_tolerance)
    if forster and layout != "flat":
        raise DatasetError("forster mixes the pixels, so it needs layout='flat'")
    if rank_tolerance is not None and not forster:
        raise DatasetError("rank_tolerance is of the Forster transform; give forster=True too")
    num_train = None if num_train is None else check_integer(num_train, "num_train", 1)
    num_test = None if num_test is None else check_integer(num_test, "num_test", 1)
    seed = check_integer(seed, "seed", 0)

    if entry.kind == "synthetic":
        if classes is not None:
            raise DatasetError(f"{entry.name} has no classes to choose from; give num_classes")
        if layout != "flat":
            raise DatasetError(f"{entry.name} has no images; layout must be 'flat'")
        count = check_integer(
            _GAUSSIAN_NUM_CLASSES if num_classes is None else num_classes, "num_classes", 2
        )
        drawn = gaussian(
            num_train or entry.num_train,
            num_test or entry.num_test,
            check_integer(_GAUSSIAN_INPUT_DIM if input_dim is None else input_dim, "input_dim", 1),
            count,
            seed,
        )
        chosen = tuple(range(count))
        samples = _Samples(*drawn, tuple(str(c) for c in chosen), "synthetic", ())
    else:
        if input_dim is not None or num_classes is not None:
            raise DatasetError(f"input_dim and num_classes are for gaussian only, not {entry.name}")
        chosen = check_classes(entry, classes)
        samples = _images(entry, chosen, num_train, num_test)

    x_train, x_test = samples.x_train, samples.x_test
    if layout == "flat":
        x_train = x_train.reshape(len(x_train), -1)
        x_test = x_test.reshape(len(x_test), -1)
    if prepare:
        x_train, x_test = preparation.prepare(x_train), preparation.prepare(x_test)
    if forster:
        fitted = forster_transform(x_train, rank_tolerance=rank_tolerance)
        x_train, x_test = fitted.x_train, fitted.apply(x_test)
    return Dataset(
        name=entry.name,
        x_train=x_train.astype(float_type),
        y_train=preparation.encode_labels(samples.labels_train, len(chosen)).astype(float_type),
        x_test=x_test.astype(float_type),
        y_test=preparation.encode_labels(samples.labels_test, len(chosen)).astype(float_type),
        labels_train=samples.labels_train,
        labels_test=samples.labels_test,
        classes=chosen,
        class_names=samples.class_names,
        source=samples.source,
        notes=samples.notes,
    )
