"""Downloads, from a web server on this machine."""

import hashlib
import io
import os
import socket
import tarfile

import pytest
from datasets_helpers import cifar_bytes, mnist_contents, with_files, write_all
from natgrad_datasets import DataFileError, DownloadError, catalogue, download, load, store

MNIST = mnist_contents()
CIFAR = {f"data_batch_{k}.bin": cifar_bytes([k, 0], k) for k in range(1, 6)}
CIFAR["test_batch.bin"] = cifar_bytes([9, 8], 0)
IMAGES = "train-images-idx3-ubyte.gz"


def tar_gz(contents, prefix="cifar-10-batches-bin/"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def mnist(server):
    """An entry with two mirrors, of which the second serves everything."""
    for name, data in MNIST.items():
        server.answers[f"two/{name}"] = [(200, data)]
    return with_files("mnist", MNIST, mirrors=(server.base + "one/", server.base + "two/"))


def cifar_entry(server, archive, expected=None):
    server.answers["cifar.tar.gz"] = [(200, archive)]
    digest = hashlib.sha256(archive).hexdigest()
    return with_files(
        "cifar10",
        expected or CIFAR,
        archives=(
            catalogue.Archive(server.base + "missing.tar.gz", digest),
            catalogue.Archive(server.base + "cifar.tar.gz", digest),
        ),
    )


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_second_mirror_when_the_first_has_nothing(mnist, server, cache):
    assert store.obtain(mnist) == cache / "mnist"
    assert contents_of(cache / "mnist") == MNIST
    # A file that a server does not have is not asked for twice.
    assert server.requests.count(f"one/{IMAGES}") == 1


@pytest.mark.parametrize(
    "answer",
    [
        (200, MNIST[IMAGES][:-1] + b"!"),
        (200, b"<html>log in</html>"),
        (299, MNIST[IMAGES][:500]),
        (503, b"busy"),
    ],
    ids=["corrupt", "log-in page", "connection breaks", "server error"],
)
def test_second_mirror_when_the_first_is_bad_twice(mnist, server, cache, answer):
    server.answers[f"one/{IMAGES}"] = [answer]
    store.obtain(mnist)
    assert contents_of(cache / "mnist") == MNIST
    assert server.requests.count(f"one/{IMAGES}") == 2
    assert server.requests.count(f"two/{IMAGES}") == 1


def test_retry_of_the_same_mirror(mnist, server, cache):
    server.answers[f"one/{IMAGES}"] = [(299, b"half"), (200, MNIST[IMAGES])]
    store.obtain(mnist)
    assert contents_of(cache / "mnist") == MNIST
    assert f"two/{IMAGES}" not in server.requests


def test_failure_lists_addresses_and_the_place_for_the_files(mnist, server, cache):
    server.answers[f"two/{IMAGES}"] = [(299, MNIST[IMAGES][:700])]
    with pytest.raises(DownloadError) as caught:
        store.obtain(mnist)
    message = str(caught.value)
    assert f"{server.base}one/{IMAGES} (try 1): HTTPError: 404" in message
    assert f"{server.base}two/{IMAGES} (try 2): ChunkedEncodingError" in message
    assert f"{IMAGES}: {len(MNIST[IMAGES])} bytes" in message
    assert str(cache / "mnist") in message
    assert "NATGRAD_DATA" in message
    # The half that arrived never counts as a file.
    assert contents_of(cache / "mnist") == {}


def test_no_server_at_all(monkeypatch, server, cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        entry = with_files("mnist", MNIST, mirrors=(base,))
        with pytest.raises(DownloadError, match=r"\(try 2\): ConnectionError: .*refused"):
            store.obtain(entry)


def test_only_missing_files_are_downloaded(mnist, server, cache):
    write_all(cache / "mnist", {IMAGES: MNIST[IMAGES]})
    store.obtain(mnist)
    assert contents_of(cache / "mnist") == MNIST
    assert not any(path.endswith(IMAGES) for path in server.requests)


def test_damaged_file_in_the_cache_is_named_not_replaced(mnist, server, cache):
    write_all(cache / "mnist", {IMAGES: MNIST[IMAGES][:50]})
    with pytest.raises(DataFileError, match=f"{IMAGES} is truncated"):
        store.obtain(mnist)


def test_offline_forbids_downloads(mnist, server, cache, monkeypatch):
    monkeypatch.setenv("NATGRAD_OFFLINE", "1")
    with pytest.raises(DownloadError, match="NATGRAD_OFFLINE forbids downloads"):
        store.obtain(mnist)
    assert server.requests == []


def test_cache_cannot_be_written(mnist, cache):
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(DownloadError, match="cannot write to the folder"):
        store.obtain(mnist)


def test_load_downloads(mnist, cache, monkeypatch):
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", mnist)
    assert load("mnist").num_train == 40
    monkeypatch.setenv("NATGRAD_OFFLINE", "1")
    assert load("mnist").source == str(cache / "mnist")


def test_archive(server, cache):
    resource_forks = {f"._{name}": b"junk" for name in CIFAR}
    entry = cifar_entry(server, tar_gz({**resource_forks, **CIFAR, "readme.html": b"read me"}))
    assert store.obtain(entry) == cache / "cifar10"
    assert contents_of(cache / "cifar10") == CIFAR


def test_archive_members_stay_in_the_folder(server, cache, tmp_path):
    entry = cifar_entry(server, tar_gz(CIFAR, prefix="../../../escaped/"))
    store.obtain(entry)
    assert contents_of(cache / "cifar10") == CIFAR
    assert not list(tmp_path.parent.rglob("escaped"))


def test_archive_with_a_link_for_a_file(server, cache):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(DataFileError, match=r"does not hold data_batch_1\.bin"):
        store.obtain(cifar_entry(server, stream.getvalue()))


@pytest.mark.parametrize("done", range(6))
def test_interrupted_unpacking_leaves_no_usable_part(server, cache, monkeypatch, done):
    entry = cifar_entry(server, tar_gz(CIFAR))
    replace, moved = os.replace, []

    def interrupted(source, target):
        if len(moved) == done:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.obtain(entry)
    assert len(contents_of(cache / "cifar10")) == done
    # The next use downloads what is missing, rather than taking a part for the whole.
    store.obtain(entry)
    assert contents_of(cache / "cifar10") == CIFAR


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({k: v for k, v in CIFAR.items() if k != "test_batch.bin"}, "not hold test_batch.bin"),
        ({**CIFAR, "data_batch_3.bin": cifar_bytes([1, 1], 7)}, "data_batch_3.bin is corrupted"),
    ],
)
def test_archive_with_wrong_members(server, cache, members, message):
    with pytest.raises(DataFileError, match=message):
        store.obtain(cifar_entry(server, tar_gz(members)))
    assert contents_of(cache / "cifar10") == {}


def test_archive_that_is_none(server, cache):
    with pytest.raises(DataFileError, match="cannot be unpacked"):
        store.obtain(cifar_entry(server, b"not an archive"))


def test_archive_nowhere(server, cache):
    entry = cifar_entry(server, tar_gz(CIFAR))
    server.answers["cifar.tar.gz"] = [(503, b"busy")]
    with pytest.raises(DownloadError) as caught:
        store.obtain(entry)
    message = str(caught.value)
    assert f"{server.base}missing.tar.gz (try 1)" in message
    assert f"{server.base}cifar.tar.gz (try 2)" in message
    assert "test_batch.bin: 6146 bytes" in message
    assert f"members of the archive {server.base}missing.tar.gz" in message
    assert contents_of(cache / "cifar10") == {}
