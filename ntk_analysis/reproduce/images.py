"""Real images for checks, as the paper prepares them; a check downloads nothing."""

from __future__ import annotations

import natgrad_datasets
from natgrad_datasets import Dataset

from ntk_analysis.reproduce.registry import MissingDataError

_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def require(name: str) -> None:
    """Refuses where images are missing.

    Args:
      name: "mnist" or "cifar10".

    Raises:
      MissingDataError: the files are not on this machine; nothing is downloaded here.
    """
    status = next(row for row in natgrad_datasets.status() if row.name == name)
    if not status.usable:
        raise MissingDataError(
            f"this check needs {_NAMES[name]}, whose files are {status.checksum} on this machine: "
            f"set NATGRAD_DATA to a folder with the files in its sub-folder {name}, or fetch them "
            f'once with natgrad_datasets.load("{name}")'
        )


def images(
    name: str, classes: tuple[int, ...], num_train: int, num_test: int, dtype: str = "float32"
) -> Dataset:
    """Standardised images of unit norm: as many as asked for, or as there are.

    Args:
      name: "mnist" or "cifar10".
      classes: class ids; two give targets +-0.5, more one-hot.
      num_train: N at most.
      num_test: N' at most.
      dtype: of inputs and targets.

    Raises:
      MissingDataError: the files are not on this machine; nothing is downloaded here.
    """
    require(name)
    everything = natgrad_datasets.load(name, classes=classes, prepare=False)
    return natgrad_datasets.load(
        name,
        classes=classes,
        num_train=min(num_train, everything.num_train),
        num_test=min(num_test, everything.num_test),
        dtype=dtype,
    )


def mnist_pair(classes: tuple[int, int], num_test: int, num_train: int = 100) -> Dataset:
    """Two digits of MNIST, targets +-0.5.

    Args:
      classes: the two digits.
      num_test: N'.
      num_train: N.

    Raises:
      MissingDataError: MNIST is not on this machine.
    """
    return images("mnist", classes, num_train, num_test)
