"""Kernels that are filled block by block, in memory or in files that outlive the program.

A finished block has a checksum of its numbers, which is its mark. Files are trusted as far as the
checksums hold when they are opened: whatever was lost or changed since, by whatever order in which
a dying machine wrote its pages, is a block that is computed anew.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ntk_analysis.empirical import Matrix
from ntk_analysis.results import content_hash, read_json, write_json

KernelArrays = dict[str, Matrix]

_MANIFEST = "kernels.json"
_DONE = "done.npy"
_FORMAT = 2  # 1 had no checksums
# a mark: these bits above the 32 of the checksum
_FINISHED, _MIRRORED = 1 << 32, 1 << 33


class BlockTarget:
    """Kernels of one shape, filled block by block.

    Args:
      arrays: what is filled, by name.
      marks: (row blocks, column blocks), 0 where a block is not finished.
      block: rows and columns of a block.
    """

    def __init__(self, arrays: KernelArrays, marks: np.ndarray, block: int) -> None:
        self._arrays, self._marks, self._block = arrays, marks, block

    @property
    def done(self) -> np.ndarray:
        """(row blocks, column blocks), nonzero where a block is finished."""
        return (self._marks != 0).astype(np.uint8)

    def write(self, row: int, column: int, values: Sequence[np.ndarray], *, mirror: bool) -> None:
        """Writes a block of every kernel, and its transpose on the other side of the diagonal."""
        for array, value in zip(self._arrays.values(), values, strict=True):
            rows, columns = value.shape
            array[row : row + rows, column : column + columns] = value
            if mirror and row != column:
                array[column : column + columns, row : row + rows] = value.T
        # last, so that a killed program leaves no block marked that is not written
        place = row // self._block, column // self._block
        self._marks[place] = self._mark(values, mirror and row != column)

    def _mark(self, values: Sequence[np.ndarray], mirrored: bool) -> int:
        """The mark of a finished block."""
        return _FINISHED

    def arrays(self) -> KernelArrays:
        """The kernels."""
        return self._arrays


class _StoredTarget(BlockTarget):
    """Kernels in files: the mark of a block holds the checksum of its numbers."""

    def _mark(self, values: Sequence[np.ndarray], mirrored: bool) -> int:
        checksum = int(mirrored)
        for value in values:
            checksum = zlib.crc32(np.ascontiguousarray(value, np.float64).data, checksum)
        return _FINISHED | _MIRRORED * mirrored | checksum

    def clear_damaged(self) -> int:
        """Takes the marks from blocks whose numbers do not have their checksum; says how many."""
        damaged = 0
        for row, column in np.argwhere(self._marks):
            mark = int(self._marks[row, column])
            mirrored = bool(mark & _MIRRORED)
            rows, columns = (slice(i * self._block, (i + 1) * self._block) for i in (row, column))
            sides = [[array[rows, columns] for array in self._arrays.values()]]
            if mirrored:
                sides.append([array[columns, rows].T for array in self._arrays.values()])
            if any(self._mark(side, mirrored) != mark for side in sides):
                self._marks[row, column] = 0
                damaged += 1
        return damaged

    def close(self) -> None:
        """Brings everything to the disk; what was returned may only be read from now on."""
        for array in (*self._arrays.values(), self._marks):
            if isinstance(array, np.memmap):
                array.flush()
            array.flags.writeable = False


@contextmanager
def open_store(
    folder: Path | None,
    names: Sequence[str],
    shape: tuple[int, int],
    made_of: Sequence[Any],
    block: int,
) -> Iterator[BlockTarget]:
    """Kernels to fill: new ones in memory, or those of an earlier call in files.

    Args:
      folder: where files are kept, or None for memory.
      names: of the kernels.
      shape: of each kernel.
      made_of: all that decides the values: arrays, and what JSON can hold.
      block: rows and columns of a block.

    Raises:
      ValueError: the disk has no room, the folder cannot be written to, or that of these kernels is
        damaged.

    Warns:
      UserWarning: blocks were damaged since they were written; they are not finished any more.
    """
    blocks = tuple(-(-side // block) for side in shape)
    if folder is None:
        yield BlockTarget(
            {name: np.empty(shape) for name in names}, np.zeros(blocks, np.uint64), block
        )
        return
    digest = content_hash([*made_of, list(names), list(shape), block, _versions(), _FORMAT])
    place = Path(folder) / f"kernels-{digest[:16]}"
    try:
        if not place.exists():
            manifest = {
                "hash": digest,
                "names": list(names),
                "shape": list(shape),
                "versions": _versions(),
            }
            _create(place, names, shape, blocks, manifest)
        target = _StoredTarget(*_open_all(place, digest, names, shape, blocks), block)
    except OSError as error:
        raise ValueError(
            f"kernels cannot be kept in {folder}: {error.strerror or error}; choose another folder "
            "for the store, or none to keep them in memory"
        ) from error
    finished = int(target.done.sum())
    damaged = target.clear_damaged()
    if damaged:
        warnings.warn(
            f"{place}: {damaged} of {finished} finished blocks of kernels do not have the "
            "checksums they were written with, and are computed anew",
            stacklevel=4,
        )
    try:
        yield target
    finally:
        target.close()


def _create(
    place: Path,
    names: Sequence[str],
    shape: tuple[int, int],
    blocks: tuple[int, ...],
    manifest: dict[str, Any],
) -> None:
    """Makes a store under another name and renames it, so that a store is whole from the start."""
    needed = len(names) * shape[0] * shape[1] * 8
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise ValueError(
            f"{len(names)} kernels of {shape[0]} x {shape[1]} need {needed / 2**30:,.1f} GiB and "
            f"the disk has {free / 2**30:,.1f} GiB free; ask for fewer parts"
        )
    with tempfile.TemporaryDirectory(
        dir=place.parent, prefix=f".{place.name}.", ignore_cleanup_errors=True
    ) as name:
        draft = Path(name) / place.name
        draft.mkdir()
        for array in names:
            path = draft / f"{array}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=shape)
            _allocate(path)
        np.save(draft / _DONE, np.zeros(blocks, np.uint64))
        write_json(draft / _MANIFEST, manifest)
        try:
            draft.rename(place)
        except OSError:
            # another program was faster; both write the same numbers
            if not place.exists():
                raise


def _allocate(path: Path) -> None:
    """Takes the room of a sparse file on the disk: memory maps of a full one end in SIGBUS."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _open_all(
    place: Path,
    digest: str,
    names: Sequence[str],
    shape: tuple[int, int],
    blocks: tuple[int, ...],
) -> tuple[KernelArrays, np.ndarray]:
    """The kernels and the marks of a store.

    Raises:
      ValueError: it is damaged, or one of other kernels.
    """
    try:
        _check_manifest(place, digest)
        kernels = {name: _open(place / f"{name}.npy", np.float64, shape) for name in names}
        return kernels, _open(place / _DONE, np.uint64, blocks)
    except _DamagedError as error:
        raise ValueError(
            f"{place} is not a whole store of kernels ({error}); remove it, and it is made anew"
        ) from error


def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    # a pipe would be waited for
    if not path.is_file():
        raise _DamagedError(f"{path.name} is no file")
    try:
        # for writing, NumPy would fill up a file that was cut short with zeros
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise _DamagedError(str(error)) from error
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise _DamagedError(
            f"{path.name} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
        )
    array = np.lib.format.open_memmap(path, mode="r+")
    return array


def _check_manifest(place: Path, digest: str) -> None:
    try:
        found = read_json(place / _MANIFEST)["hash"]
    except (ValueError, KeyError) as error:
        raise _DamagedError(f"{_MANIFEST}: {error}") from error
    if found != digest:
        raise ValueError(f"{place} holds other kernels; remove it or choose another folder")


class _DamagedError(Exception):
    """Files of a store that are not what they should be."""


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("natgrad", "neural-tangents", "jax")}
