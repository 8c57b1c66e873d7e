"""Reading of files that may be anything: nothing is waited for, and nothing endless is read."""

from __future__ import annotations

import errno
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
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


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed by gzip; none longer than LARGEST bytes.

    Raises:
      OSError: it cannot be read, is no such file, or has a longer line.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else open(path, "rb") as lines:
        try:
            while line := lines.readline(LARGEST + 1):
                if len(line) > LARGEST:
                    reason = f"it has a line of more than {LARGEST // 2**20} MiB"
                    raise OSError(errno.EFBIG, reason, str(path))
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(errno.EINVAL, f"its compression is damaged: {error}", str(path)) from None
