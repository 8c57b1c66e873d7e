"""Files in the place of data sets: bombs, pipes, links, and what changes while it is used."""

import dataclasses
import gzip
import hashlib
import os
import struct
import tracemalloc
from functools import partial
from pathlib import Path

import natgrad_datasets as nd
import numpy as np
import pytest
from fault_harness import Refused, over
from natgrad_datasets import catalogue, download, files, formats, store, verification
from strange_files import holding, link, of_size

NOT_A_FILE = Refused("it is a folder, a pipe or a device, not a file")


def idx(shape, values=b"", magic=0x00000800):
    return struct.pack(f">{1 + len(shape)}I", magic + len(shape), *shape) + values


def bomb(stated, size=2**26):
    """Zeros that a thousandth of their size holds, behind a header that states some shape."""
    return gzip.compress(idx(stated) + bytes(size), 1)


def read(make, name, reader, folder):
    path = folder / name
    make(path)
    return reader(path)


images = partial(formats.read_idx, ndim=3)
READS = {
    "a pipe": (os.mkfifo, NOT_A_FILE),
    "a folder": (lambda path: path.mkdir(), NOT_A_FILE),
    "endless zeros": (link("/dev/zero"), NOT_A_FILE),
    "a link to itself": (link(None), Refused("cannot be read .*Too many levels")),
    "a link to nowhere": (link("nowhere"), Refused("cannot be read .*No such file")),
    "nothing": (lambda path: None, Refused("cannot be read .*No such file")),
    "more than any file": (
        of_size(files.LARGEST + 1),
        Refused("1073741825 bytes, more than any"),
    ),
}
CASES = {
    **{
        f"{what} as {name}": ((make, name, reader), answer)
        for what, (make, answer) in READS.items()
        for name, reader in (("images.gz", images), ("batch.bin", formats.read_cifar))
    },
    "a bomb behind a small shape": (
        (holding(bomb((1, 2, 2))), "images.gz", images), Refused("20 bytes.*found 21 or more")
    ),
    "a shape larger than any": (
        (holding(bomb((2**31, 2**31, 2), 10)), "images.gz", images), Refused("more than any data")
    ),
    "a shape that overflows": (
        (holding(idx((2**32 - 1,) * 3)), "images", images), Refused("more than any data")
    ),
    "a shape of more than there is": (
        (holding(idx((5, 4, 4), bytes(79))), "images", images), Refused("96 bytes.*found 95")
    ),
    "a wrong checksum of gzip": (
        (holding(gzip.compress(idx((1, 1, 1), b"a"))[:-8] + bytes(8)), "images.gz", images),
        Refused("expected a complete gzip file"),
    ),
    "gzip of nothing": ((holding(gzip.compress(b"")), "images.gz", images), Refused("found 0")),
    "another kind of numbers": (
        (holding(idx((1, 1, 1), b"a", magic=0x0D00)), "images", images), Refused("found 0x00000d03")
    ),
}  # fmt: skip


@over(CASES)
def test_reading(run, answer, tmp_path):
    answer.check(partial(read, *run, tmp_path))


def test_a_bomb_takes_no_memory(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(bomb((1, 2, 2)))
    tracemalloc.start()
    try:
        with pytest.raises(nd.DataFileError):
            formats.read_idx(path, ndim=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**21  # of 2^26 bytes


CONTENTS = {
    "train-images-idx3-ubyte.gz": gzip.compress(idx((10, 28, 28), bytes(range(10)) * 784), mtime=0),
    "train-labels-idx1-ubyte.gz": gzip.compress(idx((10,), bytes(range(10))), mtime=0),
    "t10k-images-idx3-ubyte.gz": gzip.compress(idx((10, 28, 28), bytes(range(10)) * 784), mtime=0),
    "t10k-labels-idx1-ubyte.gz": gzip.compress(idx((10,), bytes(range(10))), mtime=0),
}
FIRST = next(iter(CONTENTS))


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A folder with a data set of ten images in the place of MNIST."""
    official = tuple(
        catalogue.DataFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in CONTENTS.items()
    )
    entry = dataclasses.replace(catalogue.CATALOGUE["mnist"], files=official)
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", entry)
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    monkeypatch.setenv("NATGRAD_OFFLINE", "1")
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


def load():
    return nd.load("mnist", prepare=False).x_train


def test_a_file_that_changes_after_it_was_checked_is_refused(mnist, monkeypatch):
    load()
    path = mnist / FIRST
    before = path.stat()
    other = gzip.compress(idx((10, 28, 28), bytes(range(10))[::-1] * 784), mtime=0)
    changed = (other + bytes(len(CONTENTS[FIRST])))[: len(CONTENTS[FIRST])]
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    Refused("corrupted or another file: expected the SHA-256").check(load)
    assert nd.best_available() == "digits"


def test_what_is_used_is_what_was_hashed(mnist, monkeypatch):
    """Another content behind the check of a name does not get in."""
    monkeypatch.setattr(store, "verify", lambda path, file: None)
    path = mnist / FIRST
    path.write_bytes(gzip.compress(idx((10, 28, 28), bytes(7840)), mtime=0))
    Refused("SHA-256|not the right file|truncated").check(load)


PLACES = {
    "a pipe": (os.mkfifo, Refused("cannot be read|not complete")),
    "a folder": (lambda path: path.mkdir(), Refused("not complete in")),
    "endless zeros": (link("/dev/zero"), Refused("not complete in")),
    "a link to itself": (link(None), Refused("not complete in")),
    "a bomb": (holding(bomb((10, 28, 28))), Refused("not the right file: expected")),
    "nothing": (holding(b""), Refused("truncated: expected")),
    "a page": (holding(b"<html>404</html>"), Refused("truncated: expected")),
}


@over(PLACES)
def test_in_the_place_of_a_data_file(run, answer, mnist):
    (mnist / FIRST).unlink()
    run(mnist / FIRST)
    answer.check(load)
    # and the state of the machine is told, not raised
    assert nd.best_available() == "digits"
    assert len(nd.status()) == 5


VARIABLES = {
    "a file": __file__,
    "nothing there": "/nowhere",
    "a name too long": "a" * 5000,
    "a home that nobody has": "~nobody-has-this-name/data",
    "a link to itself": "loop",
}


@pytest.mark.parametrize("value", VARIABLES.values(), ids=VARIABLES)
def test_natgrad_data(value, mnist, monkeypatch, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path / value) if value == "loop" else value)
    Refused("NATGRAD_DATA names .*, which (is not a folder|has no home|cannot be read)").check(load)
    assert nd.best_available() == "digits"


def test_natgrad_data_without_permission(mnist, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    Refused("mnist cannot be read: Permission denied").check(load)
    assert nd.best_available() == "digits"


def test_a_pipe_in_the_cache_is_not_waited_for(mnist):
    entry = catalogue.CATALOGUE["mnist"]
    (mnist / FIRST).unlink()
    os.mkfifo(mnist / FIRST)
    Refused("truncated: expected").check(partial(download.download, entry, mnist))
    Refused("it is a folder, a pipe").check(
        partial(verification.read_verified, mnist / FIRST, entry.files[0])
    )


def test_more_than_the_classes_have(mnist):
    call = partial(nd.load, "mnist", classes=(0, 1), num_train=3, prepare=False)
    Refused("num_train=3 is more than there are: 2 train samples").check(call)


def test_the_images_are_those_of_the_files(mnist):
    wanted = np.frombuffer(bytes(range(10)) * 784, np.uint8).reshape(10, 784)
    np.testing.assert_array_equal(load(), wanted.astype(np.float64).astype(np.float32) / 255)
