"""Raw images and labels of the image data sets, in file order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .catalogue import CIFAR10_TEST_NAME, CIFAR10_TRAIN_NAMES, IDX_NAMES, Entry
from .errors import DataFileError
from .formats import parse_cifar, parse_idx
from .store import obtain, present
from .verification import read_verified

HELD_OUT_NOTE = "held-out from data_batch_2, not the official test set"


@dataclass(frozen=True, eq=False)
class RawImages:
    """Images and labels as the source has them.

    Attributes:
        images_train: Unscaled training images, shape (N, H, W, C).
        labels_train: Class ids, shape (N,).
        images_test: Unscaled test images, shape (N_test, H, W, C).
        labels_test: Class ids, shape (N_test,).
        source: Folder of the files, or "embedded".
        notes: What a reader of results should know about the split.
    """

    images_train: NDArray[np.generic]
    labels_train: NDArray[np.integer]
    images_test: NDArray[np.generic]
    labels_test: NDArray[np.integer]
    source: str
    notes: tuple[str, ...] = ()


def _read_digits(entry: Entry) -> RawImages:
    # Imported here, because scikit-learn takes longer to import than all the rest.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.asarray(bunch.images)[..., np.newaxis]
    labels = np.asarray(bunch.target)
    split = entry.num_train
    return RawImages(
        images_train=images[:split],
        labels_train=labels[:split],
        images_test=images[split:],
        labels_test=labels[split:],
        source="embedded",
        notes=(
            f"digits has no official split: the first {split} samples are the training set, "
            f"the last {entry.num_test} are held out",
        ),
    )


def _content(entry: Entry, path: Path) -> bytes:
    return read_verified(path, next(file for file in entry.files if file.name == path.name))


def _read_idx_pair(
    entry: Entry, folder: Path, images_name: str, labels_name: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = (
        parse_idx(_content(entry, folder / name), folder / name, ndim)
        for name, ndim in ((images_name, 3), (labels_name, 1))
    )
    if images.shape[1:] != entry.shape[:2]:
        raise DataFileError(
            f"{folder / images_name}: expected images of {entry.shape[:2]} pixels, found "
            f"{images.shape[1:]}"
        )
    if len(images) != len(labels):
        raise DataFileError(
            f"{folder / labels_name}: expected {len(images)} labels, one for each image in "
            f"{images_name}, found {len(labels)}"
        )
    return images[..., np.newaxis], labels


def _read_idx_set(entry: Entry) -> RawImages:
    folder = obtain(entry)
    images_train, labels_train = _read_idx_pair(entry, folder, IDX_NAMES[0], IDX_NAMES[1])
    images_test, labels_test = _read_idx_pair(entry, folder, IDX_NAMES[2], IDX_NAMES[3])
    return RawImages(images_train, labels_train, images_test, labels_test, str(folder))


def cifar10_split(names: tuple[str, ...]) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """Choose the training and test files among the CIFAR-10 files that are there.

    Args:
        names: Files that are there, at least data_batch_1.bin and one of data_batch_2.bin and
            test_batch.bin.

    Returns:
        Training files, the test file, and notes on what differs from the official split.
    """
    if CIFAR10_TEST_NAME not in names:
        return CIFAR10_TRAIN_NAMES[:1], CIFAR10_TRAIN_NAMES[1], (HELD_OUT_NOTE,)
    num_files = 0
    while num_files < len(CIFAR10_TRAIN_NAMES) and CIFAR10_TRAIN_NAMES[num_files] in names:
        num_files += 1
    train = CIFAR10_TRAIN_NAMES[:num_files]
    if num_files < len(CIFAR10_TRAIN_NAMES):
        return train, CIFAR10_TEST_NAME, (f"training set from {', '.join(train)} only",)
    return train, CIFAR10_TEST_NAME, ()


def _read_cifar_set(entry: Entry) -> RawImages:
    folder = obtain(entry)
    train_names, test_name, notes = cifar10_split(present(entry, folder))
    *batches, (images_test, labels_test) = [
        parse_cifar(_content(entry, folder / name), folder / name)
        for name in (*train_names, test_name)
    ]
    return RawImages(
        images_train=np.concatenate([images for images, _ in batches]),
        labels_train=np.concatenate([labels for _, labels in batches]),
        images_test=images_test,
        labels_test=labels_test,
        source=str(folder),
        notes=notes,
    )


def read_images(entry: Entry) -> RawImages:
    """Read an image data set, downloading its files if they are nowhere.

    Args:
        entry: An image data set.

    Returns:
        All its images and labels, in file order.

    Raises:
        DatasetError: The files are not to be had, or are not what they should be.
    """
    if entry.kind == "idx":
        return _read_idx_set(entry)
    if entry.kind == "cifar":
        return _read_cifar_set(entry)
    return _read_digits(entry)
