"""Strict readers of the two file formats: IDX (MNIST family) and CIFAR-10 binary.

Nothing here unpickles. Every file is checked for magic number and exact size before it is used.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DataFileError

_IDX_UINT8 = 0x08
_CIFAR_SHAPE_CHW = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE_CHW)
_CIFAR_NUM_CLASSES = 10

_ADVICE = "delete it and fetch it again"


def _content(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                return stream.read()
        return path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFileError(
            f"{path}: expected a complete gzip file, but it is truncated or corrupted "
            f"({error}); {_ADVICE}"
        ) from error
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error})") from error


def read_idx(path: str | Path, ndim: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    The format is that of LeCun, Cortes & Burges: two zero bytes, the type (0x08), the number of
    dimensions, one big-endian 32-bit size per dimension, then the values in row-major order.

    Args:
        path: The file; it is decompressed if its name ends in ".gz".
        ndim: Expected number of dimensions, 3 for images (N, H, W) and 1 for labels (N,).

    Returns:
        The values, unscaled, with the shape the file states.

    Raises:
        DataFileError: The file is unreadable, truncated, corrupted, longer than it states, or
            has the wrong magic number.
    """
    path = Path(path)
    content = _content(path)
    header = 4 + 4 * ndim
    expected_magic = (_IDX_UINT8 << 8) | ndim
    if len(content) < header:
        raise DataFileError(
            f"{path}: expected an IDX header of {header} bytes, found {len(content)} bytes in "
            f"all; {_ADVICE}"
        )
    magic, *shape = struct.unpack(f">{1 + ndim}I", content[:header])
    if magic != expected_magic:
        raise DataFileError(
            f"{path}: expected the IDX magic number 0x{expected_magic:08x} (unsigned bytes, "
            f"{ndim} dimension(s)), found 0x{magic:08x}; it is another file: {_ADVICE}"
        )
    expected_size = header + math.prod(shape)
    if len(content) != expected_size:
        raise DataFileError(
            f"{path}: expected {expected_size} bytes of IDX data for the shape {tuple(shape)}, "
            f"found {len(content)}; {_ADVICE}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def read_cifar(path: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one file of the CIFAR-10 binary version.

    Records of 3073 bytes: the label, then 3072 pixels as (channel, row, column); see Krizhevsky
    (2009) and the description that accompanies the files.

    Args:
        path: The file.

    Returns:
        Images of shape (N, 32, 32, 3), unscaled, and labels of shape (N,).

    Raises:
        DataFileError: The file is unreadable, its size is not a whole number of records, or a
            label is not in 0...9.
    """
    path = Path(path)
    content = _content(path)
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
