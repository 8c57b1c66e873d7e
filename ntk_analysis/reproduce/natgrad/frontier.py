"""One Kronecker factor alone, and roots of both: how far from isotropic, and why."""

from __future__ import annotations

import numpy as np

from natgrad_flax import KFAC, MLP, Foof, Shampoo, Structure
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.empirical import Matrix
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.isotropy import isotropy
from ntk_analysis.reproduce.natgrad.common import (
    condition_number,
    dense_layers,
    dense_net,
    layer_coefficients,
    off_diagonal,
    sphere,
)
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
from ntk_analysis.reproduce.ruler import CUTOFF, relative_error

_SAMPLES, _FEATURES, _WIDTHS = 24, 64, (64, 576)
_ACTIVATIONS = ("relu", "tanh")
_SEEDS = range(4)
_EXACT = 1e-8
POWERS = (0.25, 0.5, 1.0)
COUNTS = (24, 96, 384)


@check(
    "NG-Frontier-Half",
    "Half of K-FAC is nearly enough, if inputs have one norm",
    claim="With A^-1 alone (FOOF) and inputs of rank N, Theta-bar_l = diag(|D_n|^2): the inputs of "
    "different samples are made orthogonal, whatever D is. With B^-1 alone and derivatives of rank "
    "N it is diag(|a_n|^2), but in the last layer, whose D has rank C, a a^T / N stays. In the "
    "limit |D_n|^2 tends to B_l(x_n, x_n), a function of |x_n| alone, for ReLU to 1. So FOOF is "
    "isotropic there with alpha = sum_l B_l(x, x), for ReLU L as for the block-diagonal Fisher: "
    "for any inputs with ReLU, for inputs of equal norm with other activations. At width M the "
    "diagonal spreads by 1 / sqrt(M). The mirror has one larger eigenvalue at any width. With C "
    "outputs FOOF keeps blocks D_n D_n^T of single samples, which tend to multiples of I.",
    setting="two hidden layers of width 64 and 576, ReLU and tanh, one output (and three), no "
    "biases, N = 24 Gaussian inputs of 64 features and norm 8, four seeds; kernels of infinite "
    "width; 16 features for a rank below N; norms from 1 to 24; zero damping",
    origin="ours",
    fast=True,
)
def half(report: Report) -> Outcome:
    """The diagonals, their spread over the width, the limit, and both counterexamples."""
    x = sphere(_SAMPLES, _FEATURES)
    measurements: list[Measurement] = []
    for activation in _ACTIVATIONS:
        report(activation)
        measurements += _diagonals(activation, x)
    report("infinite width")
    measurements += _limits(x)
    report("three outputs")
    measurements += _outputs(x)
    report("inputs of a rank below N")
    measurements += _low_rank()
    report("inputs of other norms")
    measurements += _other_norms(x)
    return Outcome(tuple(measurements))


def _diagonals(activation: str, x: Matrix) -> list[Measurement]:
    """The formulas at width 64, and conditions at both widths, mean of the seeds."""
    model = dense_net((_FEATURES, _WIDTHS[0], _WIDTHS[0], 1), activation)
    layers = dense_layers(model, x)
    squares = [np.sum(layer.derivatives**2, axis=1) for layer in layers]
    inputs = [np.sum(layer.inputs**2, axis=1) for layer in layers[:-1]]
    last = layers[-1].grams[0] / _SAMPLES
    errors = {
        "A alone": relative_error(
            coefficient_matrix(Foof("inputs"), model, x), np.diag(np.sum(squares, axis=0))
        ),
        "B alone": relative_error(
            coefficient_matrix(Foof("units"), model, x), np.diag(np.sum(inputs, axis=0)) + last
        ),
    }
    means = []
    variances = []
    for width in _WIDTHS:
        found = [dense_layers(_wide(activation, width, seed), x) for seed in _SEEDS]
        totals = [np.sum([np.sum(a.derivatives**2, axis=1) for a in one], axis=0) for one in found]
        means.append(float(np.mean([total.max() / total.min() for total in totals])))
        norms = [np.sum(one[-2].derivatives ** 2, axis=1) for one in found]
        variances.append(float(np.mean([np.var(values, ddof=1) for values in norms])))
    measurements = [
        below(f"{activation}, {name}: formula against the structure", error, _EXACT)
        for name, error in errors.items()
    ]
    measurements += [
        between(f"{activation}, A alone, M = 576: condition number", means[1], 1.0, 1.3),
        between(
            f"{activation}, A alone: condition number - 1, M = 64 over M = 576",
            (means[0] - 1) / (means[1] - 1),
            2.0,
            6.0,
        ),
    ]
    if activation == "relu":
        # samples share the weights, and so the half of the variance that comes from these
        kernel = analytic_kernels(_wide("relu", 4, 0), x, parts=("derivatives",)).derivatives[1]
        pairs = (np.sum(kernel) - np.trace(kernel)) / (_SAMPLES * (_SAMPLES - 1))
        expected = 6 * (1 - pairs) / _WIDTHS[1]
        measurements.append(
            between(
                "relu, M = 576: variance of |D_n|^2 over 6 (1 - mean B(x, x')) / M",
                variances[1] / expected,
                0.6,
                1.6,
            )
        )
    return measurements


def _wide(activation: str, width: int, seed: int = 0, features: int = _FEATURES) -> MLP:
    return dense_net((features, width, width, 1), activation, seed)


def _limits(x: Matrix) -> list[Measurement]:
    """Both halves at infinite width: alpha of the one, the condition number of the other."""
    measurements: list[Measurement] = []
    for activation in _ACTIVATIONS:
        model = _wide(activation, 4)
        kernels = analytic_kernels(model, x, parts=("inputs", "derivatives"))
        found = isotropy(Foof("inputs"), model, x, kernels="analytic")
        alpha = sum(float(kernel[0, 0]) for kernel in kernels.derivatives)
        hidden = sum(float(kernel[0, 0]) for kernel in kernels.inputs[:-1])
        mirror = isotropy(Foof("units"), model, x, kernels="analytic").condition_number
        formula = condition_number(hidden * np.eye(_SAMPLES) + kernels.inputs[-1] / _SAMPLES)
        name = f"{activation}, infinite width"
        measurements += [
            close(f"{name}, A alone: alpha over sum_l B_l(x, x)", found.alpha / alpha, 1.0, _EXACT),
            below(f"{name}, A alone: |Theta-bar / alpha - I|", found.deviation, _EXACT),
            close(
                f"{name}, B alone: condition number over that of sum Q_l(x, x) I + Q_L / N",
                mirror / formula,
                1.0,
                _EXACT,
            ),
        ]
        if activation == "relu":
            measurements += [
                close(f"{name}, A alone: alpha", found.alpha, 3.0, 1e-6),
                between(f"{name}, B alone: condition number", mirror, 1.1, 1.6),
            ]
    return measurements


def _outputs(x: Matrix) -> list[Measurement]:
    """Blocks of samples with three outputs, at both widths."""
    own = np.kron(np.eye(_SAMPLES), np.ones((3, 3))) > 0
    beside = []
    for width in _WIDTHS:
        model = dense_net((_FEATURES, width, width, 3), "tanh")
        found = coefficient_matrix(Foof("inputs"), model, x)
        beside.append(off_diagonal(found))
    samples = np.max(np.abs(found[~own])) / np.max(found)
    return [
        below("tanh, three outputs, A alone: entries between samples", samples, _EXACT),
        below("tanh, three outputs, A alone, M = 576: entries between outputs", beside[1], 0.15),
        between(
            "tanh, three outputs, A alone: these, M = 64 over M = 576",
            beside[0] / beside[1],
            1.5,
            7,
        ),
    ]


def _low_rank() -> list[Measurement]:
    """With fewer features than samples the first layer is not diagonal at any width."""
    few = _SAMPLES * 2 // 3
    x = sphere(_SAMPLES, few)
    first = layer_coefficients(Foof("inputs"), _wide("relu", _WIDTHS[0], features=few), x)[0]
    limit = isotropy(Foof("inputs"), _wide("relu", 4, features=few), x, kernels="analytic")
    return [
        above(
            "16 features, A alone, layer 1: entries beside the diagonal", off_diagonal(first), 0.05
        ),
        above(
            "16 features, A alone, infinite width: condition number", limit.condition_number, 1.2
        ),
    ]


def _other_norms(x: Matrix) -> list[Measurement]:
    """Norms from 1 to 24: K-FAC does not see them."""
    stretched = x * np.geomspace(1 / 8, 3, _SAMPLES)[:, None]
    cases: dict[str, tuple[Structure, str]] = {
        "tanh, K-FAC": (KFAC(), "tanh"),
        "relu, A alone": (Foof("inputs"), "relu"),
        "tanh, A alone": (Foof("inputs"), "tanh"),
        "relu, B alone": (Foof("units"), "relu"),
    }
    found = {
        name: isotropy(structure, _wide(activation, 4), stretched, kernels="analytic")
        for name, (structure, activation) in cases.items()
    }
    still, moved = list(cases)[:2], list(cases)[2:]
    return [
        *(
            below(f"norms 1 to 24, {name}: |Theta-bar / alpha - I|", found[name].deviation, 1e-6)
            for name in still
        ),
        *(
            above(f"norms 1 to 24, {name}: condition number", found[name].condition_number, 1.5)
            for name in moved
        ),
    ]


@check(
    "NG-Frontier-Shampoo",
    "Shampoo takes roots of the kernels: only beyond its square is it isotropic",
    claim="With R = mean |D|^2 a a^T, L = mean |a|^2 D D^T, one output, matrices of rank N, "
    "Q = a a^T, K = D D^T, S = diag(|D_n|^2) and T = diag(|a_n|^2), Theta-bar_l is N^(2p-1) times "
    "the product, entry by entry, of S^-1/2 (S^1/2 Q S^1/2)^(1-p) S^-1/2 and "
    "T^-1/2 (T^1/2 K T^1/2)^(1-p) T^-1/2. For inputs of one norm the limit is that of Q_l^(1-p) "
    "and B_l^(1-p): the powers 3/4 of both kernels for Shampoo (p = 1/4), their square roots for "
    "its square (p = 1/2), and I for p = 1, where Theta-bar_l = N (S T)^-1 is diagonal at any "
    "width. Where all pairs of samples correlate alike, the condition number of a layer grows as "
    "N^(1-2p): as N for gradient descent, as sqrt(N) for Shampoo, not at all for its square.",
    setting="two hidden layers, ReLU and tanh, one output, no biases, N = 24 Gaussian inputs of 64 "
    "features and norm 8, width 64; kernels of infinite width, of N = 24, 96 "
    "and 384 inputs in 4096 features, too; norms from 1 to 24; zero damping",
    origin="ours",
    fast=True,
)
def shampoo(report: Report) -> Outcome:
    """The formula, the limit, the growth with N, and inputs of other norms."""
    x = sphere(_SAMPLES, _FEATURES)
    measurements: list[Measurement] = []
    for power in POWERS:
        for activation in _ACTIVATIONS if power == POWERS[1] else ("tanh",):
            report(f"p = {power:g}, {activation}")
            model = _wide(activation, _WIDTHS[0])
            found = coefficient_matrix(Shampoo(power), model, x)
            formula = sum(
                (rooted(*layer.grams, power) for layer in dense_layers(model, x)),
                start=np.zeros((_SAMPLES, _SAMPLES)),
            )
            error = relative_error(found, formula)
            measurements.append(
                below(f"p = {power:g}, {activation}: formula against the structure", error, 1e-6)
            )
    report("infinite width")
    limits = {power: condition_number(limit_of(x, power)) for power in (0.0, *POWERS)}
    stretched = x * np.geomspace(1 / 8, 3, _SAMPLES)[:, None]
    measurements += [
        between("relu, limit, p = 1/4: condition number", limits[0.25], 2.5, 6.0),
        between("relu, limit, p = 1/2: condition number", limits[0.5], 1.3, 2.0),
        below("relu, limit, p = 1: condition number - 1", limits[1.0] - 1, _EXACT),
        above("relu, limit, gradient descent over p = 1/4", limits[0.0] / limits[0.25], 2.0),
        above(
            "relu, limit, norms 1 to 24, p = 1: condition number",
            condition_number(limit_of(stretched, 1.0)),
            10.0,
        ),
    ]
    grown: dict[float, list[float]] = {power: [] for power in (0.0, 0.25, 0.5, 1.0)}
    for count in COUNTS:
        report(f"infinite width, N = {count}")
        many = sphere(count, 4096)
        for power, values in grown.items():
            values.append(condition_number(limit_of(many, power)))
    for power in (0.0, 0.25, 0.5):
        first, last = grown[power][-2:]
        measurements.append(
            close(
                f"relu, limit, p = {power:g}: exponent of N, from {COUNTS[-2]} to {COUNTS[-1]}",
                np.log(last / first) / np.log(COUNTS[-1] / COUNTS[-2]),
                1 - 2 * power,
                0.12,
            )
        )
    curves = [{"power": power, "conditions": values} for power, values in grown.items()]
    return Outcome(tuple(measurements), {"counts": list(COUNTS), "curves": curves})


def rooted(inputs: Matrix, derivatives: Matrix, power: float) -> Matrix:
    """Theta-bar_l of ``Shampoo`` at zero damping, one output.

    Args:
      inputs: a a^T, shape (N, N).
      derivatives: D D^T, shape (N, N); of any rank.
      power: p.
    """
    scales = [np.sqrt(np.diag(gram)) for gram in (derivatives, inputs)]
    parts = [
        _power(np.outer(scale, scale) * gram, 1 - power) / np.outer(scale, scale)
        for scale, gram in zip(scales, (inputs, derivatives), strict=True)
    ]
    result: Matrix = len(inputs) ** (2 * power - 1) * parts[0] * parts[1]
    return result


def _power(matrix: Matrix, power: float) -> Matrix:
    """Of a positive semi-definite matrix, on its range."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > CUTOFF * values[-1]
    result: Matrix = (vectors[:, kept] * values[kept] ** power) @ vectors[:, kept].T
    return result


def limit_kernels(x: Matrix) -> list[tuple[Matrix, Matrix]]:
    """Q_l and B_l of a ReLU network with two hidden layers, for inputs (N, M_0)."""
    model = _wide("relu", 4, features=x.shape[1])
    kernels = analytic_kernels(model, x, parts=("inputs", "derivatives"))
    return list(zip(kernels.inputs, kernels.derivatives, strict=True))


def limit_of(x: Matrix, power: float) -> Matrix:
    """Theta-bar of ``Shampoo`` and a ReLU network with two hidden layers at infinite width.

    Args:
      x: inputs, shape (N, M_0).
      power: p; 0 is gradient descent.
    """
    structure = Shampoo(power) if power else GradientDescent()
    return coefficient_matrix(
        structure, _wide("relu", 4, features=x.shape[1]), x, kernels="analytic"
    )
