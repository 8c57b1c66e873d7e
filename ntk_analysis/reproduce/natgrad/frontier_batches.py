"""Isotropy in expectation over mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from natgrad_flax import KFAC, Exact, Foof, Structure
from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.natgrad.common import dense_layers, dense_net, sphere
from ntk_analysis.reproduce.natgrad.frontier import limit_kernels
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
)
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

Pairs = Sequence[tuple[Matrix, Matrix]]
"""a a^T and D D^T, or Q_l and B_l, of every layer, all (N, N); the last one's D is 1."""
Batch = NDArray[np.int64]
"""The numbers of n samples."""
Step = Callable[[Pairs, Batch], Matrix]

_SAMPLES, _FEATURES, _EPOCHS = 96, 4096, 40
SIZES = (4, 8, 16, 32)


@check(
    "NG-Frontier-Batches",
    "In expectation over batches K-FAC keeps what the exact Fisher loses",
    claim="A batch of n out of N samples moves the others, too: for the exact Fisher by the "
    "weights of kernel regression on the batch, for a layer of K-FAC by n times the product, entry "
    "by entry, of those of Q_l and of B_l, for FOOF by those of Q_l times B_l. Where all samples "
    "correlate alike, a weight is c / (1 - c + c n), and the mean step over batches is a multiple "
    "of I plus one of 1 1^T. Its condition number tends to N/n for the exact Fisher, for a layer "
    "to 1 + (N - n)/n^2 for K-FAC, since products of weights are small, and to 1 + b (N - n)/n "
    "for FOOF, b = B(x, x') / B(x, x). So K-FAC is nearly isotropic in expectation from some "
    "sqrt(N) samples on; the exact Fisher and FOOF overfit their batch. With factors of all "
    "samples, of which moving averages are an estimate, the mean step is that of the full batch.",
    setting="kernels of infinite width of two ReLU hidden layers, one output, 96 Gaussian inputs "
    "of 4096 features; batches of 4 to 32, 40 epochs without repetition, factors of the batch; a "
    "network of width 64 on 8 and 16 other inputs of 64 features for the formulas; zero damping",
    origin="ours",
    fast=True,
)
def batches(report: Report) -> Outcome:
    """The formulas, and condition numbers of mean steps beside those of equal correlations."""
    report("formulas")
    measurements = _formulas()
    kernels = limit_kernels(sphere(_SAMPLES, _FEATURES))
    second = kernels[1:2]
    (pair,) = second
    correlations = [_correlation(kernel) for kernel in (_tangent(kernels), *pair)]
    laws: dict[str, tuple[Step, Pairs, Callable[[int], float]]] = {
        "exact": (exact_step, kernels, lambda n: _weight(correlations[0], n)),
        "A alone, layer 2": (
            foof_step, second, lambda n: _weight(correlations[1], n) * correlations[2]
        ),
        "K-FAC, layer 2": (
            kfac_step, second, lambda n: _weight(correlations[1], n) * _weight(correlations[2], n)
        ),
    }  # fmt: skip
    for name, (step, pairs, law) in laws.items():
        report(name)
        ratios = [
            float(np.linalg.cond(mean_step(step, pairs, n))) / _condition(law(n), n) for n in SIZES
        ]
        measurements += [
            above(f"{name}: smallest ratio to equal correlations", min(ratios), 0.85),
            below(f"{name}: largest ratio to equal correlations", max(ratios), 1.25),
        ]
    whole: dict[str, list[float]] = {}
    for name, step in (("Exact", exact_step), ("Foof", foof_step), ("KFAC", kfac_step)):
        report(f"{name}, all layers")
        whole[name] = [float(np.linalg.cond(mean_step(step, kernels, n))) for n in SIZES]
    measurements += [
        between("exact, n = 32: condition number", whole["Exact"][-1], 2.5, 3.5),
        between("A alone, n = 32: condition number", whole["Foof"][-1], 1.8, 2.8),
        between("K-FAC, n = 32: condition number", whole["KFAC"][-1], 1.0, 1.15),
        above("exact over K-FAC, n = 8", whole["Exact"][1] / whole["KFAC"][1], 3.0),
    ]
    data = {"samples": _SAMPLES, "sizes": list(SIZES), "conditions": whole}
    return Outcome(tuple(measurements), data)


def _formulas() -> list[Measurement]:
    """Steps of a batch of 8 on itself and on 16 others, against the structures."""
    x = sphere(24, 64)
    model = dense_net((64, 64, 64, 1), "relu")
    pairs = [layer.grams for layer in dense_layers(model, x)]
    batch = np.arange(8)
    cases: dict[str, tuple[Structure, Step]] = {
        "exact": (Exact(), exact_step),
        "A alone": (Foof("inputs"), foof_step),
        "K-FAC": (KFAC(last_layer="literal"), kfac_step),
    }
    return [
        below(
            f"{name}: formula against the structure",
            relative_error(step(pairs, batch), coefficient_matrix(structure, model, x[:8], x)),
            1e-8,
        )
        for name, (structure, step) in cases.items()
    ]


def regression(kernel: Matrix, batch: Batch) -> Matrix:
    """k(x, S) k(S, S)^+ of all N samples, shape (N, n); D of the last layer has rank 1."""
    inside = kernel[np.ix_(batch, batch)]
    result: Matrix = kernel[:, batch] @ pseudo_inverse(inside, symmetric=True)
    return result


def _tangent(pairs: Pairs) -> Matrix:
    return sum((q * b for q, b in pairs), start=np.zeros_like(pairs[0][0]))


def exact_step(pairs: Pairs, batch: Batch) -> Matrix:
    """Theta-bar(x, S) of the exact Fisher of a batch."""
    return regression(_tangent(pairs), batch)


def kfac_step(pairs: Pairs, batch: Batch) -> Matrix:
    """That of K-FAC."""
    steps = [len(batch) * regression(q, batch) * regression(b, batch) for q, b in pairs]
    return sum(steps, start=np.zeros_like(steps[0]))


def foof_step(pairs: Pairs, batch: Batch) -> Matrix:
    """That of A^-1 alone."""
    steps = [regression(q, batch) * b[:, batch] for q, b in pairs]
    return sum(steps, start=np.zeros_like(steps[0]))


def mean_step(step: Step, pairs: Pairs, size: int) -> Matrix:
    """The mean over batches of the map from residuals to steps, shape (N, N).

    Args:
      step: from kernels and a batch to Theta-bar(x, S).
      pairs: kernels.
      size: n, a divisor of N.
    """
    rng, total = np.random.default_rng(0), np.zeros((_SAMPLES, _SAMPLES))
    for _ in range(_EPOCHS):
        for batch in rng.permutation(_SAMPLES).reshape(-1, size):
            total[:, batch] += step(pairs, batch)
    return total / (_EPOCHS * (_SAMPLES // size))


def _correlation(kernel: Matrix) -> float:
    """The mean of an entry beside the diagonal over one on it."""
    others = len(kernel) - 1
    return float((np.sum(kernel) / np.trace(kernel) - 1) / others)


def _weight(correlation: float, size: int) -> float:
    """Of every sample of a batch in the regression of another one."""
    return correlation / (1 - correlation + correlation * size)


def _condition(off: float, size: int) -> float:
    """Of the mean step where a sample of the batch moves itself by 1 and others by ``off``."""
    own = size / _SAMPLES
    other = own * (_SAMPLES - size) / (_SAMPLES - 1) * off
    return 1 + _SAMPLES * other / (own - other)
