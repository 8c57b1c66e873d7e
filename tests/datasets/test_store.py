"""Finding and verifying files, and the state of the machine."""

import os

import pytest
from datasets_helpers import cifar_bytes, mnist_contents, with_files, write_all
from natgrad_datasets import (
    DataFileError,
    DatasetError,
    DownloadError,
    best_available,
    catalogue,
    names,
    status,
    store,
    verification,
)

CONTENTS = mnist_contents()
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.fixture
def entry(monkeypatch):
    changed = with_files("mnist", CONTENTS, num_train=40, num_test=20)
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", changed)
    return changed


@pytest.fixture
def named(monkeypatch, tmp_path):
    """The folder named by NATGRAD_DATA."""
    folder = tmp_path / "named"
    folder.mkdir()
    monkeypatch.setenv("NATGRAD_DATA", str(folder))
    return folder


def row(name):
    return next(r for r in status() if r.name == name)


def test_named_folder_comes_before_the_cache(entry, cache, named):
    write_all(cache / "mnist", CONTENTS)
    assert store.obtain(entry) == cache / "mnist"
    write_all(named / "mnist", CONTENTS)
    assert store.obtain(entry) == named / "mnist"


def test_incomplete_folder_is_passed_over(entry, cache, named):
    write_all(cache / "mnist", CONTENTS)
    write_all(named / "mnist", {IMAGES: CONTENTS[IMAGES]})
    assert store.obtain(entry) == cache / "mnist"


def test_named_folder_does_not_exist(entry, monkeypatch, tmp_path):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match=r"NATGRAD_DATA names .*nowhere, which is not a folder"):
        store.obtain(entry)
    assert row("mnist").checksum == "not there"
    assert "which is not a folder" in row("mnist").found
    assert best_available() == "digits"


def test_offline_says_what_to_do(entry, cache, named):
    with pytest.raises(DownloadError) as caught:
        store.obtain(entry)
    message = str(caught.value)
    assert "NATGRAD_OFFLINE forbids downloads" in message
    assert str(cache / "mnist") in message
    assert str(named / "mnist") in message
    for file in entry.files:
        assert f"{file.name}: {file.size} bytes, SHA-256 {file.sha256}" in message


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_offline_values(monkeypatch, value, expected):
    monkeypatch.setenv("NATGRAD_OFFLINE", value)
    assert store.offline() is expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "truncated: expected {size} bytes, found"),
        (lambda data: data + b"x", "not the right file: expected {size} bytes, found"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "expected the SHA-256 {sha256}, found"),
    ],
    ids=["half-written", "too long", "one bit"],
)
def test_damaged_file_is_named(entry, named, damage, message):
    write_all(named / "mnist", {**CONTENTS, IMAGES: damage(CONTENTS[IMAGES])})
    file = entry.files[0]
    expected = message.format(size=file.size, sha256=file.sha256)
    with pytest.raises(DataFileError, match=expected) as caught:
        store.verify_files(entry, named / "mnist", (IMAGES,))
    assert str(named / "mnist" / IMAGES) in str(caught.value)
    assert "delete it" in str(caught.value)
    assert row("mnist").checksum.startswith("corrupt: ")
    assert not row("mnist").usable
    assert best_available() == "digits"


def test_missing_file_cannot_be_verified(entry, named):
    with pytest.raises(DataFileError, match="cannot be read"):
        store.verify_files(entry, named / "mnist", (IMAGES,))


def test_unchanged_file_is_hashed_once(entry, named, monkeypatch):
    folder = write_all(named / "mnist", CONTENTS)
    hashed = []
    digest = verification.hashlib.file_digest

    def counting(stream, name):
        hashed.append(stream.name)
        return digest(stream, name)

    monkeypatch.setattr(verification.hashlib, "file_digest", counting)
    for _ in range(3):
        store.verify_files(entry, folder, (IMAGES,))
    assert hashed == [str(folder / IMAGES)]

    # Another content of the same size, written later, is hashed again.
    data = CONTENTS[IMAGES]
    before = (folder / IMAGES).stat().st_mtime_ns
    (folder / IMAGES).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(folder / IMAGES, ns=(before + 1, before + 1))
    with pytest.raises(DataFileError, match="SHA-256"):
        store.verify_files(entry, folder, (IMAGES,))
    assert len(hashed) == 2


def test_status_of_an_empty_machine(cache):
    rows = status()
    assert tuple(r.name for r in rows) == names()
    assert {r.name: (r.found, r.checksum, r.usable) for r in rows} == {
        "digits": ("embedded", "not needed", True),
        "mnist": ("not found", "not there", False),
        "fashion_mnist": ("not found", "not there", False),
        "cifar10": ("not found", "not there", False),
        "gaussian": ("synthetic", "not needed", True),
    }
    cifar = row("cifar10")
    assert (cifar.num_train, cifar.num_test, cifar.num_classes) == (50_000, 10_000, 10)
    assert cifar.shape == (32, 32, 3)
    assert cifar.size_bytes == 6 * 30_730_000
    assert all(r.licence for r in rows)
    assert best_available() == "digits"
    assert not cache.exists()


def test_status_ok_and_best_available(entry, named):
    write_all(named / "mnist", CONTENTS)
    assert (row("mnist").found, row("mnist").checksum) == (str(named / "mnist"), "ok")
    assert row("mnist").usable
    assert best_available() == "mnist"


def test_status_partly_there(entry, named):
    write_all(named / "mnist", {IMAGES: CONTENTS[IMAGES]})
    state = row("mnist")
    assert state.found == str(named / "mnist")
    assert state.checksum.startswith("partly there: train-labels-idx1-ubyte.gz, t10k-images")
    assert not state.usable
    assert best_available() == "digits"


def test_cifar10_is_usable_in_part(named, monkeypatch):
    contents = {f"data_batch_{k}.bin": cifar_bytes([k], k) for k in range(1, 6)}
    contents["test_batch.bin"] = cifar_bytes([0], 0)
    monkeypatch.setitem(catalogue.CATALOGUE, "cifar10", with_files("cifar10", contents))
    write_all(named / "cifar10", {"data_batch_2.bin": contents["data_batch_2.bin"]})
    assert not row("cifar10").usable
    write_all(named / "cifar10", {"data_batch_1.bin": contents["data_batch_1.bin"]})
    assert row("cifar10").usable
    assert row("cifar10").checksum.startswith("partly there: data_batch_3.bin")
    assert row("cifar10").checksum.endswith("test_batch.bin missing")


def test_catalogue_knows_mirrors_and_checksums():
    for name in ("mnist", "fashion_mnist", "cifar10"):
        entry = catalogue.CATALOGUE[name]
        addresses = entry.mirrors + tuple(archive.url for archive in entry.archives)
        assert len(set(addresses)) >= 2
        assert len({file.sha256 for file in entry.files}) == len(entry.files)
        digests = [file.sha256 for file in entry.files]
        digests += [archive.sha256 for archive in entry.archives]
        assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_files_have_the_known_checksums(real_data, name):
    folder = real_data(name)
    entry = catalogue.CATALOGUE[name]
    found = store.present(entry, folder)
    assert found
    store.verify_files(entry, folder, found)
