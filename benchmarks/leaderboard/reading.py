"""Reading of files that may be anything: nothing is waited for, and nothing endless is read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LARGEST = 2**24
"""Bytes of the largest file that is read; a record with its curve has some ten thousand."""


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
      OSError: it cannot be read, is a folder, a pipe or a device, or has more than LARGEST bytes;
        FileNotFoundError where it is not there.
    """
    # without the flag a named pipe would be waited for
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            reason = "it is a folder, a pipe or a device, not a file"
            raise OSError(errno.EINVAL, reason, str(path))
        if status.st_size > LARGEST:
            raise OSError(errno.EFBIG, f"it has more than {LARGEST // 2**20} MiB", str(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)
