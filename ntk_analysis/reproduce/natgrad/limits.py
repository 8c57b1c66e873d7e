"""Kernels of ConvNets at infinite width, and what they predict beside a dense network."""

from __future__ import annotations

from typing import Any

import jax
import natgrad_datasets
import numpy as np

from natgrad_flax import MLP, BlockDiagonal, BlockTriDiagonal, ConvNet, Exact
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.coefficient import analytic_signals
from ntk_analysis.dynamics import linearised_dynamics
from ntk_analysis.empirical import Matrix, empirical_layer_kernels
from ntk_analysis.infinite_width import infinite_width_limit
from ntk_analysis.isotropy import limit_isotropy
from ntk_analysis.networks import NETWORKS, build_network, layout
from ntk_analysis.prediction import predict_from_signals
from ntk_analysis.reproduce.natgrad.common import conv_net, images
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    check,
)

_STEPS = 1000


@check(
    "NG-Conv-Kernels",
    "Layer kernels of infinitely wide ConvNets",
    claim="Theta_l = sum over pairs of positions of B_l Q_l: Q_l goes forward through patches, B_l "
    "comes back through the transpose of that map, and one pass gives all layers. Their sum is the "
    "NTK of neural-tangents, and random networks tend to them as their channels grow.",
    setting="two convolutions with strides 1, 2, ReLU, biases, 3 Gaussian images of 5 x 4 x 2 "
    "pixels, flatten and average pooling; networks of 256 channels, mean over 6 seeds",
    origin="ours",
)
def kernels(report: Report) -> Outcome:
    """Against neural-tangents, and against wide networks."""
    shape = (5, 4, 2)
    x = images(3, shape)
    measurements = []
    for pooling in ("flatten", "average"):
        options: dict[str, Any] = {
            "strides": (1, 2),
            "pooling": pooling,
            "bias_variance": 0.1,
        }
        report(f"{pooling}: infinite")
        model = conv_net(shape, (2, 2), **options)
        limit = analytic_kernels(model, x[:1], x[1:])
        with jax.enable_x64(True):
            whole = jax.jit(lambda a, b, m=model: infinite_width_limit(m).network[2](a, b, "ntk"))
            theirs = np.asarray(whole(x[:1], x[1:]))
        found = [np.zeros((3, 3))] * 3
        for seed in range(6):
            report(f"{pooling}: network {seed + 1} of 6")
            wide = conv_net(shape, (256, 256), seed=seed, **options)
            one = empirical_layer_kernels(wide, x)
            found = [total + part / 6 for total, part in zip(found, one, strict=True)]
        true = analytic_kernels(model, x, parts=("tangent",)).tangent
        worst = max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(found, true, strict=True)
        )
        apart = float(np.max(np.abs(sum(limit.tangent) / theirs - 1)))
        measurements += [
            below(f"{pooling}: sum of the layers against neural-tangents", apart, 1e-10),
            below(f"{pooling}: 256 channels, largest error of a layer", worst, 0.1),
        ]
    return Outcome(tuple(measurements))


@check(
    "NG-Conv-Digits",
    "Dense and convolutional networks at infinite width",
    claim="Whatever the network, exact and layer-wise natural gradients train the linearised limit "
    "in one step of 1/alpha, while gradient descent pays for the condition number of its kernel. "
    "Average pooling makes the samples most alike, so its condition number is the largest.",
    setting="digits 3 and 8 of 8 x 8 pixels, N = 60, N' = 70, ReLU, three hidden layers (3 x 3 "
    "kernels, strides 1, 2, 2), no biases, f_0 = 0; kernels of infinite width",
    origin="ours",
)
def digits(report: Report) -> Outcome:
    """Isotropy, training curves and test accuracies of three limits."""
    measurements: list[Measurement] = []
    data: dict[str, Any] = {"networks": {}}
    conditions = {}
    for network in NETWORKS:
        report(f"{network}: kernels")
        problem = natgrad_datasets.load(
            "digits",
            classes=(3, 8),
            num_train=60,
            num_test=70,
            layout=layout(network),
            dtype="float64",
        )
        model = _network(network, problem.x_train.shape[1:])
        targets = np.asarray(problem.y_train, np.float64)
        train, test = analytic_signals(Exact(), model, problem.x_train, problem.x_test)
        assert test is not None
        worst = 0.0
        accuracies = {}
        for structure in (Exact(), BlockDiagonal(), BlockTriDiagonal()):
            report(f"{network}: {structure.name}")
            found = limit_isotropy(structure, model, train)
            worst = max(worst, found.deviation)
            alpha = found.theoretical_alpha
            assert alpha is not None
            limit = predict_from_signals(structure, train, test, targets)
            accuracies[structure.name] = limit.accuracy(problem.y_test)
        with jax.enable_x64(True):
            kernel = np.asarray(train.gram()) / len(problem.x_train)
        losses, condition = _descent(kernel, targets)
        conditions[network] = condition
        data["networks"][network] = {
            "gradient_descent": losses,
            "condition_number": condition,
            "accuracies": accuracies,
        }
        measurements += [
            below(f"{network}: largest |Theta-bar / alpha - I| of three structures", worst, 1e-5),
            above(f"{network}: condition number of the NTK", condition, 100.0),
            above(
                f"{network}: steps of gradient descent to a hundredth of the loss",
                float(np.argmax(np.asarray([*losses, 0.0]) <= 0.01 * losses[0])),
                10.0,
            ),
            above(f"{network}: lowest test accuracy", min(accuracies.values()), 0.8),
        ]
    measurements.append(
        above(
            "condition number with average pooling over that with flatten",
            conditions["conv-average"] / conditions["conv-flatten"],
            1.5,
        )
    )
    return Outcome(tuple(measurements), data)


def _network(network: str, shape: tuple[int, ...]) -> MLP | ConvNet:
    """A network of any width: its limit is what counts."""
    return build_network(network, shape, (4, 4, 4), 1, seed=0, activation="relu")


def _descent(kernel: Matrix, targets: Matrix) -> tuple[list[float], float]:
    """Losses of gradient descent at 1 / lambda_max from f_0 = 0, and the condition number."""
    values = np.linalg.eigvalsh(kernel)
    run = linearised_dynamics(
        kernel, np.zeros((0, len(kernel))), np.zeros_like(targets), targets, 1 / values[-1], _STEPS
    )
    return run.train_losses.tolist(), float(values[-1] / values[0])
