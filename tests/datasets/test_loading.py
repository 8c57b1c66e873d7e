"""`load`, from the choice of samples to the encoded labels."""

import sys

import numpy as np
import pytest
from datasets_helpers import cifar_bytes, mnist_contents, with_files, write_all
from natgrad_datasets import (
    Dataset,
    DatasetError,
    catalogue,
    forster_transform,
    load,
    names,
    prepare,
)
from natgrad_datasets.formats import read_cifar, read_idx
from natgrad_datasets.images import HELD_OUT_NOTE, cifar10_split
from sklearn.datasets import load_digits


def norms(x):
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


def test_digits_is_the_default():
    data = load()
    assert isinstance(data, Dataset)
    assert (data.name, data.source) == ("digits", "embedded")
    assert (data.num_train, data.num_test, data.input_dim, data.output_dim) == (1437, 360, 64, 10)
    assert data.x_train.dtype == data.y_train.dtype == np.float32
    assert "no official split" in data.notes[0]
    assert data.classes == tuple(range(10))
    np.testing.assert_array_equal(data.labels_train, load_digits().target[:1437])
    np.testing.assert_array_equal(data.labels_test, load_digits().target[-360:])
    np.testing.assert_array_equal(data.y_train, np.eye(10)[data.labels_train])


def test_raw_digits():
    data = load(prepare=False, layout="image", dtype="float64")
    assert data.x_train.shape == (1437, 8, 8, 1)
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(data.x_test[..., 0] * 16, load_digits().images[1437:])
    assert data.y_train.shape == (1437, 10)
    assert data.input_dim == 64


def test_first_samples_of_the_chosen_classes_in_file_order():
    data = load(classes=(7, 3), num_train=20, num_test=10, prepare=False, dtype="float64")
    digits = load_digits()
    train = [i for i in range(1437) if digits.target[i] in (3, 7)][:20]
    np.testing.assert_array_equal(data.x_train * 16, digits.data[train])
    # The indices follow the order given: class 7 has index 0.
    np.testing.assert_array_equal(data.labels_train, digits.target[train] == 3)
    np.testing.assert_array_equal(
        data.y_train[:, 0], np.where(digits.target[train] == 7, 0.5, -0.5)
    )
    assert data.y_test.shape == (10, 1)
    assert data.classes == (7, 3)
    assert data.class_names == ("7", "3")


def test_preparation_of_train_and_test_apart():
    raw = load(classes=(0, 1, 2), num_train=50, num_test=30, prepare=False, dtype="float64")
    data = load(classes=(0, 1, 2), num_train=50, num_test=30, dtype="float64")
    np.testing.assert_allclose(data.x_train, prepare(raw.x_train), atol=1e-15)
    np.testing.assert_allclose(data.x_test, prepare(raw.x_test), atol=1e-15)
    np.testing.assert_allclose(norms(data.x_train), 1.0, rtol=1e-14)
    np.testing.assert_allclose(norms(data.x_test), 1.0, rtol=1e-14)


def test_flat_layout_is_the_image_layout_reshaped():
    image, flat = load(layout="image", num_train=30), load(num_train=30)
    np.testing.assert_array_equal(image.x_train.reshape(30, -1), flat.x_train)


@pytest.mark.parametrize("dtype", ["float32", "float64", np.float64, np.dtype("float32")])
def test_dtype(dtype):
    data = load(num_train=5, num_test=5, dtype=dtype)
    for array in (data.x_train, data.y_train, data.x_test, data.y_test):
        assert array.dtype == np.dtype(dtype)
    assert data.labels_train.dtype == np.int64


def test_preparation_is_done_in_float64():
    single, double = load(num_train=30), load(num_train=30, dtype="float64")
    np.testing.assert_array_equal(single.x_train, double.x_train.astype(np.float32))


def test_gaussian():
    data = load("gaussian", input_dim=6, num_classes=3, num_train=40, num_test=12, dtype="float64")
    assert data.source == "synthetic"
    assert data.x_train.shape == (40, 6)
    assert data.y_train.shape == (40, 3)
    assert data.num_test == 12
    assert data.classes == (0, 1, 2)
    np.testing.assert_allclose(norms(data.x_train), 1.0, rtol=1e-14)
    other = load("gaussian", input_dim=6, num_train=40, seed=1, dtype="float64")
    assert not np.allclose(data.x_train, other.x_train)


def test_gaussian_defaults():
    data = load("gaussian")
    assert (data.num_train, data.num_test, data.input_dim, data.output_dim) == (1000, 200, 20, 1)


def test_forster():
    options = {"num_train": 60, "num_test": 20, "input_dim": 6, "dtype": "float64"}
    data = load("gaussian", forster=True, **options)
    np.testing.assert_allclose(data.x_train.T @ data.x_train, 10 * np.eye(6), atol=1e-8)
    prepared = load("gaussian", **options)
    expected = forster_transform(prepared.x_train, prepared.x_test)
    np.testing.assert_array_equal(data.x_test, expected.x_test)
    np.testing.assert_array_equal(data.labels_train, prepared.labels_train)


def test_forster_reduces_to_the_rank():
    data = load(num_train=30, forster=True, dtype="float64")
    assert data.x_train.shape == (30, 30)
    assert data.x_test.shape == (360, 30)
    np.testing.assert_allclose(data.x_train.T @ data.x_train, np.eye(30), atol=1e-8)


def test_forster_of_all_digits_on_their_leading_directions():
    data = load(forster=True, rank_tolerance=0.05, dtype="float64")
    rank = data.input_dim
    assert 10 < rank < 61
    expected = data.num_train / rank * np.eye(rank)
    np.testing.assert_allclose(data.x_train.T @ data.x_train, expected, atol=1e-7)


def test_mnist_format(monkeypatch, tmp_path):
    contents = mnist_contents(num_train=40, num_test=20)
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", with_files("mnist", contents))
    folder = write_all(tmp_path / "mnist", contents)
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    data = load("mnist", prepare=False, layout="image", dtype="float64", classes=(0, 1, 2))
    assert data.source == str(folder)
    assert data.labels_train.tolist() == [0, 1, 2] * 4
    assert data.labels_test.tolist() == [0, 1, 2] * 2
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", ndim=3)
    np.testing.assert_allclose(data.x_test[4, ..., 0], images[11] / 255)
    with pytest.raises(DatasetError, match=r"num_train=13 .*: 12 train samples in the classes"):
        load("mnist", classes=(0, 1, 2), num_train=13)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train-labels-idx1-ubyte.gz": "t10k-labels-idx1-ubyte.gz"}, "expected 40 labels.*20"),
        ({"train-labels-idx1-ubyte.gz": "t10k-images-idx3-ubyte.gz"}, "magic number 0x00000801"),
    ],
)
def test_mnist_files_that_do_not_belong_together(monkeypatch, tmp_path, changed, message):
    contents = mnist_contents(num_train=40, num_test=20)
    contents.update({name: contents[other] for name, other in changed.items()})
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", with_files("mnist", contents))
    write_all(tmp_path / "mnist", contents)
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=message):
        load("mnist")


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """Write some of the six files, of two samples each, and return the folder."""
    contents = {f"data_batch_{k}.bin": cifar_bytes([k, 0], k) for k in range(1, 6)}
    contents["test_batch.bin"] = cifar_bytes([9, 8], 0)
    monkeypatch.setitem(catalogue.CATALOGUE, "cifar10", with_files("cifar10", contents))
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    return lambda *chosen: write_all(
        tmp_path / "cifar10", {n: d for n, d in contents.items() if not chosen or n in chosen}
    )


def test_cifar10_official_split(cifar):
    folder = cifar()
    data = load("cifar10", prepare=False, layout="image", dtype="float64")
    assert data.labels_train.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert data.labels_test.tolist() == [9, 8]
    assert data.notes == ()
    images, _ = read_cifar(folder / "data_batch_3.bin")
    np.testing.assert_allclose(data.x_train[4:6], images / 255)
    assert data.class_names[9] == "truck"


def test_cifar10_held_out_without_the_test_file(cifar):
    cifar("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin")
    data = load("cifar10")
    assert data.labels_train.tolist() == [1, 0]
    assert data.labels_test.tolist() == [2, 0]
    assert data.notes == (HELD_OUT_NOTE,)
    assert HELD_OUT_NOTE == "held-out from data_batch_2, not the official test set"


def test_cifar10_split_of_a_part_of_the_training_files():
    names_there = ("data_batch_1.bin", "data_batch_2.bin", "data_batch_4.bin", "test_batch.bin")
    train, test, notes = cifar10_split(names_there)
    assert train == ("data_batch_1.bin", "data_batch_2.bin")
    assert test == "test_batch.bin"
    assert notes == ("training set from data_batch_1.bin, data_batch_2.bin only",)


def test_real_mnist(real_data):
    real_data("mnist")
    data = load("mnist", classes=(0, 1), num_train=500, num_test=100, dtype="float64")
    # The paper's preparation of the first 500 zeros and ones.
    assert data.x_train.shape == (500, 784)
    np.testing.assert_allclose(norms(data.x_train), 1.0, rtol=1e-13)
    assert set(np.unique(data.y_train)) == {-0.5, 0.5}
    # The training labels begin 5, 0, 4, 1, 9, 2, 1.
    assert data.labels_train[:3].tolist() == [0, 1, 1]
    raw = load("mnist", num_train=7, num_test=3, prepare=False)
    assert raw.labels_train.tolist() == [5, 0, 4, 1, 9, 2, 1]
    assert raw.labels_test.tolist() == [7, 2, 1]
    assert raw.x_train.max() <= 1.0


def test_real_cifar10(real_data):
    folder = real_data("cifar10")
    data = load("cifar10", num_train=100, num_test=50, layout="image", prepare=False)
    assert data.labels_train[:5].tolist() == [6, 9, 9, 4, 1]
    np.testing.assert_allclose(data.x_train[0, 0, 0], np.array([59, 62, 63]) / 255, rtol=1e-6)
    assert (HELD_OUT_NOTE in data.notes) is not (folder / "test_batch.bin").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnits"}, "unknown data set 'mnits'; did you mean 'mnist'"),
        ({"name": "Fashion-MNIST"}, "did you mean 'fashion_mnist'"),
        ({"name": "xyz"}, "unknown data set 'xyz'; known are digits, mnist"),
        ({"name": 3}, "unknown data set 3"),
        ({"name": ["digits"]}, "unknown data set"),
        ({"classes": (0, 10)}, r"classes of digits are 0\.\.\.9, got \(0, 10\)"),
        ({"classes": (0, -1)}, "every class must be an integer of at least 0, got -1"),
        ({"classes": (0, 1.0)}, "every class must be an integer"),
        ({"classes": (1, 1)}, "must not repeat"),
        ({"classes": (1,)}, "at least two classes"),
        ({"classes": ()}, "at least two classes"),
        ({"classes": "01"}, "sequence of class ids"),
        ({"classes": 5}, "sequence of class ids"),
        ({"num_train": 1438}, "num_train=1438 is more than digits has: 1437 train samples"),
        ({"num_test": 361}, "num_test=361 is more than digits has: 360 test samples"),
        ({"num_train": 0}, "num_train must be an integer of at least 1, got 0"),
        ({"num_test": -3}, "num_test must be an integer of at least 1, got -3"),
        ({"num_train": 2.5}, "num_train must be an integer"),
        ({"num_train": True}, "num_train must be an integer"),
        ({"layout": "chw"}, "layout must be 'flat' or 'image', got 'chw'"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', got 'float16'"),
        ({"dtype": "int32"}, "dtype must be"),
        ({"dtype": "flaot"}, "dtype must be"),
        ({"dtype": None}, "dtype must be"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"forster": True, "layout": "image"}, "forster .*needs layout='flat'"),
        ({"rank_tolerance": 0.1}, "give forster=True too"),
        ({"forster": True, "num_train": 100}, "not in general position"),
        ({"input_dim": 5}, "for gaussian only, not digits"),
        ({"num_classes": 5}, "for gaussian only, not digits"),
        ({"name": "gaussian", "layout": "image"}, "gaussian has no images"),
        ({"name": "gaussian", "classes": (0, 1)}, "gaussian has no classes to choose from"),
        ({"name": "gaussian", "input_dim": 0}, "input_dim must be an integer of at least 1"),
        ({"name": "gaussian", "num_classes": 1}, "num_classes must be an integer of at least 2"),
        # Arguments are checked before any file is looked for.
        ({"name": "mnist", "num_train": 60_001}, "is more than mnist has: 60000 train samples"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(DatasetError, match=message):
        load(**options)


def test_too_few_samples_in_the_classes():
    available = int(np.isin(load_digits().target[:1437], (0, 1)).sum())
    with pytest.raises(DatasetError, match=f"{available} train samples in the classes"):
        load(classes=(0, 1), num_train=available + 1)
    assert load(classes=(0, 1), num_train=available).num_train == available


def test_names_and_independence():
    assert names() == ("digits", "mnist", "fashion_mnist", "cifar10", "gaussian")
    package = sys.modules["natgrad_datasets"]
    assert all(hasattr(package, name) for name in package.__all__)
