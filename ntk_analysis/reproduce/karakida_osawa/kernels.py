"""Supplement E of Karakida & Osawa (2020): kernels at infinite width, written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ntk_analysis.analytic import AnalyticKernels, analytic_kernels
from ntk_analysis.empirical import Matrix, empirical_layer_kernels
from ntk_analysis.infinite_width import infinite_width_limit
from ntk_analysis.reproduce.karakida_osawa.common import problem, unit_rows
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, below, check
from ntk_analysis.reproduce.ruler import max_abs_error, relative_error

Expectations = Callable[[Matrix, Matrix, Matrix], tuple[Matrix, Matrix]]
"""E[phi(u) phi(v)] and E[phi'(u) phi'(v)] from the covariance and both variances of u and v."""


@dataclass(frozen=True)
class ReferenceKernels:
    """Kernels of an infinitely wide network for one output, L arrays (N1, N2) each, without 1/N.

    Attributes:
      inputs: Q_l = sigma_w^2 A_{l-1} + sigma_b^2.
      derivatives: B_l, the last one is 1.
    """

    inputs: tuple[Matrix, ...]
    derivatives: tuple[Matrix, ...]

    @property
    def tangent(self) -> tuple[Matrix, ...]:
        """Theta_l = B_l Q_l, entry by entry."""
        return tuple(q * b for q, b in zip(self.inputs, self.derivatives, strict=True))


def relu_expectations(covariance: Matrix, first: Matrix, second: Matrix) -> tuple[Matrix, Matrix]:
    """The arc-cosine kernels of degree 1 and 0 (science: 3.7)."""
    scale = np.sqrt(first * second)
    cosine = np.clip(covariance / scale, -1, 1)
    angle = np.arccos(cosine)
    value = scale * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
    return value, (np.pi - angle) / (2 * np.pi)


def erf_expectations(covariance: Matrix, first: Matrix, second: Matrix) -> tuple[Matrix, Matrix]:
    """The closed form for erf (science: 3.7)."""
    product = (1 + 2 * first) * (1 + 2 * second)
    value = 2 / np.pi * np.arcsin(2 * covariance / np.sqrt(product))
    return value, 4 / np.pi / np.sqrt(product - 4 * covariance**2)


def reference_kernels(
    x1: Matrix,
    x2: Matrix | None,
    variances: Sequence[tuple[float, float]],
    expectations: Expectations,
) -> ReferenceKernels:
    """The recursion of Supplement E at any depth, for inputs of any norm (science: 3.7).

    Args:
      x1: inputs, shape (N1, M_0).
      x2: inputs, shape (N2, M_0); x1 by default, and then a covariance on the diagonal is exactly
        the variance.
      variances: (sigma_w^2, sigma_b^2) of each layer.
      expectations: of the activation.
    """
    columns = x1 if x2 is None else x2
    value = x1 @ columns.T / x1.shape[1]
    squares = [np.mean(rows**2, axis=1) for rows in (x1, columns)]
    inputs: list[Matrix] = []
    slopes: list[Matrix] = []
    for layer, (weight, bias) in enumerate(variances):
        covariance = weight * value + bias
        first, second = (weight * square + bias for square in squares)
        if x2 is None:
            np.fill_diagonal(covariance, first)
        inputs.append(covariance)
        if layer < len(variances) - 1:
            value, slope = expectations(covariance, first[:, None], second[None, :])
            squares = [expectations(rows, rows, rows)[0] for rows in (first, second)]
            slopes.append(slope)
    derivatives = [np.ones_like(value)]
    for slope, (weight, _) in zip(reversed(slopes), reversed(variances[1:]), strict=True):
        derivatives.insert(0, weight * slope * derivatives[0])
    return ReferenceKernels(tuple(inputs), tuple(derivatives))


@check(
    "KO-SecE",
    "Analytic layer kernels",
    claim="At infinite width Theta_l = B_l Q_l entry by entry, where Q_l and B_l follow from layer "
    "to layer: the arc-cosine kernels for ReLU, arcsin for erf (Supplement E).",
    setting="ReLU with L = 3, and with L = 6, biases and inputs of any norm; erf with L = 4 and "
    "biases; 12 inputs of dimension 8, and 5 others; against formulas in NumPy and against the NTK "
    "of neural-tangents",
    origin="ours",
    fast=True,
)
def sec_e(report: Report) -> Outcome:
    """Every kernel of every layer against NumPy, and their sum against neural-tangents."""
    rng = np.random.default_rng(0)
    free = rng.normal(size=(17, 8))
    measurements: list[Measurement] = []
    for activation, expectations, depth, bias, inputs in (
        ("relu", relu_expectations, 3, 0.0, unit_rows(free)),
        ("relu", relu_expectations, 6, 0.3, free),
        ("erf", erf_expectations, 4, 0.3, unit_rows(free)),
    ):
        name = f"{activation}, L = {depth}{', biases, any norm' if inputs is free else ''}"
        report(name)
        x, x_test = inputs[:12], inputs[12:]
        widths = (8, *[2] * (depth - 1), 1)
        model = problem(widths, 1, activation=activation, bias_variance=bias).model
        variances = [(2.0, bias)] * depth
        inside, outside = analytic_kernels(model, x), analytic_kernels(model, x_test, x)
        worst = max(
            _worst(inside, reference_kernels(x, None, variances, expectations)),
            _worst(outside, reference_kernels(x_test, x, variances, expectations)),
        )
        network = infinite_width_limit(model).network[2]
        with jax.enable_x64(True):
            theirs = network(x_test, x, ("nngp", "ntk"))
            ntk, nngp = np.asarray(theirs.ntk), np.asarray(theirs.nngp)
        apart = max(max_abs_error(outside.ntk, ntk), max_abs_error(outside.nngp, nngp))
        measurements += [
            below(f"{name}: Q_l, B_l and Theta_l against NumPy", worst, 1e-10),
            below(f"{name}: NTK and NNGP against neural-tangents", apart, 1e-10),
        ]
    return Outcome(tuple(measurements))


def _worst(ours: AnalyticKernels, reference: ReferenceKernels) -> float:
    """The largest relative distance of a kernel, the whole NTK among them."""
    pairs = [
        *zip(ours.inputs, reference.inputs, strict=True),
        *zip(ours.derivatives, reference.derivatives, strict=True),
        *zip(ours.tangent, reference.tangent, strict=True),
        (ours.ntk, sum(reference.tangent)),
    ]
    return max(max_abs_error(one, other) for one, other in pairs)


@check(
    "KO-SecE-MC",
    "Wide networks have the analytic kernels",
    claim="The kernels of a random network tend to the analytic ones as its width grows.",
    setting="ReLU 8-8192-2048-1, mean over 3 seeds, 6 inputs of norm 1",
    origin="ours",
)
def sec_e_monte_carlo(report: Report) -> Outcome:
    """The mean kernel of three wide networks, whole and layer by layer."""
    x = unit_rows(np.random.default_rng(0).normal(size=(6, 8)))
    widths, seeds = (8, 8192, 2048, 1), 3
    found = np.zeros((3, 6, 6))
    for seed in range(seeds):
        report(f"network {seed + 1} of {seeds}")
        model = problem(widths, 1, activation="relu", seed=seed, x=x).model
        found += np.stack(empirical_layer_kernels(model, x)) / seeds
    true = np.stack(analytic_kernels(model, x, parts=("tangent",)).tangent)
    whole = max_abs_error(found.sum(0), true.sum(0)) / float(np.max(true.sum(0)))
    return Outcome(
        (
            below("NTK: largest error over the largest entry", whole, 0.06),
            *(
                below(f"Theta_{layer}: relative error in norm", relative_error(one, limit), 0.06)
                for layer, (one, limit) in enumerate(zip(found, true, strict=True), 1)
            ),
        ),
        notes=(
            "The 6 % are read as the error over the largest entry of the NTK. Entry by entry the "
            "relative error is larger and depends on the seeds: the diagonal of Q_3 alone scatters "
            "by sqrt(5/2048) = 5 % from network to network.",
        ),
    )
