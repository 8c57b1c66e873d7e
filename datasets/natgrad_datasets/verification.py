"""Checks of files against their known size and SHA-256."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from .catalogue import DataFile
from .errors import DataFileError
from .files import read_file

_ADVICE = "delete it, and it is downloaded again at the next use, or put the right file there"


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, *changed: int) -> str:
    # Size and times of change are part of the key only: a changed file is hashed again.
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(path: Path, file: DataFile) -> None:
    """Check that a file is the one it should be; once per process for an unchanged file.

    What is read afterwards may be another content: see `read_verified`.

    Args:
        path: Where the file is.
        file: What it should be.

    Raises:
        DataFileError: It cannot be read, or has the wrong size or SHA-256.
    """
    try:
        status = path.stat()
        _check_size(path, file, status.st_size)
        changed = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        found = _sha256(str(path.resolve()), status.st_size, *changed)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error}") from error
    _check_digest(path, file, found)


def read_verified(path: Path, file: DataFile) -> bytes:
    """Read a file, and check the very bytes that are returned.

    Args:
        path: Where the file is.
        file: What it should be.

    Returns:
        Its content.

    Raises:
        DataFileError: It cannot be read, or has the wrong size or SHA-256.
    """
    content = read_file(path)
    _check_size(path, file, len(content))
    _check_digest(path, file, hashlib.sha256(content).hexdigest())
    return content


def _check_size(path: Path, file: DataFile, size: int) -> None:
    if size != file.size:
        kind = "truncated" if size < file.size else "not the right file"
        raise DataFileError(
            f"{path} is {kind}: expected {file.size} bytes, found {size}; {_ADVICE}"
        )


def _check_digest(path: Path, file: DataFile, found: str) -> None:
    if found != file.sha256:
        raise DataFileError(
            f"{path} is corrupted or another file: expected the SHA-256 {file.sha256}, found "
            f"{found}; {_ADVICE}"
        )
