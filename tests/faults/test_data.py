"""Data sets asked for what cannot be given, and files that are not what they should be."""

import warnings
from functools import partial

import natgrad_datasets as nd
import numpy as np
from fault_harness import Refused, Right, over
from natgrad_datasets import memory
from natgrad_datasets.synthetic import gaussian

NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3))
INTEGER = Refused("must be an integer of at least")
FITS = Refused(r"would take [\d,.]+ GiB of memory, and this process may have")
NUMBER = Refused("must be 0 or positive and finite")

BAD_COUNTS = {
    "0": 0, "-1": -1, "1.5": 1.5, "2.0": 2.0, "NaN": NAN, "inf": INF, "a text": "3",
    "None": None, "True": True, "a list": [3], "an array": np.array(3), "a NumPy bool": np.bool_(1),
}  # fmt: skip


def varied(call, name, values, answer):
    return {
        f"{call.__name__} with {name} {word}": (partial(call, **{name: value}), answer)
        for word, value in values.items()
    }


def teacher(**changes):
    settings = {"widths": (3, 2), "num_train": 2, "num_test": 2, "seed": 0, **changes}
    made = nd.linear_teacher(**settings)
    return made.x_train, made.y_train, made.weights


def network(**changes):
    return nd.random_linear_network(**{"widths": (3, 2), "seed": 0, **changes})


def sparse(**changes):
    sizes = {"num_train": 2, "num_test": 2, "input_dim": 3, "num_relevant": 1, "seed": 0}
    return nd.sparse_classification(**{**sizes, **changes})


def matrix(**changes):
    return nd.low_rank_matrix(**{"size": 4, "rank": 2, "seed": 0, **changes})


def mask(**changes):
    return nd.observed_mask(**{"shape": (3, 4), "num_observed": 5, "seed": 0, **changes})


def drawn(**changes):
    sizes = {"num_train": 3, "num_test": 2, "input_dim": 4, "num_classes": 2, "seed": 0}
    return gaussian(**{**sizes, **changes})


def load(**changes):
    found = nd.load(**{"name": "gaussian", "num_train": 20, "num_test": 10, **changes})
    return found.x_train, found.y_train


FEW = {word: BAD_COUNTS[word] for word in ("-1", "1.5", "NaN", "a text", "True")}
NO_NUMBERS = {word: BAD_COUNTS[word] for word in ("-1", "NaN", "inf", "a text", "True")}
SEEDS = FEW | {"None": None, "a generator": RNG}
HUGE = {"10^14": 10**14, "10^30": 10**30, "a NumPy integer": np.int64(2**62)}
NO_SEQUENCE = {"3": 3, "None": None, "a set": {3, 2}, "a text": "32", "an array": np.array(3)}
COUNTS = {
    **varied(load, "num_train", {k: v for k, v in BAD_COUNTS.items() if v is not None}, INTEGER),
    **varied(load, "input_dim", FEW, INTEGER),
    **varied(load, "num_classes", FEW | {"1": 1}, INTEGER),
    **varied(load, "seed", SEEDS, INTEGER),
    **varied(drawn, "seed", SEEDS, INTEGER),
    **varied(teacher, "seed", SEEDS, INTEGER),
    **varied(network, "seed", SEEDS, INTEGER),
    **varied(teacher, "num_train", FEW, INTEGER),
    **varied(sparse, "num_test", FEW, INTEGER),
    **varied(matrix, "rank", FEW, INTEGER),
    **varied(mask, "num_observed", FEW, INTEGER),
    **varied(teacher, "noise_variance", NO_NUMBERS | {"1j": 1j, "10^400": 10**400}, NUMBER),
    **varied(teacher, "decay", NO_NUMBERS | {"None": None}, NUMBER),
    **varied(teacher, "widths", NO_SEQUENCE, Refused("widths must be a sequence of")),
    **varied(network, "widths", {"floats": (3.0, 2.0), "texts": ("3", "2")}, INTEGER),
    **varied(network, "widths", {"one": (3,), "no": ()}, Refused("needs two entries at least")),
    **varied(mask, "shape", NO_SEQUENCE | {"3 sides": (1, 2, 3)}, Refused("rows, columns")),
    **varied(drawn, "num_train", HUGE, FITS),
    **varied(load, "input_dim", HUGE, FITS),
    **varied(teacher, "num_test", HUGE, FITS),
    **varied(network, "widths", {"a million": (10**7, 10**7)}, FITS),
    **varied(sparse, "num_train", HUGE, FITS),
    **varied(matrix, "size", HUGE, FITS),
    **varied(mask, "shape", {"a million": (10**7, 10**7)}, FITS),
    "10^7 x 10^5": (partial(drawn, num_train=10**7, input_dim=10**5), FITS),
    "labels of 10^14 classes": (partial(nd.encode_labels, [0, 1], 10**14), FITS),
}


@over(COUNTS)
def test_counts_and_seeds(run, answer):
    answer.check(run)


SAME = {
    "load": (partial(load, num_train=np.int64(20), seed=np.uint8(0)), load),
    "gaussian": (partial(drawn, num_train=np.int32(3), seed=np.int64(0)), drawn),
    "teacher": (partial(teacher, widths=np.array([3, 2]), num_train=np.int8(2)), teacher),
    "teacher with a float32 decay": (partial(teacher, decay=np.float32(5)), teacher),
    "sparse": (partial(sparse, input_dim=np.int64(3)), sparse),
    "matrix": (partial(matrix, size=np.uint16(4)), matrix),
    "mask": (partial(mask, shape=np.array([3, 4])), mask),
    "labels": (
        partial(nd.encode_labels, np.array([0, 2], np.uint64), np.int64(3)),
        lambda: np.eye(3)[[0, 2]],
    ),
}


@over({name: (run, Right(expected, 0.0)) for name, (run, expected) in SAME.items()})
def test_numpy_integers_are_integers(run, answer):
    answer.check(run)


def scaled(factor):
    return [[1 * factor, 2 * factor], [4 * factor, 5 * factor]]


# mean 3, standard deviation sqrt(2.5)
STANDARD = (np.array([[1, 2], [4, 5]]) - 3) / np.sqrt(2.5)
TINY, ONE = 5e-324, np.float64(1)
MASKED = np.ma.array(X, mask=X > 0)
REAL = Refused("must be an array of real numbers")
ARRAYS = {
    **{
        f"standardise at {factor:g}": (
            partial(nd.standardise, scaled(factor)), Right(STANDARD, 1e-14)
        )
        for factor in (1.0, 1e-160, 1e-300, 1e160, 3e307)
    },
    # exact multiples of the smallest number
    "standardise denormals": (partial(nd.standardise, scaled(TINY)), Right(STANDARD, 1e-14)),
    # all but one ulp apart: the mean rounds to one of the two values
    "standardise one ulp": (
        partial(nd.standardise, [[ONE, np.nextafter(ONE, 2)]]), Right(np.array([[-1.0, 1.0]]))
    ),
    "standardise 1e308 and -1e308": (
        partial(nd.standardise, [[1e308, -1e308]]), Right(np.array([[1.0, -1.0]]))
    ),
    "standardise constants": (partial(nd.standardise, np.ones((2, 2))), Refused("constant data")),
    "standardise zeros": (partial(nd.standardise, np.zeros((2, 2))), Refused("constant data")),
    "unit norm of denormals": (
        partial(nd.unit_norm, [[TINY, TINY]]), Right(np.full((1, 2), np.sqrt(0.5)), 1e-14)
    ),
    "unit norm at 1e308": (
        partial(nd.unit_norm, [[1e308, 1e308]]), Right(np.full((1, 2), np.sqrt(0.5)), 1e-14)
    ),
    "unit norm of zeros": (partial(nd.unit_norm, np.zeros((1, 2))), Refused("norm zero")),
    **{
        f"{call.__name__} of {word}": (partial(call, x), answer)
        for call in (nd.standardise, nd.unit_norm, nd.prepare, nd.forster_transform)
        for word, x, answer in (
            ("NaN", [[1, NAN]], Refused("holds NaN or infinite values, first in sample 0")),
            ("inf", [[1, 2], [INF, 3]], Refused("holds NaN or infinite values, first in sample 1")),
            ("long integers", [[10**400, 1]], REAL),
            ("complex numbers", [[1 + 1j, 2]], REAL),
            ("a complex array", X + 1j, REAL),
            ("texts", [["1", "2"]], REAL),
            ("dates", np.array([["2026-01-01"]], "datetime64[D]"), REAL),
            ("objects", [[{}, 1]], REAL),
            ("ragged rows", [[1, 2], [3]], REAL),
            ("masked entries", MASKED, Refused("has masked entries")),
            ("no rows", np.zeros((0, 3)), Refused("must be non-empty")),
            ("no columns", np.zeros((3, 0)), Refused("must be non-empty")),
            ("a vector", [1.0, 2.0], Refused("first of at least two axes")),
            ("a number", 3.0, Refused("first of at least two axes")),
            ("None", None, Refused("x|real numbers")),
        )
    },
    "Python integers": (partial(nd.standardise, [[1, 2], [4, 5]]), Right(STANDARD, 1e-14)),
    "a mask without entries": (
        partial(nd.standardise, np.ma.array([[1, 2], [4, 5]])), Right(STANDARD, 1e-14)
    ),
    "big-endian": (
        partial(nd.standardise, np.array([[1, 2], [4, 5]], ">f4")), Right(STANDARD, 1e-14)
    ),
    "forster of another width": (
        partial(nd.forster_transform, X, X[:, :2]), Refused("2 components per point, x_train has 3")
    ),
    "forster of zero points": (
        partial(nd.forster_transform, np.zeros((3, 2))), Refused("non-zero points: row 0")
    ),
    **{
        f"forster with tolerance {value}": (
            partial(nd.forster_transform, X, tolerance=value), Refused("tolerance must be")
        )
        for value in (0, 1, -1, NAN, "small", None, True)
    },
    **{
        f"forster with rank_tolerance {value}": (
            partial(nd.forster_transform, X, rank_tolerance=value), Refused("rank_tolerance must")
        )
        for value in (1, -1, NAN, "small", True)
    },
}  # fmt: skip


def isotropy(factor):
    """How far the transformed points are from Z^T Z = (N/r) I."""
    z = nd.forster_transform(X * factor).x_train
    return z.T @ z


ARRAYS |= {
    f"forster at {factor:g}": (partial(isotropy, factor), Right(8 / 3 * np.eye(3), 1e-9))
    for factor in (1.0, 1e-200, 1e-300, 1e200, 1e300)
} | {
    f"forster with max_iterations {value}": (
        partial(nd.forster_transform, X, max_iterations=value),
        INTEGER,
    )
    for value in (0, -1, 1.5, NAN, "10", True)
}


@over(ARRAYS)
def test_arrays(run, answer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer.check(run)


LABELS = Refused("labels must be")
OPTIONS = {
    "labels below 0": (partial(nd.encode_labels, [-1, 0], 3), Refused("labels must be in 0...2")),
    "labels too large": (partial(nd.encode_labels, [0, 3], 3), Refused("labels must be in 0...2")),
    "labels as floats": (partial(nd.encode_labels, [0.0, 1.0], 3), LABELS),
    "labels as bools": (partial(nd.encode_labels, [True, False], 3), LABELS),
    "labels as matrix": (partial(nd.encode_labels, [[0, 1]], 3), LABELS),
    "ragged labels": (partial(nd.encode_labels, [[0], [1, 2]], 3), LABELS),
    **{
        f"{value!r} classes": (partial(nd.encode_labels, [0, 1], value), INTEGER)
        for value in (1, 0, -3, 2.5, NAN, "3", None, True)
    },
    **{
        f"data set {name!r}": (partial(nd.load, name), Refused("unknown data set"))
        for name in ("mnits", "", None, 3, ("digits",), "../mnist", "\ud800")
    },
    **{
        f"dtype {dtype!r}": (partial(load, dtype=dtype), Refused("dtype must be"))
        for dtype in ("float16", "int32", None, 3, [("a", 3)], ">f4", complex)
    },
    **{
        f"layout {layout!r}": (partial(load, layout=layout), Refused("layout must be"))
        for layout in ("image", "Flat", None, ["flat"], np.array(["flat", "image"]))
    },
    **{
        f"{name}={value!r}": (partial(load, **{name: value}), Refused(f"{name} must be True or"))
        for name in ("prepare", "forster")
        for value in ("no", None, 1, [])
    },
    "a rank tolerance alone": (partial(load, rank_tolerance=0.1), Refused("give forster=True too")),
    "a rank tolerance of NaN": (partial(load, rank_tolerance=NAN, forster=True), NUMBER),
    "classes of gaussian": (partial(load, classes=[0, 1]), Refused("has no classes to choose")),
    **{
        f"classes {classes!r}": (partial(nd.load, classes=classes), Refused("class"))
        for classes in (
            (),
            (1,),
            (1, 1),
            (0, 10),
            (-1, 2),
            "01",
            {0, 1},
            3,
            (0.0, 1.0),
            (0, None),
            np.array(3),
        )
    },
    "more than there are": (
        partial(nd.load, num_train=1438),
        Refused("more than digits has: 1437"),
    ),
}


@over(OPTIONS)
def test_options(run, answer):
    answer.check(run)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER", (limit, tmp_path / "none"))
    for content, fits in (("max\n", True), (f"{2**20}\n", False)):
        limit.write_text(content)
        if fits:
            drawn(num_train=2**15)
        else:
            FITS.check(partial(drawn, num_train=2**15))
