"""Finite ConvNets beside what their kernels at initialisation predict."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import natgrad_datasets
import numpy as np

from natgrad_flax import BlockDiagonal, BlockTriDiagonal, Exact
from ntk_analysis.dynamics import squared_losses
from ntk_analysis.networks import NETWORKS, build_network, layout
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, below, check
from ntk_analysis.training import Trainer

_WIDTHS = {"mlp": (64, 512), "conv-flatten": (16, 96), "conv-average": (64, 512)}
_SEEDS = (0, 1)
_STEPS = 3


@check(
    "NG-Conv-Training",
    "ConvNets train as their linearisation, the better the wider",
    claim="At the learning rate 1/alpha of Theorem 4.1 a wide ConvNet fits its samples in a step "
    "or two, as a wide dense network does; what is left after one step falls with the width. With "
    "average pooling that takes several times as many channels.",
    setting="digits 0 and 7 of 8 x 8 pixels, N = 20, targets +-0.5, ReLU, L = 3 (strides 1, 2), "
    "no biases, float32; dense networks of width 64 and 512, ConvNets of 16 and 96 channels "
    "(flatten) and of 64 and 512 (average), mean loss of 2 seeds; learning rates 1, 1/3 and 1",
    origin="ours",
)
def training(report: Report) -> Outcome:
    """Losses of exact, block-diagonal and block tri-diagonal natural gradient."""
    measurements: list[Measurement] = []
    data: dict[str, Any] = {"widths": _WIDTHS, "losses": {}}
    for network in NETWORKS:
        problem = natgrad_datasets.load(
            "digits", classes=(0, 7), num_train=20, num_test=1, layout=layout(network)
        )
        data["losses"][network] = {}
        for structure, alpha in ((Exact(), 1.0), (BlockDiagonal(), 3.0), (BlockTriDiagonal(), 1.0)):
            runs = []
            for width in _WIDTHS[network]:
                mean = np.zeros(_STEPS + 1)
                for seed in _SEEDS:
                    report(f"{network}, {structure.name}, width {width}, seed {seed}")
                    shape, sizes = problem.x_train.shape[1:], (width, width)
                    model = build_network(network, shape, sizes, 1, seed=seed, activation="relu")
                    x, y, x_test = problem.x_train, problem.y_train, jnp.asarray(problem.x_test)
                    trainer = Trainer(model, structure, x, y, x_test)
                    outputs = trainer.run(1 / alpha, _STEPS).outputs_train
                    mean += squared_losses(outputs, y) / len(_SEEDS)
                runs.append(mean.tolist())
            data["losses"][network][structure.name] = runs
            narrow, wide = runs
            name = f"{network}, {structure.name}"
            measurements += [
                below(f"{name}: wide, loss after 1 step over the first", wide[1] / wide[0], 0.2),
                below(f"{name}: wide, loss after 3 steps over the first", wide[3] / wide[0], 1e-3),
                below(
                    f"{name}: loss after 1 step, wide over narrow",
                    wide[1] / narrow[1] if math.isfinite(narrow[1]) else 0.0,
                    0.7,
                ),
            ]
    return Outcome(tuple(measurements), data)
