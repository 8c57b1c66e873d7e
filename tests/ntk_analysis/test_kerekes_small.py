"""Figures 2, 3 and 6 of Kerekes et al.: pieces of their checks, and the drawings."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from natgrad_datasets.separable import planar, sparse_classification

from natgrad_flax.linear import matrix_factorization as mf
from natgrad_flax.linear.references import (
    gaussian_accuracy,
    max_margin,
    natural_gradient_limit,
)
from ntk_analysis.frame import theme
from ntk_analysis.reproduce import load_checks
from ntk_analysis.reproduce.drawings import DRAWINGS
from ntk_analysis.reproduce.kerekes import kernel_maps, small_sparse, theory, toy
from ntk_analysis.results import plain

pytestmark = pytest.mark.usefixtures("x64")

load_checks()
X, Y = planar(1)


def drawn(identifier: str, data: dict):
    """The figure of data that have been in a file, after saving it."""
    with theme():
        figure = DRAWINGS[identifier](json.loads(json.dumps(plain(data), allow_nan=False)))
        figure.savefig(io.BytesIO(), format="svg")
    return figure


# ----- Fig. 2


def test_scan_of_directions_against_a_known_separator():
    # the margins of both points are equal on the diagonal, which is the max margin of any norm
    signed = np.array([[2.0, 1.0], [1.0, 2.0]])
    assert toy.scanned_angle(signed, lambda b: np.sum(b**2, axis=1)) == pytest.approx(45)
    # cheaper along the first axis: as far down as the costs allow
    assert toy.scanned_angle(signed, lambda b: np.abs(b) @ np.array([1.0, 5.0])) == pytest.approx(0)


def test_starts_have_a_product_of_zero_and_both_signs():
    weights = toy.start_weights(40, 3, 0)
    assert not weights[-1].any()
    assert np.abs(weights[:-1]).min() >= 0.6
    assert 0.2 < np.mean(weights[:-1] > 0) < 0.8
    assert not toy.start_weights(2, 1, 0).any()


def test_figure_2_from_short_runs():
    paths = toy.euclidean_paths(X, Y, ((120, 20), (80, 40)))
    assert [(path.method, path.depth) for path in paths] == [("EGD", 1), ("EGD", 4)]
    natural = toy.natural_path(X, Y, 2, 1, 100)
    paths += [natural, natural._replace(depth=1), natural._replace(depth=4)]
    assert paths[0].times == pytest.approx([0.4, 0.8, 1.2, 1.6, 2, 2.4, 3.2, 4])
    assert paths[-1].times[-1] == pytest.approx(1)
    # from zero, Newton's first direction
    newton = np.linalg.lstsq(Y[:, None] * X, np.ones(10), rcond=None)[0]
    assert natural.angles[0] == pytest.approx(float(toy.angle(newton)), abs=0.5)
    targets = {"l_2": 24.6, "l_1/2": 0.0, "flow": 19.7}
    figure = drawn("KE-Fig2", toy.document(X, Y, targets, paths))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["A: direct, EGD", "B: L = 4 diagonal, EGD", "C: direct, NGD",
                          "D: L = 4 diagonal, NGD"]  # fmt: skip
    # the last separator is orthogonal to the last coefficients
    (line,) = [x for x in figure.axes[0].get_lines() if "separator" in x.get_label()]
    ends = np.array(line.get_xydata())
    assert (ends[1] - ends[0]) @ paths[0].coefficients[-1] == pytest.approx(0, abs=1e-4)
    # a path of angles in each lower panel, and the one of depth 2 in the last
    counts = [len(axis.get_lines()) for axis in figure.axes[4:]]
    assert counts == [4, 4, 4, 5]


# ----- Fig. 3


def test_expected_kernels_against_dense_jacobians():
    factors = kernel_maps.random_factors(3, 7)
    blocks = []
    for index in range(3):
        left = np.linalg.multi_dot([np.eye(11), np.eye(11), *factors[:index]])
        right = np.linalg.multi_dot([*factors[index + 1 :], np.eye(11), np.eye(11)])
        blocks.append(np.kron(left, right.T))
    jacobian = np.hstack(blocks)
    place = np.ravel_multi_index(kernel_maps.ENTRY, (11, 11))
    found = kernel_maps.expected_kernels(factors)
    np.testing.assert_allclose(
        found["EGF"].ravel(), jacobian @ jacobian[place], rtol=1e-10, atol=1e-14
    )
    assert np.count_nonzero(found["NGD"]) == 1
    # the limit of small steps
    assert found["NGD"][5, 5] == pytest.approx(1, abs=0.2)


def test_parts_of_a_kernel():
    kernel = np.arange(121.0).reshape(11, 11)
    assert len(kernel_maps.off_entry(kernel)) == 120
    assert 60 not in kernel_maps.off_entry(kernel)
    assert sorted(kernel_maps.cross(kernel)) == sorted({*range(55, 66), *range(5, 121, 11)} - {60})
    assert kernel_maps.off_cross(kernel).shape == (10, 10)
    assert not set(kernel_maps.cross(kernel)) & set(kernel_maps.off_cross(kernel).ravel())


def test_figure_3_notices_the_printed_order_of_the_factors(monkeypatch):
    def printed(factors, gradient):
        left, right = mf.neighbours(factors)
        eye = np.eye(11)
        return tuple(
            np.linalg.pinv(eye if b is None else b.T)
            @ gradient
            @ np.linalg.pinv(eye if a is None else a)
            / len(factors)
            for a, b in zip(left, right, strict=True)
        )

    monkeypatch.setitem(mf._RULES, "split", printed)
    factors = kernel_maps.random_factors(2, 0)
    found = mf.flow_kernel(factors, kernel_maps.ENTRY, kind="split")
    assert np.abs(found - kernel_maps.expected_kernels(factors)["NGF"]).max() > 1e-2


def test_figure_3():
    maps = {
        str(depth): {
            name: kernel.tolist()
            for name, kernel in kernel_maps.expected_kernels(
                kernel_maps.random_factors(depth, 0)
            ).items()
        }
        for depth in kernel_maps.DEPTHS
    }
    figure = drawn("KE-Fig3", {"entry": [5, 5], "maps": maps})
    pictures = [axis for axis in figure.axes if axis.get_images()]
    assert len(pictures) == 16
    assert [axis.get_title().split("\n")[0] for axis in pictures[:4]] == list(kernel_maps.COLUMNS)
    for index, axis in enumerate(pictures):
        (image,) = axis.get_images()
        depth, name = kernel_maps.DEPTHS[index // 4], kernel_maps.COLUMNS[index % 4]
        np.testing.assert_allclose(image.get_array(), maps[str(depth)][name])
        low, high = image.get_clim()
        others = [np.delete(np.ravel(kernel), 60) for kernel in maps[str(depth)].values()]
        assert -low == high == (np.max(np.abs(others)) if depth > 1 else 1)


# ----- Fig. 6


def test_theory_of_accuracies_against_the_programs():
    sets = [sparse_classification(100, 1, 80, 5, seed) for seed in range(6)]
    for solve, expected in (
        (natural_gradient_limit, theory.natural_limit_accuracy(1.25)),
        (lambda x, y: max_margin(x, y).coefficients, theory.max_margin_accuracy(1.25)),
    ):
        found = [gaussian_accuracy(solve(s.x_train, s.y_train), s.teacher) for s in sets]
        assert np.mean(found) == pytest.approx(expected, abs=2.5 * theory.deviation(80, 6))
    # near N = D nothing is learnt by the one, and the other does not notice
    assert theory.natural_limit_accuracy(1.01) < 0.55 < 0.7 < theory.max_margin_accuracy(1.01)


def test_starts_of_the_sparse_classifier():
    usual = small_sparse.starts(10, 50, 0)
    assert list(usual) == list(small_sparse.EUCLIDEAN)
    for name, weights in usual.items():
        assert weights.shape == (small_sparse.EUCLIDEAN[name], 50)
        assert (weights > 0).any()
        assert (weights < 0).any()
    assert not np.array_equal(usual["EGD, L = 1"], small_sparse.starts(10, 50, 1)["EGD, L = 1"])
    more = small_sparse.starts(50, 50, 0)
    positive = [more[name] for name in more if name not in usual]
    assert [len(weights) for weights in positive] == [2, 3]
    assert all((weights == 0.1).all() for weights in positive)


def test_figure_6_at_a_small_size():
    said: list[str] = []
    test, fitted = small_sparse.accuracies((6, 150), 8, 2, 10_000, said.append)
    assert len(said) == 2
    assert test["NGD"].keys() == {6, 150}
    # little is learnt from 6 samples, much from 150
    for name in ("NGD", *small_sparse.EUCLIDEAN):
        assert len(test[name][6]) == 3
        assert np.mean(test[name][150]) > max(0.8, np.mean(test[name][6]))
    assert fitted["NGD"][150] == [1, 1, 1]
    data = small_sparse.document(test, 8)
    assert [start["num"] for start in data["starts"]] == [150]
    figure = drawn("KE-Fig6", data)
    left, right = figure.axes
    labels = left.get_legend_handles_labels()[1]
    assert labels == [*small_sparse.EUCLIDEAN, "NGD", "NGD, theory for N < D"]
    assert [tick.get_text() for tick in right.get_xticklabels()] == [
        "EGD, L = 4\nN = 150\nN(0, 0.1²)"
    ]


def test_natural_descent_reaches_its_limit():
    data = sparse_classification(40, 1, 4, 2, 0)
    limit = natural_gradient_limit(data.x_train, data.y_train)
    found = small_sparse.train_naturally(data, 2, 3000)
    cosine = found @ limit / np.linalg.norm(found) / np.linalg.norm(limit)
    assert cosine > 0.995
