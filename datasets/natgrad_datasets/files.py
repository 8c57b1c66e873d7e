"""Reading of files that may be anything: no pipe is waited for, and nothing endless is read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import DataFileError

LARGEST = 2**30
"""Bytes of the largest content that is read; the largest of the catalogue has 47 million."""


def read_file(path: Path) -> bytes:
    """Read a file into memory.

    Args:
        path: Where it is.

    Returns:
        Its content.

    Raises:
        DataFileError: It cannot be read, is no file but a folder, a pipe or a device, or has more
            than LARGEST bytes.
    """
    try:
        # Without the flag, which Windows lacks, a pipe would be waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise DataFileError(f"{path}: it is a folder, a pipe or a device, not a file")
            if status.st_size > LARGEST:
                raise DataFileError(
                    f"{path}: it has {status.st_size} bytes, more than any data file ({LARGEST})"
                )
            with open(handle, "rb", closefd=False) as stream:
                return stream.read(status.st_size)
        finally:
            os.close(handle)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error})") from error
