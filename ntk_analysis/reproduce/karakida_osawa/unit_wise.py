"""Theorem 5.1 of Karakida & Osawa (2020): the unit-wise Fisher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from natgrad_flax import Exact, UnitWise
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.coefficient import coefficient_pair
from ntk_analysis.cost import structure_cost
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.karakida_osawa.common import (
    Dense,
    Problem,
    off_identity,
    problem,
    theta_bar,
)
from ntk_analysis.reproduce.karakida_osawa.unit_wise_damping import conditions
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
    close,
)
from ntk_analysis.reproduce.ruler import max_abs_error


@check(
    "KO-Thm5.1",
    "Unit-wise Fisher is isotropic",
    claim=(
        "Under gradient independence and in the limit of zero damping, rho = 1/M^eps with "
        "0 < eps < 1/12, training follows Eq. 24, f_t = (1 - (1 - alpha eta)^t)(y - f_0) + f_0 "
        "with alpha = gamma M (L - 1), asymptotically in the width; gamma is 1 for tanh, 1/2 for "
        "ReLU."
    ),
    setting="8-20-21-C, N = 5, tanh and ReLU, C = 1 and 3; ReLU 40-2048-2048-1, N = 20; all at "
    "rho = 0. tanh 40-M-M-1, N = 30, M = 64 and 256, at the theorem's largest damping, eps = 1/12, "
    "and at rho = 1/M^2",
    origin="ours",
    kind="too general",
    remark="At zero damping, which the theorem speaks of, Theta-bar is isotropic. The rate at "
    "which it lets the damping vanish is too general, or in another normalisation: the supplement "
    "was not readable. With Eqs. 1, 2 and 23 as printed Theta-bar is sum_i B_i (B_i "
    "+ rho I)^-1, where B_i = diag(delta_i) H H^T diag(delta_i) / N belongs to unit i; its trace "
    "is of the order 1/M, as delta_i^2 is. Where rho = o(1/M) every term is the projector that "
    "makes Theta-bar diagonal; where M rho grows, the sum is that of B_i / rho, which is Theta / "
    "rho. rho = 1/M^eps with eps < 1/12 is the second case. Relative to the diagonal of "
    "the blocks the same factor is of their order and changes the condition number slowly "
    "(KO-Thm5.1-training).",
    fast=True,
)
def theorem_5_1(report: Report) -> Outcome:
    """Active units of every sample on the diagonal, nothing off it, at any width."""
    measurements: list[Measurement] = []
    for activation in ("tanh", "relu"):
        report(activation)
        case = problem((8, 20, 21, 1), 5, activation=activation)
        explicit = theta_bar(case.train.unit_wise(), case.train)
        found = case.ours(UnitWise())[0]
        counts = _active(case.train) + 1
        measurements += [
            below(
                f"{activation}: explicit Theta-bar off the diagonal",
                max_abs_error(explicit, np.diag(np.diag(explicit))),
                1e-8,
            ),
            below(
                f"{activation}: its diagonal against 1 + number of active units",
                max_abs_error(np.diag(explicit), counts),
                1e-8,
            ),
            below(
                f"{activation}: UnitWise against the explicit one",
                max_abs_error(found, explicit),
                1e-8,
            ),
        ]
        if activation == "tanh":
            measurements.append(
                below("tanh: Theta-bar - (M_1 + M_2 + 1) I", off_identity(found, 42.0), 1e-8)
            )
    report("three outputs")
    several = problem((8, 20, 21, 3), 5)
    blocks, matrix = _projectors(several.train), several.ours(UnitWise())[0]
    measurements += [
        below(
            "tanh, C = 3: UnitWise against sum_i blockdiag_n d d^T / |d|^2 + I",
            max_abs_error(matrix, blocks),
            1e-8,
        ),
        close(
            "tanh, C = 3: mean eigenvalue, against sum_l M_l / C + 1",
            float(np.trace(matrix)) / 15,
            41 / 3 + 1,
            1e-8,
        ),
    ]
    report("width 2048")
    wide = problem((40, 2048, 2048, 1), 20, activation="relu")
    alphas = _active(wide.train) + 1
    measurements += [
        between(
            "ReLU, M = 2048: mean of Theta-bar over M (L - 1) / 2 + 1",
            float(alphas.mean() / 2049),
            0.97,
            1.03,
        ),
        below(
            "ReLU, M = 2048: standard deviation over mean (1/sqrt(M (L - 1)) = 0.016)",
            float(alphas.std() / alphas.mean()),
            0.05,
        ),
    ]
    return Outcome(
        (*measurements, *_damped(report)),
        notes=(
            "at zero damping the matrix is exactly diagonal at finite width and no gradient "
            "independence is needed; only the counts on the ReLU diagonal need width",
        ),
    )


def _damped(report: Report) -> list[Measurement]:
    """Condition numbers at the theorem's damping, and at one that falls faster than the blocks."""
    over, faster, blocks = [], [], []
    for width in (64, 256):
        report(f"damped, width {width}")
        case = problem((40, width, width, 1), 30)
        kernel, own, small = conditions(case, ("M^(-1/12)", "1/M^2"))
        over.append(own / kernel)
        faster.append(small)
        inputs, slopes = case.train.inputs[1], case.train.derivatives[1][:, 0]
        sizes = np.einsum("nk,ni->i", inputs**2, slopes**2) / 30
        blocks.append(width * float(sizes.mean()))
    return [
        between(
            "rho = M^(-1/12): condition number over that of the tangent kernel, smallest",
            min(over),
            0.95,
            1.05,
        ),
        below(
            "rho = 1/M^2: condition number at M = 256 over that at M = 64",
            faster[1] / faster[0],
            0.6,
        ),
        between(
            "M times the mean trace of a unit's block, M = 256 over 64",
            blocks[1] / blocks[0],
            0.7,
            1.4,
        ),
    ]


def _active(case: Dense) -> Matrix:
    """Hidden units with D != 0, for each sample of a network with one output."""
    counts = [np.count_nonzero(d[:, 0], axis=1) for d in case.derivatives[:-1]]
    total: Matrix = np.sum(counts, axis=0).astype(np.float64)
    return total


def _projectors(case: Dense) -> Matrix:
    """sum over hidden units of blockdiag_n(d d^T / |d|^2), plus I for the last layer."""
    n, c = case.outputs.shape
    total = np.eye(n * c)
    for d in case.derivatives[:-1]:
        blocks = np.einsum("nci,ndi,ni->ncd", d, d, 1 / np.sum(d**2, axis=1))
        for index in range(n):
            rows = slice(index * c, (index + 1) * c)
            total[rows, rows] += blocks[index]
    return total


@check(
    "KO-Unit-lowdim",
    "Unit-wise Fisher with fewer inputs than samples",
    claim="With M_0 < N the first layer is not isotropic; leaving it untrained restores isotropy "
    "with alpha = gamma M (L - 2) + 1.",
    setting="ReLU and tanh 6-400-400-1, N = 30, no biases",
    origin="ours",
    fast=True,
)
def low_dimension(report: Report) -> Outcome:
    """Layer by layer, against the projectors of every unit."""
    case = problem((6, 400, 400, 1), 30, activation="relu")
    report("first layer")
    first = _coefficient(case, slice(1))
    values = np.linalg.eigvalsh(first)
    report("upper layers")
    upper = _coefficient(case, slice(1, 3))
    counts = np.count_nonzero(case.train.derivatives[1][:, 0], axis=1) + 1
    tanh = problem((6, 400, 400, 1), 30)
    return Outcome(
        (
            below(
                "layer 1 against the projectors of its units",
                max_abs_error(first, _unit_projectors(case.train)),
                1e-7,
            ),
            close("layer 1: trace / N, against M M_0 / N", float(np.trace(first)) / 30, 80.0, 1e-6),
            above(
                "layer 1: largest eigenvalue over the smallest", float(values[-1] / values[0]), 3.0
            ),
            below(
                "layers 2 and 3: Theta-bar off its diagonal",
                max_abs_error(upper, np.diag(np.diag(upper))),
                1e-6,
            ),
            below(
                "layers 2 and 3: diagonal against 1 + number of active units",
                max_abs_error(np.diag(upper), counts),
                1e-6,
            ),
            between(
                "layers 2 and 3: mean of the diagonal over M / 2 + 1",
                float(counts.mean() / 201),
                0.9,
                1.1,
            ),
            below(
                "tanh, layers 2 and 3: Theta-bar - (M + 1) I",
                off_identity(_coefficient(tanh, slice(1, 3)), 401.0),
                1e-4,
            ),
        ),
        data={"first_layer_eigenvalues": values, "upper_diagonal": np.diag(upper)},
    )


def _coefficient(case: Problem, layers: slice) -> Matrix:
    """Theta-bar of some of the layers, ours."""
    everything = case.signals.everything
    chosen = replace(everything, layers=everything.layers[layers])
    return coefficient_pair(UnitWise(), replace(case.signals, everything=chosen))[0]


def _unit_projectors(case: Dense) -> Matrix:
    """sum_i J_i (J_i^T J_i)^+ J_i^T over the units of the first layer."""
    a, d = case.inputs[0], case.derivatives[0][:, 0]
    total = np.zeros((len(a), len(a)))
    for column in d.T:
        jac = column[:, None] * a
        left, singular, _ = np.linalg.svd(jac, full_matrices=False)
        kept = left[:, singular > 1e-10 * max(singular[0], 1e-300)]
        total += kept @ kept.T
    return total


@check(
    "KO-NZ",
    "Size of the unit-wise Fisher",
    claim="The unit-wise Fisher has 1/(M (L - 1)) of the entries of the exact one.",
    setting="tanh M-M-M-1 with M = 20 and 40, L = 3, N = 6; non-zeros of dense matrices",
    origin="ours",
    fast=True,
)
def size(report: Report) -> Outcome:
    """Entries that are not zero, counted."""
    measurements: list[Measurement] = []
    for width in (20, 40):
        report(f"M = {width}")
        case = problem((width, width, width, 1), 6)
        geometry = model_geometry(case.model, 6)
        exact = np.count_nonzero(case.train.fisher())
        unit = np.count_nonzero(case.train.unit_wise())
        measurements += [
            between(
                f"M = {width}: share of the entries times M (L - 1)",
                unit / exact * 2 * width,
                0.9,
                1.1,
            ),
            close(
                f"M = {width}: unit-wise non-zeros, counted over structure_cost",
                unit / structure_cost(UnitWise(), geometry).nonzeros,
                1.0,
                0.0,
            ),
            close(
                f"M = {width}: exact non-zeros, counted over structure_cost",
                exact / structure_cost(Exact(), geometry).nonzeros,
                1.0,
                0.0,
            ),
        ]
    return Outcome(tuple(measurements))
