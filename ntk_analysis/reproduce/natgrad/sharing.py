"""What does not carry over: Kronecker factors and unit-wise blocks of shared weights."""

from __future__ import annotations

import numpy as np

from natgrad_flax import KFAC, BlockDiagonal, Exact, Structure, UnitWise
from ntk_analysis.empirical import Matrix
from ntk_analysis.isotropy import isotropy
from ntk_analysis.reproduce.natgrad.common import (
    conv_net,
    deviation,
    images,
    layer_coefficients,
    off_diagonal,
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

_SHAPE, _SAMPLES, _POSITIONS = (3, 3, 8), 4, 9


@check(
    "NG-Conv-Expand",
    "K-FAC of shared weights (expand) is isotropic, at T times the width",
    claim="K-FAC expand takes every position as a sample. Where the inputs of layer l have rank "
    "N T_l and its derivatives rank N C T_l, Theta-bar_l = N T_l^2 I, so alpha = N (sum_l T_l^2 + "
    "1), the sum over convolutions. With the rank of the inputs alone Theta-bar_l is diagonal, and "
    "its entries differ. The layer with the most positions rules alpha.",
    setting="two convolutions on 4 Gaussian images of 3 x 3 x 8 pixels (T = 9, N T = 36, 72 inputs "
    "a channel), ReLU, one output; 40 and 20 channels; zero damping",
    origin="ours",
    fast=True,
)
def expand(report: Report) -> Outcome:
    """Above and below the number of channels that the derivatives need."""
    x, n = images(_SAMPLES, _SHAPE), _SAMPLES
    report("40 channels")
    wide = isotropy(KFAC(), conv_net(_SHAPE, (40, 40)), x)
    alpha = n * (2 * _POSITIONS**2 + 1)
    report("20 channels")
    narrow = layer_coefficients(KFAC(last_layer="literal"), conv_net(_SHAPE, (20, 20)), x)
    spread = [float(np.ptp(np.diag(part)) / np.mean(np.diag(part))) for part in narrow[:2]]
    return Outcome(
        (
            close("40 channels: alpha / N", wide.alpha / n, alpha / n, 1e-6),
            below("40 channels: |Theta-bar / alpha - I|", wide.deviation, 1e-8),
            *(
                below(
                    f"20 channels, layer {i}: entries beside the diagonal",
                    off_diagonal(part),
                    1e-8,
                )
                for i, part in enumerate(narrow[:2], 1)
            ),
            *(
                above(f"20 channels, layer {i}: spread of the diagonal", value, 0.01)
                for i, value in enumerate(spread, 1)
            ),
        ),
        notes=(
            "The default ConvNet on CIFAR-10 has 1024 positions in its first layer: for N = 128 "
            "and C = 10 the condition asks for 1.3 million channels.",
        ),
    )


@check(
    "NG-Conv-Reduce",
    "K-FAC of shared weights (reduce) is not isotropic at any width",
    claim="K-FAC reduce knows the mean of the inputs and the sum of the derivatives over "
    "positions, N and N C directions in which the Jacobians do not lie. It is isotropic where "
    "every position sees the same, or where there is one only; there Theta-bar_l = N I.",
    setting="as in NG-Conv-Expand with 40 channels; and images without a pattern, whose pixels are "
    "all the same, with periodic borders",
    origin="ours",
)
def reduce(report: Report) -> Outcome:
    """On images, and on images without a pattern."""
    structure = KFAC(sharing="reduce")
    x = images(_SAMPLES, _SHAPE)
    report("images")
    found = isotropy(structure, conv_net(_SHAPE, (40, 40)), x)
    report("images without a pattern")
    flat = np.broadcast_to(images(_SAMPLES, (1, 1, 8)), x.shape)
    same = isotropy(structure, conv_net(_SHAPE, (40, 40), padding="CIRCULAR"), flat)
    return Outcome(
        (
            above("images: |Theta-bar / alpha - I|", found.deviation, 0.05),
            below("no pattern: |Theta-bar / alpha - I|", same.deviation, 1e-6),
            close("no pattern: alpha / (N L)", same.alpha / (3 * _SAMPLES), 1.0, 1e-6),
        )
    )


@check(
    "NG-Conv-Unit",
    "The unit-wise Fisher gains from shared weights",
    claim="A channel whose Jacobian has row rank N C adds I to Theta-bar. As soon as weights are "
    "shared, the rows of one channel for different outputs are independent, and a ReLU channel is "
    "hardly ever inactive at all positions. So alpha = 1 + sum_l M_l, without the gamma / C of "
    "Theorem 5.1, given N C inputs a channel.",
    setting="two convolutions of 10 and 12 channels on 4 Gaussian images of 3 x 3 x 8 pixels, 72 "
    "and 90 inputs a channel, 2 outputs; tanh and ReLU; zero damping",
    origin="ours",
    fast=True,
)
def unit(report: Report) -> Outcome:
    """Exactly for tanh, nearly for ReLU."""
    x = images(_SAMPLES, _SHAPE)
    found = {}
    for activation in ("tanh", "relu"):
        report(activation)
        found[activation] = isotropy(
            UnitWise(), conv_net(_SHAPE, (10, 12), 2, activation=activation), x
        )
    return Outcome(
        (
            close("tanh: alpha", found["tanh"].alpha, 23.0, 1e-6),
            below("tanh: |Theta-bar / alpha - I|", found["tanh"].deviation, 1e-6),
            between("ReLU: alpha", found["relu"].alpha, 20.0, 23.0),
            below("ReLU: |Theta-bar / alpha - I|", found["relu"].deviation, 0.2),
        ),
        notes=("A dense network of these widths has 1 + 22 gamma / C: 12 for tanh, 6.5 for ReLU.",),
    )


@check(
    "NG-Conv-First",
    "The first convolution is not isotropic for K-FAC and the unit-wise Fisher, at any width",
    claim="A channel of the first layer has k^2 C_in inputs, 27 on colour images, however many "
    "channels there are. With more than that to fit (N C, or N T for K-FAC) Theta-bar_1 is not "
    "alpha_1 I at any width; its mean eigenvalue is k^2 C_in M_1 / (N C) for the unit-wise Fisher "
    "and k^2 C_in T for K-FAC. The unit-wise Fisher stays anisotropic as a whole. K-FAC comes near "
    "isotropy with N C T channels, since the share of its first layer is k^2 C_in / (N T) of that "
    "of another: it hardly trains it.",
    setting="two convolutions of 16, 64 and 256 channels on 24 Gaussian images of 3 x 3 x 2 pixels "
    "(18 inputs a channel, N T = 216), tanh, one output; zero damping",
    origin="ours",
)
def first(report: Report) -> Outcome:
    """Deviation of the whole, and of the first layer alone, against the number of channels."""
    shape, samples, widths = (3, 3, 2), 24, (16, 64, 256)
    x, inputs = images(samples, shape), 9 * shape[-1]
    structures: dict[str, Structure] = {
        "Exact": Exact(),
        "BlockDiagonal": BlockDiagonal(),
        "KFAC": KFAC(),
        "UnitWise": UnitWise(),
    }
    whole: dict[str, list[float]] = {name: [] for name in structures}
    alone: dict[str, list[float]] = {"KFAC": [], "UnitWise": []}
    layers: dict[str, list[Matrix]] = {}
    for width in widths:
        model = conv_net(shape, (width, width), activation="tanh")
        for name, structure in structures.items():
            report(f"{width} channels: {name}")
            if name not in alone:
                whole[name].append(isotropy(structure, model, x).deviation)
                continue
            # each layer as a hidden one; what the readout adds is N I or I
            literal = KFAC(last_layer="literal") if name == "KFAC" else structure
            layers[name] = layer_coefficients(literal, model, x)
            total = sum(layers[name], start=np.zeros((samples, samples)))
            whole[name].append(deviation(total, _mean_eigenvalue(total)))
            alone[name].append(deviation(layers[name][0], _mean_eigenvalue(layers[name][0])))
    unit_wise, kfac = layers["UnitWise"], layers["KFAC"]
    measurements: list[Measurement] = [
        below(f"{name}: largest |Theta-bar / alpha - I|", max(whole[name]), 1e-6)
        for name in ("Exact", "BlockDiagonal")
    ]
    measurements += [
        above(f"{name}, layer 1: smallest |Theta-bar_1 / alpha_1 - I|", min(values), 0.1)
        for name, values in alone.items()
    ]
    width, far = widths[-1], 1e-6
    for what, part, alpha in (
        ("UnitWise, layer 1: mean eigenvalue over k^2 C_in M_1 / N", unit_wise[0],
         inputs * width / samples),
        ("KFAC, layer 1: mean eigenvalue over k^2 C_in T", kfac[0], inputs * _POSITIONS),
    ):  # fmt: skip
        measurements.append(close(what, _mean_eigenvalue(part) / alpha, 1.0, far))
    measurements += [
        below("UnitWise, layer 2: |Theta-bar_2 / M_2 - I|", deviation(unit_wise[1], width), far),
        below(
            "KFAC, layer 2: |Theta-bar_2 / (N T^2) - I|",
            deviation(kfac[1], samples * _POSITIONS**2),
            far,
        ),
        below("KFAC, layer 1: entries beside the diagonal", off_diagonal(kfac[0]), far),
        above("UnitWise, whole: smallest |Theta-bar / alpha - I|", min(whole["UnitWise"]), 0.05),
        between(
            "KFAC, whole, 256 channels: |Theta-bar / alpha - I|", whole["KFAC"][-1], 0.005, 0.1
        ),
    ]
    return Outcome(
        tuple(measurements), {"channels": list(widths), "whole": whole, "first_layer": alone}
    )


def _mean_eigenvalue(matrix: Matrix) -> float:
    return float(np.trace(matrix) / len(matrix))
