"""Where the files of the data sets are: NATGRAD_DATA, the user cache, or a download into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pooch

from . import download
from .catalogue import CATALOGUE, Entry
from .errors import DataFileError, DatasetError, DownloadError
from .verification import verify

DATA_VARIABLE = "NATGRAD_DATA"
OFFLINE_VARIABLE = "NATGRAD_OFFLINE"


@dataclass(frozen=True)
class DatasetStatus:
    """State of one data set on this machine.

    Attributes:
        name: Name of the data set.
        num_train: Number of training samples (default number for synthetic data).
        num_test: Number of test samples (default number for synthetic data).
        shape: Shape of one sample, (H, W, C), or (input_dim,) where there is no image.
        num_classes: Number of classes.
        size_bytes: Total size of the official files in bytes; 0 where there are none.
        found: Folder of the files, "embedded", "synthetic", or "not found".
        licence: Licence or terms.
        checksum: "ok", "not there", "partly there: ...", "corrupt: ..." or "not needed".
        usable: Whether `load` can give it without a download.

    Example:
        >>> import natgrad_datasets
        >>> row = natgrad_datasets.status()[0]
        >>> row.name, row.num_train, row.shape, row.found, row.usable
        ('digits', 1437, (8, 8, 1), 'embedded', True)
    """

    name: str
    num_train: int
    num_test: int
    shape: tuple[int, ...]
    num_classes: int
    size_bytes: int
    found: str
    licence: str
    checksum: str
    usable: bool


def cache_folder() -> Path:
    """The user cache, into which data sets are downloaded."""
    return Path(pooch.os_cache("natgrad"))


def offline() -> bool:
    """Whether NATGRAD_OFFLINE forbids downloads (any value but empty and 0)."""
    return os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0")


def _folders(entry: Entry) -> list[Path]:
    """Folders to look in, in this order."""
    folders = [cache_folder() / entry.name]
    named = os.environ.get(DATA_VARIABLE)
    if named:
        what = f"the environment variable {DATA_VARIABLE} names {named}, which"
        try:
            root = Path(named).expanduser()
            there = root.is_dir()
        except RuntimeError as error:
            raise DatasetError(f"{what} has no home folder: {error}") from None
        except OSError as error:
            raise DatasetError(f"{what} cannot be read: {error.strerror}") from None
        if not there:
            raise DatasetError(f"{what} is not a folder")
        folders.insert(0, root / entry.name)
    return folders


def present(entry: Entry, folder: Path) -> tuple[str, ...]:
    """Names of the files of a data set that are in a folder, unchecked, in official order.

    Raises:
        DatasetError: The folder cannot be read.
    """
    try:
        return tuple(file.name for file in entry.files if (folder / file.name).is_file())
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}") from None


def _sufficient(entry: Entry, names: tuple[str, ...]) -> bool:
    return any(set(alternative) <= set(names) for alternative in entry.sufficient)


def _find(entry: Entry) -> Path | None:
    """First folder with enough files to use the data set."""
    for folder in _folders(entry):
        if _sufficient(entry, present(entry, folder)):
            return folder
    return None


def obtain(entry: Entry) -> Path:
    """Find the folder of a data set, downloading it if it is nowhere.

    Searches the sub-folder named after the data set of NATGRAD_DATA, then of the user cache,
    then downloads into the latter. The files found still have to be verified.

    Args:
        entry: A data set that consists of files.

    Returns:
        The folder.

    Raises:
        DatasetError: NATGRAD_DATA names no folder.
        DownloadError: The files are nowhere, and the download failed or NATGRAD_OFFLINE is set.
        DataFileError: A file in the cache is not what it should be.
    """
    folder = _find(entry)
    if folder is not None:
        return folder
    target = cache_folder() / entry.name
    if offline():
        searched = ", ".join(str(folder) for folder in _folders(entry))
        raise DownloadError(
            f"the data set {entry.name} is not complete in {searched}, and the environment "
            f"variable {OFFLINE_VARIABLE} forbids downloads. Unset it, or use the data set "
            f"'digits', which needs no files.\n{download.by_hand(entry, target)}"
        )
    download.download(entry, target)
    return target


def verify_files(entry: Entry, folder: Path, names: tuple[str, ...]) -> None:
    """Check files of a data set against their checksums.

    Args:
        entry: The data set.
        folder: Where the files are.
        names: Which of them to check.

    Raises:
        DataFileError: One is not what it should be.
    """
    for file in entry.files:
        if file.name in names:
            verify(folder / file.name, file)


def _file_state(entry: Entry) -> tuple[str, str, bool]:
    """Where the files are, the state of their checksums, and whether they can be used."""
    try:
        folders = _folders(entry)
        folder = _find(entry) or next((f for f in folders if present(entry, f)), None)
    except DatasetError as error:
        return f"not found: {error}", "not there", False
    if folder is None:
        return "not found", "not there", False
    names = present(entry, folder)
    try:
        verify_files(entry, folder, names)
    except DataFileError as error:
        return str(folder), f"corrupt: {error}", False
    missing = [file.name for file in entry.files if file.name not in names]
    if missing:
        state = f"partly there: {', '.join(missing)} missing"
        return str(folder), state, _sufficient(entry, names)
    return str(folder), "ok", True


def status() -> list[DatasetStatus]:
    """State of all data sets on this machine; nothing is downloaded.

    Returns:
        One row per data set, in the order of `names`.

    Example:
        >>> import natgrad_datasets
        >>> rows = natgrad_datasets.status()
        >>> [row.name for row in rows if row.found in ("embedded", "synthetic")]
        ['digits', 'gaussian']
    """
    rows = []
    for entry in CATALOGUE.values():
        found, checksum, usable = (
            _file_state(entry) if entry.files else (entry.kind, "not needed", True)
        )
        rows.append(
            DatasetStatus(
                name=entry.name,
                num_train=entry.num_train,
                num_test=entry.num_test,
                shape=entry.shape,
                num_classes=entry.num_classes,
                size_bytes=entry.size_bytes,
                found=found,
                licence=entry.licence,
                checksum=checksum,
                usable=usable,
            )
        )
    return rows


def best_available() -> str:
    """The most realistic default that needs no download.

    Returns:
        "mnist" if all its files are on this machine and intact, otherwise "digits".

    Example:
        >>> import natgrad_datasets
        >>> natgrad_datasets.best_available() in ("mnist", "digits")
        True
    """
    return "mnist" if _file_state(CATALOGUE["mnist"])[1] == "ok" else "digits"
