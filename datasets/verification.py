"""Checks of files against their known size and SHA-256."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from .catalogue import DataFile
from .errors import DataFileError


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    # Size and time of change are part of the key only: a changed file is hashed again.
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(path: Path, file: DataFile) -> None:
    """Check that a file is the one it should be; once per process for an unchanged file.

    Args:
        path: Where the file is.
        file: What it should be.

    Raises:
        DataFileError: It cannot be read, or has the wrong size or SHA-256.
    """
    advice = "delete it, and it is downloaded again at the next use, or put the right file there"
    try:
        status = path.stat()
        if status.st_size != file.size:
            kind = "truncated" if status.st_size < file.size else "not the right file"
            raise DataFileError(
                f"{path} is {kind}: expected {file.size} bytes, found {status.st_size}; {advice}"
            )
        found = _sha256(str(path.resolve()), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error}") from error
    if found != file.sha256:
        raise DataFileError(
            f"{path} is corrupted or another file: expected the SHA-256 {file.sha256}, found "
            f"{found}; {advice}"
        )
