"""The readers of IDX and CIFAR-10 binary files."""

import gzip
import struct

import numpy as np
import pytest
from datasets_helpers import cifar_bytes, idx_bytes
from natgrad_datasets import DataFileError
from natgrad_datasets.formats import read_cifar, read_idx

IMAGES = np.arange(2 * 3 * 4).reshape(2, 3, 4)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_values_and_shape(tmp_path, compress):
    path = tmp_path / ("images.gz" if compress else "images")
    content = idx_bytes(IMAGES)
    path.write_bytes(gzip.compress(content) if compress else content)
    read = read_idx(path, ndim=3)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, IMAGES)


def test_idx_labels(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 255]))
    assert read_idx(path, ndim=1).tolist() == [7, 0, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(np.arange(5)), "magic number 0x00000803.*found 0x00000801"),
        (struct.pack(">4I", 0x00000D03, 1, 1, 1) + b"\0\0\0\0", "found 0x00000d03"),
        (idx_bytes(IMAGES)[:-1], "expected 40 bytes.*found 39"),
        (idx_bytes(IMAGES) + b"\0", "expected 40 bytes.*found 41"),
        (b"\0\0\x08\x03", "header of 16 bytes, found 4"),
        (b"", "header of 16 bytes, found 0"),
    ],
)
def test_idx_wrong_content(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    # The labels are long enough for a header of three dimensions only with padding.
    if message.startswith("magic"):
        path.write_bytes(content + bytes(8))
    with pytest.raises(DataFileError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_idx_damaged_gzip(tmp_path, damage):
    path = tmp_path / "images.gz"
    content = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (5, 9, 9))))
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
            "not gzip": b"<html>404</html>",
        }[damage]
    )
    with pytest.raises(DataFileError, match="complete gzip file") as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)


def test_idx_missing_file(tmp_path):
    with pytest.raises(DataFileError, match="cannot be read"):
        read_idx(tmp_path / "images", ndim=3)


def test_cifar_layout(tmp_path):
    path = tmp_path / "batch.bin"
    pixels = np.zeros((3, 32, 32), dtype=np.uint8)
    pixels[0, 1, 2] = 11
    pixels[1, 1, 2] = 22
    pixels[2, 31, 0] = 33
    path.write_bytes(b"\x04" + pixels.tobytes() + b"\x09" + bytes(3072))
    images, labels = read_cifar(path)
    assert images.shape == (2, 32, 32, 3)
    assert labels.tolist() == [4, 9]
    assert images[0, 1, 2].tolist() == [11, 22, 0]
    assert images[0, 31, 0].tolist() == [0, 0, 33]
    assert images[0].sum() == 66
    assert not images[1].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cifar_bytes([1, 2], 0)[:-1], "multiple of 3073 bytes.*found 6145"),
        (b"", "found 0 bytes"),
        (cifar_bytes([1, 10], 0), "labels in 0...9, found 10"),
    ],
)
def test_cifar_wrong_content(tmp_path, content, message):
    path = tmp_path / "batch.bin"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=message) as caught:
        read_cifar(path)
    assert str(path) in str(caught.value)


def test_real_mnist(real_data):
    folder = real_data("mnist")
    images = read_idx(folder / "train-images-idx3-ubyte.gz", ndim=3)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", ndim=1)
    assert images.shape == (60_000, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    # Mean and standard deviation of the training pixels in [0, 1], as widely published.
    assert images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert images.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert len(read_idx(folder / "t10k-images-idx3-ubyte.gz", ndim=3)) == 10_000


def test_real_cifar(real_data):
    images, labels = read_cifar(real_data("cifar10") / "data_batch_1.bin")
    assert images.shape == (10_000, 32, 32, 3)
    # The first image of CIFAR-10 is a frog, its first pixel (59, 62, 63).
    assert labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert images[0, 0, 0].tolist() == [59, 62, 63]
