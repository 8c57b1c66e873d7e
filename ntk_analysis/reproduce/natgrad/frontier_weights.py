"""Kronecker factors that weigh samples: the nearest product to the Fisher matrix, and others."""

from __future__ import annotations

import numpy as np

from natgrad_flax import KFAC, KFOC, Shampoo, Structure
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.natgrad.common import (
    dense_layers,
    dense_net,
    layer_coefficients,
    sphere,
)
from ntk_analysis.reproduce.natgrad.frontier import limit_kernels
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, below, between, check
from ntk_analysis.reproduce.ruler import relative_error

_SAMPLES, _WIDTHS, _ITERATIONS = 24, (64, 1024), 20


@check(
    "NG-Frontier-Weights",
    "Only K-FAC weighs all samples alike: the nearest Kronecker product does not",
    claim="For factors A = sum_n w_n a_n a_n^T / N and B = sum_n v_n D_n D_n^T / N with any "
    "positive weights, one output and ranks N, Theta-bar_l = diag(N / (w_n v_n)), and so a "
    "Kronecker product is isotropic where w_n v_n is constant. K-FAC has w = v = 1, Shampoo with "
    "p = 1 has w = |D_n|^2 and v = |a_n|^2, and KFOC, whose product is the nearest to the Fisher "
    "block in Frobenius norm, the leading eigenvectors of (K o K)(Q o Q) and (Q o Q)(K o K), with "
    "K = D D^T, Q = a a^T and entrywise squares. These are constant only where the rows of the "
    "squared kernels have equal sums. At finite width eigenvectors enlarge what differs between "
    "samples, most in the first layer, whose inputs are nearly orthogonal; more iterations do not "
    "help.",
    setting="two hidden layers of 64 and 1024 units, ReLU, one output, no biases, N = 24 Gaussian "
    "inputs of 64 features and norm 8; hidden layers; 1 and 20 iterations; kernels of infinite "
    "width, of 96 inputs of 4096 features, too; zero damping",
    origin="ours",
    fast=True,
)
def weights(report: Report) -> Outcome:
    """The formula of three structures, and how far KFOC's diagonal spreads."""
    x = sphere(_SAMPLES, 64)
    model = dense_net((64, _WIDTHS[0], _WIDTHS[0], 1), "relu")
    grams = [layer.grams for layer in dense_layers(model, x)[:-1]]
    ones = np.ones(_SAMPLES)
    cases: dict[str, tuple[Structure, list[Matrix]]] = {
        # alone, every layer would count as the last one
        "K-FAC": (KFAC(last_layer="literal"), [ones for _ in grams]),
        "Shampoo, p = 1": (Shampoo(1.0), [np.diag(q) * np.diag(k) for q, k in grams]),
    } | {
        f"KFOC, {number} iterations": (KFOC(number), [nearest(*g, number) for g in grams])
        for number in (1, _ITERATIONS)
    }
    measurements: list[Measurement] = []
    for name, (structure, products) in cases.items():
        report(name)
        found = layer_coefficients(structure, model, x)[:-1]
        error = max(
            relative_error(matrix, np.diag(_SAMPLES / product))
            for matrix, product in zip(found, products, strict=True)
        )
        measurements.append(below(f"{name}: formula against the structure", error, 1e-8))
    spreads = {}
    for width in _WIDTHS:
        report(f"spread at width {width}")
        layers = dense_layers(dense_net((64, width, width, 1), "relu"), x)[:-1]
        spreads[width] = [_spread(nearest(*layer.grams, _ITERATIONS)) for layer in layers]
    wide = spreads[_WIDTHS[1]]
    report("infinite width")
    once, converged = (
        [_spread(nearest(*pair, number)) for pair in limit_kernels(x)[:-1]]
        for number in (1, _ITERATIONS)
    )
    many = [_spread(nearest(*g, _ITERATIONS)) for g in limit_kernels(sphere(96, 4096))[:-1]]
    measurements += [
        between("KFOC, M = 64: largest over smallest, worse layer", max(spreads[64]), 10.0, 1e3),
        between("KFOC, M = 1024: largest over smallest, layer 1", wide[0], 2.0, 20.0),
        below("KFOC, M = 1024: layer 2 over layer 1", wide[1] / wide[0], 1.0),
        between("KFOC, infinite width: largest over smallest, layer 1", converged[0], 1.2, 3.0),
        below("KFOC, infinite width: 1 over 20 iterations, layer 1", once[0] / converged[0], 1.0),
        below("KFOC, infinite width, 96 inputs nearly orthogonal: worse layer", max(many), 1.1),
    ]
    return Outcome(tuple(measurements))


def nearest(inputs: Matrix, derivatives: Matrix, iterations: int) -> Matrix:
    """w_n v_n of the power iteration of ``KFOC``, shape (N,).

    Args:
      inputs: a a^T, shape (N, N).
      derivatives: D D^T, shape (N, N).
      iterations: of the power iteration, from B = I on.
    """
    of_inputs, of_units = inputs**2, derivatives**2
    w, v, n = np.diag(derivatives), np.diag(inputs), len(inputs)
    for _ in range(iterations):
        v = n * of_inputs @ w / (w @ of_inputs @ w)
        w = n * of_units @ v / (v @ of_units @ v)
    return w * v


def _spread(values: Matrix) -> float:
    return float(values.max() / values.min())
