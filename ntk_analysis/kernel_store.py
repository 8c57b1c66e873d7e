"""Kernels that are filled block by block, in memory or in files that outlive the program."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ntk_analysis.empirical import Matrix
from ntk_analysis.results import content_hash, write_json

KernelArrays = dict[str, Matrix]

_MANIFEST = "kernels.json"
_DONE = "done.npy"


class BlockTarget:
    """Kernels of one shape, filled block by block.

    Args:
      arrays: what is filled, by name.
      done: (row blocks, column blocks), nonzero where a block is finished.
      block: rows and columns of a block.
    """

    def __init__(self, arrays: KernelArrays, done: np.ndarray, block: int) -> None:
        self._arrays, self._done, self._block = arrays, done, block

    @property
    def done(self) -> np.ndarray:
        """(row blocks, column blocks), nonzero where a block is finished."""
        return self._done

    def write(self, row: int, column: int, values: Sequence[np.ndarray], *, mirror: bool) -> None:
        """Writes a block of every kernel, and its transpose on the other side of the diagonal."""
        for array, value in zip(self._arrays.values(), values, strict=True):
            rows, columns = value.shape
            array[row : row + rows, column : column + columns] = value
            if mirror and row != column:
                array[column : column + columns, row : row + rows] = value.T
        # last, so that a killed program leaves no block marked that is not written
        self._done[row // self._block, column // self._block] = 1

    def arrays(self) -> KernelArrays:
        """The kernels."""
        return self._arrays


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
      ValueError: the disk has no room, or the folder of these kernels is damaged.
      OSError: the folder cannot be written to.
    """
    blocks = tuple(-(-side // block) for side in shape)
    if folder is None:
        yield BlockTarget(
            {name: np.empty(shape) for name in names}, np.zeros(blocks, np.uint8), block
        )
        return
    digest = content_hash([*made_of, list(names), list(shape), block, _versions()])
    place = Path(folder) / f"kernels-{digest[:16]}"
    if not place.exists():
        manifest = {
            "hash": digest,
            "names": list(names),
            "shape": list(shape),
            "versions": _versions(),
        }
        _create(place, names, shape, blocks, manifest)
    _check_manifest(place, digest)
    try:
        arrays = {name: _open(place / f"{name}.npy") for name in names}
        done = _open(place / _DONE)
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise ValueError(_damaged(place, str(error))) from error
    yield BlockTarget(arrays, done, block)
    for array in arrays.values():
        array.flags.writeable = False


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
            np.lib.format.open_memmap(
                draft / f"{array}.npy", mode="w+", dtype=np.float64, shape=shape
            )
        np.save(draft / _DONE, np.zeros(blocks, np.uint8))
        write_json(draft / _MANIFEST, manifest)
        try:
            draft.rename(place)
        except OSError:
            # another program was faster; both write the same numbers
            if not place.exists():
                raise


def _open(path: Path) -> np.ndarray:
    # for writing, NumPy would fill up a file that was cut short with zeros
    np.load(path, mmap_mode="r")
    array: np.ndarray = np.load(path, mmap_mode="r+")
    return array


def _check_manifest(place: Path, digest: str) -> None:
    try:
        found = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))["hash"]
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(_damaged(place, f"{_MANIFEST}: {error}")) from error
    if found != digest:
        raise ValueError(f"{place} holds other kernels; remove it or choose another folder")


def _damaged(place: Path, why: str) -> str:
    return f"{place} is not a whole store of kernels ({why}); remove it, and it is made anew"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("natgrad", "neural-tangents", "jax")}
