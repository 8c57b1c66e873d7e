"""Download of verified files into the user cache."""

from __future__ import annotations

import os
import tarfile
import tempfile
import textwrap
import time
from pathlib import Path

import pooch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .catalogue import Archive, DataFile, Entry
from .errors import DataFileError, DownloadError
from .verification import verify

TRIES_PER_MIRROR = 2
PAUSE_SECONDS = 0.5
CONNECT_TIMEOUT_SECONDS = 4.0
READ_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 1 << 16


class _ProgressBar:
    """Shows a download on standard error, in the form pooch asks of a progress bar."""

    def __init__(self, name: str) -> None:
        self.total = 0
        self._name = name
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, num_bytes: int) -> None:
        self._progress.update(self._task, advance=num_bytes, total=self.total or None)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop()


def by_hand(entry: Entry, folder: Path) -> str:
    """Say where to put the files of a data set by hand.

    Args:
        entry: The data set.
        folder: Its folder in the user cache.

    Returns:
        One or more lines of text.
    """
    lines = [
        f"To place the files by hand, put them under these names into the folder {folder} "
        f"(or into the sub-folder {entry.name}/ of a folder named by the environment variable "
        f"NATGRAD_DATA):"
    ]
    lines += [f"  {file.name}: {file.size} bytes, SHA-256 {file.sha256}" for file in entry.files]
    if entry.archives:
        lines.append(f"They are the members of the archive {entry.archives[0].url}")
    return "\n".join(lines)


def _reason(error: Exception) -> str:
    # A connection error of requests wraps the one that says what happened.
    cause = getattr(error.args[0], "reason", error) if error.args else error
    return textwrap.shorten(f"{type(error).__name__}: {cause}", 240, placeholder=" ...")


def _is_final(error: Exception) -> bool:
    """Whether a second try is pointless: the server said that it has no such file."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500


def _fetch(
    entry: Entry, what: str, sources: list[tuple[str, str]], folder: Path, target: Path
) -> None:
    """Fetch one file from the first of the (address, SHA-256) sources that serves it intact."""
    failures = []
    for url, sha256 in sources:
        for attempt in range(1, TRIES_PER_MIRROR + 1):
            try:
                with _ProgressBar(what) as bar:
                    # pooch writes under a temporary name and renames only what it has verified.
                    pooch.retrieve(
                        url,
                        known_hash=f"sha256:{sha256}",
                        fname=target.name,
                        path=target.parent,
                        downloader=pooch.HTTPDownloader(
                            progressbar=bar,
                            chunk_size=_CHUNK_BYTES,
                            timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS),
                        ),
                    )
                return
            except (OSError, ValueError) as error:
                failures.append(f"  {url} (try {attempt}): {_reason(error)}")
                if _is_final(error):
                    break
                if attempt < TRIES_PER_MIRROR:
                    time.sleep(PAUSE_SECONDS)
    raise DownloadError(
        "\n".join(
            [
                f"could not download {what} of the data set {entry.name}; tried:",
                *failures,
                by_hand(entry, folder),
            ]
        )
    )


def _unpack(entry: Entry, archive: Path, folder: Path, scratch: Path) -> None:
    """Move the files of the data set from an archive into the folder, verified."""
    wanted = {file.name: file for file in entry.files}
    unpacked: dict[str, Path] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                source = tar.extractfile(member) if name in wanted and member.isfile() else None
                if source is None:
                    continue
                unpacked[name] = scratch / name
                with source, unpacked[name].open("wb") as out:
                    while chunk := source.read(1 << 20):
                        out.write(chunk)
    except (tarfile.TarError, EOFError) as error:
        raise DataFileError(f"{archive}: cannot be unpacked ({error})") from error
    missing = sorted(set(wanted) - set(unpacked))
    if missing:
        raise DataFileError(f"{archive}: the archive does not hold {', '.join(missing)}")
    for name, path in unpacked.items():
        verify(path, wanted[name])
    # The first file is needed by every use of the data set. It comes last, so that a folder left
    # by an interrupted run never looks like a usable part of the data set.
    for file in reversed(entry.files):
        os.replace(unpacked[file.name], folder / file.name)


def _fetch_archive(entry: Entry, archives: tuple[Archive, ...], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpacking-") as scratch:
        target = Path(scratch) / Path(archives[0].url).name
        sources = [(archive.url, archive.sha256) for archive in archives]
        _fetch(entry, target.name, sources, folder, target)
        _unpack(entry, target, folder, Path(scratch))


def _fetch_file(entry: Entry, file: DataFile, folder: Path) -> None:
    sources = [(base + file.name, file.sha256) for base in entry.mirrors]
    _fetch(entry, file.name, sources, folder, folder / file.name)


def download(entry: Entry, folder: Path) -> None:
    """Download the missing files of a data set.

    Every address is tried at most twice, with a connection timeout of a few seconds. A file
    gets its name only after its SHA-256 is found right.

    Args:
        entry: The data set.
        folder: Folder to put the files into; it is created.

    Raises:
        DownloadError: No address served an intact file, or the folder cannot be written.
        DataFileError: A file already in the folder is not what it should be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DownloadError(
            f"cannot write to the folder {folder} to download the data set {entry.name} "
            f"({error}); make it writable, or set NATGRAD_DATA to a folder with the files"
        ) from error
    missing = []
    for file in entry.files:
        if (folder / file.name).exists():
            verify(folder / file.name, file)
        else:
            missing.append(file)
    if missing and entry.archives:
        _fetch_archive(entry, entry.archives, folder)
    else:
        for file in missing:
            _fetch_file(entry, file, folder)
