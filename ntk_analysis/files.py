"""Files that are written whole or not at all, in a folder that one run at a time owns."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG_DPI = 200


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside it, to the disk, then renames.

    The mode of the file follows the umask; a link is replaced, and what it led to stays.

    Raises:
      OSError: the folder cannot be written to; what was there stays. It names ``path``.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_figure(figure: Figure, *paths: Path, description: str | None = None) -> list[Path]:
    """Writes a figure, each file whole or not at all.

    Args:
      figure: what is drawn.
      paths: that end with .png or .svg; equal figures are equal files, as they hold no date.
      description: kept in SVG files.

    Returns:
      The paths.

    Raises:
      OSError: a folder cannot be written to.
    """
    for path in paths:
        content, kind = BytesIO(), path.suffix.removeprefix(".")
        if kind == "svg":
            metadata = {"Date": None} | ({"Description": description} if description else {})
            figure.savefig(content, format=kind, metadata=metadata)
        else:
            figure.savefig(content, format=kind, dpi=_PNG_DPI)
        replace_file(path, content.getvalue())
    return list(paths)


def keep_copy(path: Path) -> Path:
    """Copies a file beside itself under a name that is free: results.1.json for results.json.

    Raises:
      OSError: the folder cannot be written to.
    """
    number = 1
    while os.path.lexists(copy := path.with_suffix(f".{number}{path.suffix}")):
        number += 1
    replace_file(copy, path.read_bytes())
    return copy


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and owns it: no other run owns it before the context or the process ends.

    The folder itself is locked (flock(2)), so that nothing of the lock can be left behind; a system
    that cannot lock folders, as Windows and NFS, keeps nobody out. A folder that was made here and
    is empty in the end is removed.

    Raises:
      ValueError: another run owns it.
      OSError: it cannot be made or written to, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(errno.ENOTDIR, "it is not a folder; choose another --out", str(folder))
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_writable(folder)
        with _lock(folder):
            yield
    finally:
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()


def _check_writable(folder: Path) -> None:
    """Raises OSError before any work where nothing could be kept of it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {folder}; wait until it has ended, or choose another "
                "--out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(handle)
