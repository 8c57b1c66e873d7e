"""Figure 2 of Karakida & Osawa (2020): test accuracy at infinite width, by structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import scipy.linalg
from flax import nnx
from natgrad_datasets import Dataset, forster_transform
from numpy.typing import NDArray

from natgrad_flax import (
    KFAC,
    MLP,
    BlockDiagonal,
    BlockTriDiagonal,
    Exact,
    LayerWise,
    Signals,
    Structure,
)
from ntk_analysis.coefficient import analytic_signals
from ntk_analysis.empirical import Matrix
from ntk_analysis.prediction import Prediction, predict_from_signals
from ntk_analysis.prior import initial_outputs
from ntk_analysis.reproduce.images import images
from ntk_analysis.reproduce.karakida_osawa.common import unit_rows
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
)

_WIDTH = 4096
_DEPTH = 3
_INITIALISATIONS = 10
# how far accuracies may be apart, in standard deviations over initialisations
_WITHIN = 6.0
_ALL = tuple(range(10))
_BATCH = 10000
_LAYER_WISE: dict[str, Structure] = {
    "exact": Exact(),
    "block-diagonal": BlockDiagonal(),
    "block-tri-diagonal": BlockTriDiagonal(),
}
_CLAIM = (
    "The test accuracy varies with the approximation of the Fisher, but the accuracies are "
    "comparable to each other (Section 4.4)."
)
_NETWORK = (
    "L = 3, ReLU, sigma_w^2 = 2, no biases; analytic kernels at infinite width; f_0 of 10 networks "
    "of width 4096, seeds 0 to 9"
)


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of a structure over initialisations.

    Attributes:
      name: of the structure.
      values: one a network.
    """

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over initialisations."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Over initialisations, with S - 1."""
        return float(np.std(self.values, ddof=1))


def accuracies(
    data: Dataset,
    structures: dict[str, Structure],
    report: Report,
    *,
    width: int = _WIDTH,
    initialisations: int = _INITIALISATIONS,
) -> list[Accuracy]:
    """Test accuracy of f_infinity with analytic kernels, over drawn initialisations.

    Layer-wise structures by Theorem 4.1 written out, from one factorisation a layer for all of
    them: the library makes sure of the ranks anew in each, which takes four times as long.
    KO-Fig2-left-small has both ways side by side.

    Args:
      data: training and test samples.
      structures: by name; those that need the same kernels share them.
      report: told what is being done.
      width: of the networks that f_0 is drawn from.
      initialisations: how many.
    """
    widths = (data.input_dim, *[width] * (_DEPTH - 1), data.output_dim)
    model = MLP(widths, rngs=nnx.Rngs(0))
    inputs = np.concatenate([data.x_train, data.x_test])
    report(f"{initialisations} networks of width {width}")
    initial = initial_outputs(model, inputs, range(initialisations))
    targets = np.asarray(data.y_train, np.float64)

    def kernels(done: int, blocks: int) -> None:
        report(f"kernels of {data.num_train} and {data.num_test} samples, {done}/{blocks} blocks")

    found = []
    # structures that are made of the same kernels share them
    groups: dict[tuple[str, ...], dict[str, Structure]] = {}
    for name, structure in structures.items():
        groups.setdefault(structure.limit_kernels, {})[name] = structure
    for group in groups.values():
        train, test = analytic_signals(
            next(iter(group.values())), model, data.x_train, data.x_test, progress=kernels
        )
        assert test is not None
        parts: list[Matrix] = []
        for name, structure in group.items():
            report(f"{name}, {data.num_train} samples")
            if isinstance(structure, LayerWise):
                parts = parts or layer_parts(train, test, _residuals(targets, initial))
                samples = _moved(weighted(parts, structure.weights(_DEPTH)), targets, initial)
                prediction = Prediction(samples.mean(axis=0), samples=samples)
            else:
                prediction = predict_from_signals(structure, train, test, targets, initial=initial)
            found.append(Accuracy(name, tuple(prediction.sampled_accuracies(data.y_test))))
    return found


def _residuals(targets: Matrix, initial: Matrix) -> Matrix:
    """y - f_0(x) of all initialisations beside each other, shape (N, S C)."""
    return np.concatenate(list(targets - initial[:, : len(targets)]), axis=1)


def _moved(moves: Matrix, targets: Matrix, initial: Matrix) -> Matrix:
    """Where the test outputs end that move by (N', S C), shape (S, N', C)."""
    outside: Matrix = initial[:, len(targets) :]
    return outside + np.swapaxes(moves.reshape(len(moves), len(initial), -1), 0, 1)


def layer_parts(train: Signals, test: Signals, vectors: Matrix) -> list[Matrix]:
    """Theta_l(x', x) Theta_l^-1 V of every layer for V (N, k), L arrays (N', k)."""
    with jax.enable_x64(True):
        return [
            np.asarray(outside.gram(inside))
            @ scipy.linalg.solve(np.asarray(inside.gram()), vectors, assume_a="pos")
            for inside, outside in zip(train.layers, test.layers, strict=True)
        ]


def smaller(data: Dataset) -> Dataset:
    """Colour images (32, 32, 3) averaged over squares of four pixels, centred and scaled again."""

    def averaged(x: NDArray[Any]) -> Matrix:
        squares = np.asarray(x, np.float64).reshape(len(x), 16, 2, 16, 2, 3)
        return squares.mean(axis=(2, 4)).reshape(len(x), -1)

    x_train, x_test = averaged(data.x_train), averaged(data.x_test)
    mean = x_train.mean()
    return replace(data, x_train=unit_rows(x_train - mean), x_test=unit_rows(x_test - mean))


def weighted(parts: list[Matrix], weights: Sequence[float] | Matrix) -> Matrix:
    """sum_l w_l P_l / sum_l w_l (Karakida & Osawa 2020, Theorem 4.1 with w = Sigma^-1 1)."""
    total: Matrix = np.tensordot(np.asarray(weights), np.stack(parts), 1) / np.sum(weights)
    return total


_REMARK = (
    "The layer-wise structures are comparable on the images as they are. With N > M_0 K-FAC is "
    "isotropic on transformed inputs only, and the Forster transform, not K-FAC, costs accuracy on "
    "these images: exact natural gradient loses as much on the same inputs. The paper does not say "
    "which inputs its other curves have."
)


@check(
    "KO-Fig2-left",
    "Test accuracy on two classes of CIFAR-10, K-FAC with the Forster transform",
    claim=_CLAIM,
    setting=(
        "CIFAR-10, N = 10000 > M_0 = 3072, N' = 2000, C = 1: vehicles and animals of data_batch_1, "
        f"and of data_batch_2 for testing; {_NETWORK}"
    ),
    origin="paper, partly",
    differs="the classes, as 10000 images of airplanes and horses take all five training files",
    kind="depends on solver or setting",
    remark=_REMARK,
    memory=13 * 10**9,
)
def figure_2_left(report: Report) -> Outcome:
    """KO-Fig2, left panel, at the paper's N and M_0."""
    data = images("cifar10", _ALL, _BATCH, 2000, "float64")
    vehicles = np.isin(np.arange(10), (0, 1, 8, 9)) - 0.5
    train, test = (vehicles[labels][:, None] for labels in (data.labels_train, data.labels_test))
    return _left(replace(data, y_train=train, y_test=test), report)


@check(
    "KO-Fig2-left-small",
    "The same with airplanes and horses, on smaller images",
    claim=_CLAIM,
    setting=(
        "CIFAR-10 airplane and horse averaged to 16 x 16 x 3, M_0 = 768: N = 2006 images of "
        f"data_batch_1, and those of data_batch_2 for testing; {_NETWORK}"
    ),
    origin="paper, partly",
    differs="images are smaller, so that N > M_0 with the two files that are used",
    kind="depends on solver or setting",
    remark=_REMARK,
)
def figure_2_left_small(report: Report) -> Outcome:
    """KO-Fig2, left panel, with the paper's classes; weights written out, right and wrong."""
    data = smaller(images("cifar10", (0, 7), _BATCH, 2000, "float64"))
    found = _left(data, report)
    return replace(found, measurements=(*found.measurements, *_written_out(data, report)))


def _left(data: Dataset, report: Report) -> Outcome:
    """Accuracies on images as they are, and with K-FAC on those of the Forster transform."""
    report("Forster transform")
    fitted = forster_transform(data.x_train, data.x_test, tolerance=1e-3)
    assert fitted.x_test is not None
    isotropic = replace(data, x_train=fitted.x_train, x_test=fitted.x_test)
    found = accuracies(data, _LAYER_WISE, report)
    after = accuracies(isotropic, {"exact": Exact(), "kfac": KFAC()}, report)
    outcome = _outcome(data, found, largest_std=0.01, low=0.7, high=0.95)
    exact, kfac = (accuracy.mean for accuracy in after)
    table = outcome.data["accuracy"]
    for name, accuracy in zip(("exact, Forster", "kfac, Forster"), after, strict=True):
        table[name] = {"mean": accuracy.mean, "std": accuracy.std}
    return Outcome(
        (
            *outcome.measurements,
            between("K-FAC after Forster: accuracy below exact", found[0].mean - kfac, 0.05, 0.2),
            between("the same, below exact on the same inputs", exact - kfac, -0.05, 0.02),
        ),
        outcome.data,
        (
            f"the Forster transform took {fitted.iterations} iterations to 1e-3; after it exact "
            f"has {100 * exact:.2f} % and K-FAC {100 * kfac:.2f} %; the bounds on how far K-FAC is "
            "below exact were set after 12.4 and 9.5 points had been seen",
            *outcome.notes,
        ),
    )


def _written_out(data: Dataset, report: Report) -> list[Measurement]:
    """Predictions of every initialisation against weights that are written out, right and wrong."""
    report("predictions written out")
    width = 1024
    model = MLP((data.input_dim, width, width, 1), rngs=nnx.Rngs(0))
    initial = initial_outputs(
        model, np.concatenate([data.x_train, data.x_test]), range(_INITIALISATIONS)
    )
    structure = BlockDiagonal()
    train, test = analytic_signals(structure, model, data.x_train, data.x_test)
    assert test is not None
    targets = np.asarray(data.y_train, np.float64)
    found = predict_from_signals(structure, train, test, targets, initial=initial).samples
    assert found is not None
    parts = layer_parts(train, test, _residuals(targets, initial))
    noise = float(found.std(axis=0, ddof=1).mean())

    def distance(weights: tuple[float, ...]) -> float:
        """Root mean square, in standard deviations over initialisations."""
        predicted = _moved(weighted(parts, weights), targets, initial)
        return float(np.sqrt(np.mean((found - predicted) ** 2))) / noise

    what = "block-diagonal predictions, in standard deviations over initialisations, from "
    return [
        below(f"{what}Eq. 18 written out", distance((1.0, 1.0, 1.0)), 1e-3),
        above(f"{what}control, weights (3, -1, 1)", distance((3.0, -1.0, 1.0)), 0.1),
        above(f"{what}control, layer 1 alone", distance((1.0, 0.0, 0.0)), 0.1),
        above(f"{what}control, layer 3 alone", distance((0.0, 0.0, 1.0)), 0.1),
    ]


@check(
    "KO-Fig2-center",
    "Test accuracy on MNIST",
    claim=_CLAIM,
    setting=f"MNIST, ten classes, N = N' = 10000; {_NETWORK}",
    origin="paper",
    memory=10**10,
)
def figure_2_center(report: Report) -> Outcome:
    """KO-Fig2, center panel."""
    data = images("mnist", _ALL, _BATCH, _BATCH, "float64")
    return _outcome(
        data, accuracies(data, _LAYER_WISE, report), largest_std=0.005, low=0.96, high=0.985
    )


@check(
    "KO-Fig2-right",
    "Test accuracy on CIFAR-10",
    claim=_CLAIM,
    setting=(
        "CIFAR-10, ten classes, N = N' = 10000: data_batch_1 for training and data_batch_2, "
        f"held-out, for testing where test_batch is absent; {_NETWORK}"
    ),
    origin="paper, partly",
    differs=("where test_batch is absent, images of data_batch_2 take its place"),
)
def figure_2_right(report: Report) -> Outcome:
    """KO-Fig2, right panel."""
    data = images("cifar10", _ALL, _BATCH, _BATCH, "float64")
    found = _outcome(
        data, accuracies(data, _LAYER_WISE, report), largest_std=0.005, low=0.42, high=0.55
    )
    table = found.data["accuracy"]
    exact = table["exact"]
    varies = max(
        abs(other["mean"] - exact["mean"])
        / np.hypot(other["std"], exact["std"])
        * _INITIALISATIONS**0.5
        for name, other in table.items()
        if name != "exact"
    )
    row = above("accuracies vary: largest distance from exact in standard errors", varies, 3.0)
    return replace(found, measurements=(*found.measurements, row))


@check(
    "KO-Fig2-kfac",
    "K-FAC with more samples than inputs",
    claim="K-FAC, too, has a test accuracy comparable to the others' (Section 4.4, for C = 1).",
    setting="MNIST, ten classes, N = 4000, N' = 10000, without the Forster transform, which did "
    f"not converge on such images (4 and 9, N = 1500); {_NETWORK}",
    origin="ours",
)
def figure_2_kfac(report: Report) -> Outcome:
    """KO-Fig2 with K-FAC on MNIST."""
    data = images("mnist", _ALL, 4000, _BATCH, "float64")
    structures: dict[str, Structure] = {**_LAYER_WISE, "kfac": KFAC()}
    return _outcome(
        data, accuracies(data, structures, report), largest_std=0.005, low=0.955, high=0.975
    )


def _outcome(
    data: Dataset, found: list[Accuracy], *, largest_std: float, low: float, high: float
) -> Outcome:
    exact = found[0]
    measurements: list[Measurement] = [between("accuracy of exact", exact.mean, low, high)]
    for accuracy in found:
        if accuracy is not exact:
            noise = max(accuracy.std, exact.std)
            measurements.append(
                below(
                    f"accuracy of {accuracy.name}, distance from exact in standard deviations over "
                    "initialisations",
                    abs(accuracy.mean - exact.mean) / noise,
                    _WITHIN,
                )
            )
        measurements.append(
            below(f"accuracy of {accuracy.name}, std over seeds", accuracy.std, largest_std)
        )
    table: dict[str, Any] = {a.name: {"mean": a.mean, "std": a.std} for a in found}
    notes = (
        f"N = {data.num_train}, N' = {data.num_test}, {data.input_dim} inputs; accuracy over 10 "
        "initialisations, mean ± std: "
        + ", ".join(f"{a.name} {100 * a.mean:.2f} ± {100 * a.std:.2f} %" for a in found),
        *data.notes,
    )
    shown = {
        "data": data.name,
        "num_train": data.num_train,
        "num_test": data.num_test,
        "accuracy": table,
    }
    return Outcome(tuple(measurements), shown, notes)
