"""Equations 20 and 21 of Karakida & Osawa (2020): K-FAC, its last layer and few inputs."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from natgrad_datasets import forster_transform

from natgrad_flax import KFAC
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.karakida_osawa.common import (
    Dense,
    dense,
    off_identity,
    problem,
    theta_bar,
    unit_rows,
)
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, above, below, check, close
from ntk_analysis.reproduce.ruler import max_abs_error, pseudo_inverse

_DRAWS = 40


@check(
    "KO-Eq20",
    "K-FAC is isotropic",
    claim="With B* and A* as in Eq. 20, Theta-bar = sum_l (B B^-1) . (A A^-1) N (Eq. 21), so "
    "alpha = N L and eta = 1/(N L) converges in one step.",
    setting="tanh 6-12-13-C, N = 4, C = 1 and 2, with and without biases; ReLU 12-16-16-2, N = 5",
    origin="ours",
    kind="misprint",
    remark=(
        "In the main text B* of the last layer is 1 and not 1/N, so that Eq. 20 gives alpha = N "
        "(L - 1) + 1; Eq. 21 and alpha = N L need B* / N there. At 1/(N L) the printed Eq. 20 "
        "leaves the fraction (N - 1)/(N L) of the residual after a step. The supplement (B.3) was"
        " not at hand."
    ),
    fast=True,
)
def eq_20(report: Report) -> Outcome:
    """Both last layers against explicit Kronecker products, and widths that are too small."""
    n, measurements = 4, list[Measurement]()
    for outputs, bias in ((1, 0.0), (1, 0.3), (2, 0.3)):
        name = f"C = {outputs}{', biases' if bias else ''}"
        report(name)
        case = problem((6, 12, 13, outputs), n, bias_variance=bias)
        for last, alpha in (("scaled", 3.0 * n), ("literal", 2.0 * n + 1)):
            explicit = theta_bar(case.train.kronecker(last), case.train)
            found = case.ours(KFAC("scaled" if last == "scaled" else "literal"))[0]
            measurements += [
                below(
                    f"{name}, {last} last layer: explicit Theta-bar - {alpha:g} I",
                    off_identity(explicit, alpha),
                    1e-8,
                ),
                below(
                    f"{name}, {last} last layer: KFAC - {alpha:g} I",
                    off_identity(found, alpha),
                    1e-8,
                ),
            ]
            if (outputs, bias, last) == (1, 0.0, "literal"):
                left = np.linalg.norm(case.residual - explicit @ case.residual / (3 * n))
                measurements.append(
                    close(
                        "literal at 1/(N L): |f_1 - y| / |f_0 - y|, against (N - 1)/(N L)",
                        float(left / np.linalg.norm(case.residual)),
                        (n - 1) / (3 * n),
                        1e-8,
                    )
                )
    report("narrow ReLU networks")
    off: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(_DRAWS):
        narrow = problem((12, 16, 16, 2), 5, activation="relu", seed=seed).train
        ranks = [np.linalg.matrix_rank(_rows(d)) for d in narrow.derivatives[:-1]]
        off[min(ranks) == 10].append(off_identity(_closed_form(narrow), 15.0))
    ours = problem((12, 16, 16, 2), 5, activation="relu", seed=2)
    measurements += [
        above(
            f"M = 16, N C = 10: rank D_l < N C in this many of {_DRAWS} draws", len(off[False]), 1
        ),
        above("these: smallest deviation of Theta-bar from N L I", min(off[False]), 0.1),
        below("the other draws: largest deviation", max(off[True]), 1e-6),
        above(
            "one of these (seed 2), KFAC: deviation", off_identity(ours.ours(KFAC())[0], 15.0), 0.1
        ),
    ]
    return Outcome(
        tuple(measurements),
        notes=(
            "with several outputs hidden layers still give N I once M_l >= N C, so alpha is the "
            "same; a ReLU layer as narrow as 16 is isotropic in most draws, but not in those where "
            "too few units tell the samples apart (rank D_l < N C)",
        ),
    )


def _rows(derivatives: Matrix) -> Matrix:
    flat: Matrix = derivatives.reshape(-1, derivatives.shape[2])
    return flat


def _closed_form(case: Dense) -> Matrix:
    """N sum_l (D D^+) . (a a^+), the last layer scaled (Eq. 21)."""
    total = np.zeros((case.outputs.size, case.outputs.size))
    c = case.outputs.shape[1]
    for a, d in zip(case.inputs, case.derivatives, strict=True):
        right = a @ pseudo_inverse(a)
        flat = _rows(d)
        # the last layer has D = I_C a sample: D D^+ = 1/N, which its B* / N makes 1
        last = a is case.inputs[-1]
        left = flat @ pseudo_inverse(flat) * (case.num_samples if last else 1)
        total += left * np.kron(right, np.ones((c, c)))
    return case.num_samples * total


@check(
    "KO-KFAC-lowdim",
    "K-FAC with fewer inputs than samples",
    claim="With M_0 < N the first layer is not isotropic: Theta-bar_1 = N diag(X (X^T X)^-1 X^T).",
    setting="tanh 4-14-15-1, N = 9, no biases, last layer scaled",
    origin="ours",
    fast=True,
)
def low_dimension(report: Report) -> Outcome:
    """The hat matrix's diagonal in place of 1 in the first layer."""
    case = problem((4, 14, 15, 1), 9)
    hat = case.x @ np.linalg.inv(case.x.T @ case.x) @ case.x.T
    expected = 2 * np.eye(9) + np.diag(np.diag(hat))
    report("explicit inverse")
    explicit = theta_bar(case.train.kronecker("scaled"), case.train)
    found = case.ours(KFAC())[0]
    return Outcome(
        (
            below(
                "explicit Theta-bar / N against (L - 1) I + I . X (X^T X)^-1 X^T",
                max_abs_error(explicit / 9, expected),
                1e-8,
            ),
            below("KFAC against the same", max_abs_error(found / 9, expected), 1e-8),
            above("spread of its diagonal", float(np.ptp(np.diag(found / 9))), 0.05),
        )
    )


@check(
    "KO-Forster",
    "K-FAC after a Forster transform",
    claim=(
        "The Forster transformation makes X^T X proportional to I where there are fewer inputs "
        "than samples, and the isotropic condition holds, in deep networks too (after Eq. 21)."
    ),
    setting="20 Gaussian points in 6 dimensions (in 9, of rank 6), tanh 6-24-25-1; 4 test points",
    origin="ours",
    kind="misread by us",
    remark=(
        "An earlier version of this page had the paper say that alpha is N L again. The paper "
        "says that the isotropic condition holds, and so it does: Eq. 21 then gives N (L - 1) + "
        "M_0, as measured. Where alpha = N L is wanted, the first layer's update takes a factor N"
        " / M_0."
    ),
    fast=True,
)
def forster(report: Report) -> Outcome:
    """The transform itself, alpha with both first layers, and the map for test points."""
    n, m = 20, 6
    rng = np.random.default_rng(0)
    x, x_test = rng.normal(size=(n, m)), rng.normal(size=(4, m))
    fitted = forster_transform(x, x_test)
    z = fitted.x_train
    measurements = [
        below("Z^T Z - (N / M_0) I", max_abs_error(z.T @ z, n / m * np.eye(m)), 1e-8),
        below("iterations to 1e-10", fitted.iterations, 100),
        below(
            "test points: one map against all steps",
            _stepwise(x, x_test, fitted.iterations, fitted.x_test),
            1e-8,
        ),
    ]
    case = problem((m, 24, 25, 1), n, x=z)
    for first, alpha in (("literal", 2.0 * n + m), ("scaled", 3.0 * n)):
        report(f"{first} first layer")
        explicit = theta_bar(case.train.kronecker("scaled", first), case.train)
        structure = KFAC(first_layer="scaled" if first == "scaled" else "literal")
        measurements += [
            below(
                f"{first} first layer: explicit Theta-bar - {alpha:g} I",
                off_identity(explicit, alpha),
                1e-6,
            ),
            below(
                f"{first} first layer: KFAC - {alpha:g} I",
                off_identity(case.ours(structure)[0], alpha),
                1e-6,
            ),
        ]
    report("points of low rank")
    plane = forster_transform(x @ rng.normal(size=(m, 9)))
    flat = problem((plane.rank, 24, 25, 1), n, x=plane.x_train)
    measurements += [
        close("rank of 20 points in 9 dimensions that span 6", plane.rank, 6, 0),
        below(
            "these: KFAC - (N (L - 1) + r) I", off_identity(flat.ours(KFAC())[0], 2.0 * n + 6), 1e-6
        ),
    ]
    before = dense(case.model, unit_rows(x))
    measurements.append(
        above(
            "without the transform: Theta-bar - (N (L - 1) + M_0) I",
            off_identity(_closed_form(before), 2.0 * n + m),
            0.1,
        )
    )
    return Outcome(tuple(measurements))


def _stepwise(x: Matrix, x_test: Matrix, iterations: int, found: Matrix | None) -> float:
    """The largest difference to the steps Z <- Z (Z^T Z)^{-1/2} with normalised rows."""
    z, w = unit_rows(x), unit_rows(x_test)
    # the whitening that comes first is a step of its own
    for _ in range(iterations + 1):
        root = np.linalg.inv(scipy.linalg.sqrtm(z.T @ z).real)
        z, w = unit_rows(z @ root), unit_rows(w @ root)
    # the transform is unique up to a rotation, so inner products are compared
    assert found is not None
    return max_abs_error(found @ found.T, w @ w.T)
