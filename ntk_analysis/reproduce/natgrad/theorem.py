"""What carries over to ConvNets: Theorem 4.1, and where its condition on ranks ends."""

from __future__ import annotations

import numpy as np

from natgrad_flax import BlockDiagonal, BlockTriDiagonal, Exact, LayerWise
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.coefficient import Kernels
from ntk_analysis.dynamics import predict_dynamics
from ntk_analysis.empirical import Matrix, empirical_layer_kernels
from ntk_analysis.isotropy import IsotropyReport, isotropy
from ntk_analysis.reproduce.natgrad.common import conv_net, images
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, below, check, close

POOLINGS = ("flatten", "average")
_SIGMA = np.array([[2.0, 0.3, -0.5], [0.3, -1.0, 0.2], [-0.5, 0.2, 1.5]])


@check(
    "NG-Conv-Thm4.1",
    "Layer-wise Fishers of ConvNets are isotropic",
    claim="Theorem 4.1 of Karakida & Osawa asks for Jacobians J_l of row rank N C and for nothing "
    "else, so it holds with shared weights, too: Theta-bar = alpha I with alpha = 1 (exact), L "
    "(block-diagonal), s or s + 1 (block tri-diagonal) and 1^T Sigma^-1 1 for any Sigma, at finite "
    "and at infinite width, whatever reads the last layer. The linearised network fits its samples "
    "in one step of 1/alpha.",
    setting="two 3 x 3 convolutions of 10 channels with strides 1, 2 and a readout (L = 3), "
    "ReLU, 5 Gaussian images of 4 x 4 x 2 pixels, 2 outputs; a random indefinite Sigma; flatten "
    "and global average pooling",
    origin="ours",
    fast=True,
)
def theorem_4_1(report: Report) -> Outcome:
    """Deviation from alpha I, and the loss after one step."""
    x, y = images(5, (4, 4, 2)), np.random.default_rng(1).normal(size=(5, 2))
    structures = (Exact(), BlockDiagonal(), BlockTriDiagonal(), LayerWise(_SIGMA))
    alphas = (1.0, 3.0, 1.0, float(np.linalg.solve(_SIGMA, np.ones(3)).sum()))
    widths: dict[Kernels, str] = {"empirical": "10 channels", "analytic": "infinitely many"}
    measurements = []
    for pooling in POOLINGS:
        model = conv_net((4, 4, 2), (10, 10), 2, strides=(1, 2), pooling=pooling)
        for kernels, width in widths.items():
            report(f"{pooling}, {width}")
            found = [isotropy(s, model, x, kernels=kernels) for s in structures]
            apart = max(
                abs(f.alpha / alpha - 1) + f.deviation
                for f, alpha in zip(found, alphas, strict=True)
            )
            measurements.append(
                below(f"{pooling}, {width}: largest |Theta-bar / alpha - I|", apart, 1e-6)
            )
    losses = predict_dynamics(
        BlockDiagonal(), model, x, y, 1 / 3, 1, kernels="analytic"
    ).train_losses
    ratio = float(losses[1] / losses[0])
    name = "average, infinitely many: loss after a block-diagonal step over the first"
    measurements.append(below(name, ratio, 1e-12))
    return Outcome(tuple(measurements))


@check(
    "NG-Conv-Readout",
    "Average pooling takes T times as many channels as flattening",
    claim="The rank condition binds in the readout. It holds for N up to M_(L-1) T features where "
    "the readout sees all T positions, and for N up to M_(L-1) where it sees their mean. Beyond, a "
    "block-diagonal Fisher has eigenvalues L and L - 1, and a step of 1/L leaves 1/L of the "
    "residual in N - M_(L-1) directions; the exact Fisher stays isotropic.",
    setting="two convolutions of 4 channels (L = 3), ReLU, 7 Gaussian images of 3 x 3 x 2 pixels, "
    "one output",
    origin="ours",
    fast=True,
)
def readout(report: Report) -> Outcome:
    """The spectrum with 4 features, and with 4 times 9 of them."""
    channels, samples = 4, 7
    x = images(samples, (3, 3, 2))
    found: dict[str, IsotropyReport] = {}
    for pooling in POOLINGS:
        report(pooling)
        model = conv_net((3, 3, 2), (channels, channels), pooling=pooling)
        found[pooling] = isotropy(BlockDiagonal(), model, x)
        if pooling == "average":
            exact = isotropy(Exact(), model, x)
    values = found["average"].eigenvalues
    low, high = values[: samples - channels], values[samples - channels :]
    return Outcome(
        (
            below("flatten: |Theta-bar / L - I|", found["flatten"].deviation, 1e-8),
            below("average: distance of 3 eigenvalues to L - 1", np.max(np.abs(low - 2)), 1e-8),
            below("average: distance of 4 eigenvalues to L", np.max(np.abs(high - 3)), 1e-8),
            close("average: condition number", found["average"].condition_number, 1.5, 1e-8),
            below("average: exact Fisher, |Theta-bar - I|", exact.deviation, 1e-6),
        ),
        notes=found["average"].failed_conditions,
    )


@check(
    "NG-Conv-Shift",
    "What average pooling cannot tell apart",
    claim="With periodic borders, stride 1 and average pooling the outputs do not change when an "
    "image is shifted. Shifted copies are one sample: all kernels are singular at any width, no "
    "Fisher is isotropic on them, and different targets cannot be fitted. With flatten they are "
    "samples like others.",
    setting='3 Gaussian images of 4 x 4 x 2 pixels and their shifts by (1, 2); padding "CIRCULAR", '
    "two convolutions, ReLU; 16 channels, and infinitely many",
    origin="ours",
    fast=True,
)
def shift(report: Report) -> Outcome:
    """Ranks of the kernels on six images, of which three are shifts of the others."""
    x = images(3, (4, 4, 2))
    both = np.concatenate([x, np.roll(x, (1, 2), axis=(1, 2))])
    measurements: list[Measurement] = []
    for pooling, rank in (("average", 3), ("flatten", 6)):
        report(pooling)
        model = conv_net((4, 4, 2), (16, 16), padding="CIRCULAR", pooling=pooling)
        kernels: dict[str, Matrix] = {
            "16 channels": sum(empirical_layer_kernels(model, both), start=np.zeros((6, 6))),
            "infinite": analytic_kernels(model, both, parts=("ntk",)).ntk,
        }
        for name, kernel in kernels.items():
            values = np.linalg.eigvalsh(kernel)
            found = int(np.sum(values > 1e-9 * values[-1]))
            measurements.append(close(f"{pooling}, {name}: rank of the NTK", found, rank, 0))
    return Outcome(tuple(measurements))
