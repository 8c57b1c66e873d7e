"""Hand-made data files and catalogue entries that describe them."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
from natgrad_datasets import catalogue


def idx_bytes(values: np.ndarray) -> bytes:
    """IDX content of an array of unsigned bytes, packed independently of the reader."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    header += b"".join(struct.pack(">I", size) for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def mnist_contents(num_train: int = 40, num_test: int = 20) -> dict[str, bytes]:
    """The four files of a small data set in the format of MNIST; the labels count up."""
    rng = np.random.default_rng(0)
    contents = {}
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = rng.integers(0, 256, (count, 28, 28))
        contents[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images), mtime=0)
        contents[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(
            idx_bytes(np.arange(count) % 10), mtime=0
        )
    return contents


def cifar_bytes(labels: list[int], seed: int) -> bytes:
    """Records of the CIFAR-10 binary version with random pixels."""
    rng = np.random.default_rng(seed)
    return b"".join(bytes([label]) + rng.bytes(3072) for label in labels)


def with_files(name: str, contents: dict[str, bytes], **changes: object) -> catalogue.Entry:
    """A catalogue entry whose official files are the given ones."""
    files = tuple(
        catalogue.DataFile(file, len(data), hashlib.sha256(data).hexdigest())
        for file, data in contents.items()
    )
    return dataclasses.replace(catalogue.CATALOGUE[name], files=files, **changes)


def write_all(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write files into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder
