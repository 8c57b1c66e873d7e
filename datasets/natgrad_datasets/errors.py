"""Errors of the data-set package.

All of them are `ValueError`s, so that a caller who only wants one clear message can catch that.
"""

from __future__ import annotations


class DatasetError(ValueError):
    """A data set cannot be given as asked: bad argument, or data not to be had."""


class DataFileError(DatasetError):
    """A data file is truncated, corrupted, or not the file it should be."""


class DownloadError(DatasetError):
    """A data set is not on this machine and could not, or may not, be downloaded."""
