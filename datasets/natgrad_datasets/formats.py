"""Strict readers of the two file formats: IDX (MNIST family) and CIFAR-10 binary.

Nothing here unpickles. Every file is checked for magic number and exact size before it is used.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DataFileError
from .files import LARGEST, read_file

_IDX_UINT8 = 0x08
_CIFAR_SHAPE_CHW = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE_CHW)
_CIFAR_NUM_CLASSES = 10

_ADVICE = "delete it and fetch it again"


def read_idx(path: str | Path, ndim: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes; see `parse_idx`.

    Raises:
        DataFileError: As `parse_idx`; or the file is unreadable.
    """
    return parse_idx(read_file(Path(path)), Path(path), ndim)


def parse_idx(content: bytes, path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read the content of an IDX file of unsigned bytes.

    The format is that of LeCun, Cortes & Burges: two zero bytes, the type (0x08), the number of
    dimensions, one big-endian 32-bit size per dimension, then the values in row-major order. No
    more is decompressed than the sizes say.

    Args:
        content: Of the file; it is decompressed if the name of the file ends in ".gz".
        path: Of the file.
        ndim: Expected number of dimensions, 3 for images (N, H, W) and 1 for labels (N,).

    Returns:
        The values, unscaled, with the shape the file states.

    Raises:
        DataFileError: The content is truncated, corrupted, longer than it states, larger than any
            data file, or has the wrong magic number.
    """
    stream: io.BufferedIOBase = io.BytesIO(content)
    if path.suffix == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    try:
        return _parse_idx(stream, path, ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFileError(
            f"{path}: expected a complete gzip file, but it is truncated or corrupted "
            f"({error}); {_ADVICE}"
        ) from error


def _parse_idx(stream: io.BufferedIOBase, path: Path, ndim: int) -> NDArray[np.uint8]:
    size = 4 + 4 * ndim
    header = stream.read(size)
    expected_magic = (_IDX_UINT8 << 8) | ndim
    if len(header) < size:
        raise DataFileError(
            f"{path}: expected an IDX header of {size} bytes, found {len(header)} bytes in "
            f"all; {_ADVICE}"
        )
    magic, *shape = struct.unpack(f">{1 + ndim}I", header)
    if magic != expected_magic:
        raise DataFileError(
            f"{path}: expected the IDX magic number 0x{expected_magic:08x} (unsigned bytes, "
            f"{ndim} dimension(s)), found 0x{magic:08x}; it is another file: {_ADVICE}"
        )
    expected = math.prod(shape)
    if expected > LARGEST:
        raise DataFileError(
            f"{path}: it states the shape {tuple(shape)}, {expected} bytes, more than any data "
            f"file ({LARGEST}); {_ADVICE}"
        )
    # One byte more shows whether there is more, and makes gzip check its checksum.
    values = stream.read(expected + 1)
    if len(values) != expected:
        raise DataFileError(
            f"{path}: expected {size + expected} bytes of IDX data for the shape {tuple(shape)}, "
            f"found {size + len(values)}{' or more' * (len(values) > expected)}; {_ADVICE}"
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def read_cifar(path: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one file of the CIFAR-10 binary version; see `parse_cifar`.

    Raises:
        DataFileError: As `parse_cifar`; or the file is unreadable.
    """
    return parse_cifar(read_file(Path(path)), Path(path))


def parse_cifar(content: bytes, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the content of one file of the CIFAR-10 binary version.

    Records of 3073 bytes: the label, then 3072 pixels as (channel, row, column); see Krizhevsky
    (2009) and the description that accompanies the files.

    Args:
        content: Of the file.
        path: Of the file.

    Returns:
        Images of shape (N, 32, 32, 3), unscaled, and labels of shape (N,).

    Raises:
        DataFileError: The size is not a whole number of records, or a label is not in 0...9.
    """
    if not content or len(content) % _CIFAR_RECORD:
        raise DataFileError(
            f"{path}: expected a positive multiple of {_CIFAR_RECORD} bytes (CIFAR-10 binary "
            f"version), found {len(content)} bytes; {_ADVICE}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0]
    if labels.max() >= _CIFAR_NUM_CLASSES:
        raise DataFileError(
            f"{path}: expected labels in 0...9, found {labels.max()}; it is not a file of the "
            f"CIFAR-10 binary version: {_ADVICE}"
        )
    images = records[:, 1:].reshape(-1, *_CIFAR_SHAPE_CHW).transpose(0, 2, 3, 1)
    return images, labels
