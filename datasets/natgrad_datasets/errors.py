"""Errors of the data-set package.

All of them are `ValueError`s, so that a caller who only wants one clear message can catch that.
"""

from __future__ import annotations


class DatasetError(ValueError):
    """A data set cannot be given as asked: bad argument, or data not to be had.

    Example:
        >>> import natgrad_datasets
        >>> natgrad_datasets.load("digit")
        Traceback (most recent call last):
          ...
        natgrad_datasets.errors.DatasetError: unknown data set 'digit'; did you mean 'digits'? ...
    """


class DataFileError(DatasetError):
    """A data file is truncated, corrupted, or not the file it should be.

    Example:
        >>> import natgrad_datasets
        >>> try:
        ...     data = natgrad_datasets.load("digits")  # or one that has files
        ... except natgrad_datasets.DataFileError as error:
        ...     print(f"remove the damaged file, and it is fetched again: {error}")
        >>> issubclass(natgrad_datasets.DataFileError, natgrad_datasets.DatasetError)
        True
    """


class DownloadError(DatasetError):
    """A data set is not on this machine and could not, or may not, be downloaded.

    Example:
        >>> import natgrad_datasets
        >>> def mnist_or_digits():
        ...     try:
        ...         return natgrad_datasets.load("mnist")
        ...     except natgrad_datasets.DownloadError:
        ...         return natgrad_datasets.load("digits")

        Not run here, as it may fetch 11 MB:

        >>> mnist_or_digits().name  # doctest: +SKIP
        'mnist'
    """
