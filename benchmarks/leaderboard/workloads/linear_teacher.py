"""An ill-conditioned deep linear teacher: Fig. 1A of Bernacchia et al. (2018)."""

import itertools
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np

import natgrad_flax as ng
from benchmarks.leaderboard.samples import mlp
from benchmarks.leaderboard.workload import Data, Workload

SETTINGS: Mapping[str, Any] = {
    "data_seed": 0,
    "num_train": 10000,
    "num_held_out": 1000,
    "num_validation": 500,
    "decay": 5.0,
    "noise_variance": 1e-6,
    "widths": [20] * 17,
    "activation": "identity",
    "weight_variance": 1.0,
    "bias_variance": 0.0,
}


@cache
def data() -> Data:
    """Inputs with covariance eigenvalues e^{-5 i / n_0}, outputs of a random net of the same sizes.

    The eigenvectors are random and orthogonal, the weights of the teacher have the variance
    1 / fan-in, and its outputs carry noise of variance 1e-6: no student can be below that.
    """
    rng = np.random.default_rng(SETTINGS["data_seed"])
    widths, size = SETTINGS["widths"], SETTINGS["num_train"] + SETTINGS["num_held_out"]
    inputs = widths[0]
    eigenvectors = np.linalg.qr(rng.standard_normal((inputs, inputs)))[0]
    deviations = np.exp(-SETTINGS["decay"] * np.arange(inputs) / inputs / 2)
    x = (rng.standard_normal((size, inputs)) * deviations) @ eigenvectors.T
    y = x
    for fan_in, units in itertools.pairwise(widths):
        y = y @ rng.standard_normal((fan_in, units)) / np.sqrt(fan_in)
    y = y + np.sqrt(SETTINGS["noise_variance"]) * rng.standard_normal(y.shape)
    x, y = x.astype(np.float32), y.astype(np.float32)
    train = SETTINGS["num_train"]
    return Data(x[:train], y[:train], x[train:], y[train:])


WORKLOAD = Workload(
    name="linear-teacher",
    title="Deep linear teacher, 16 layers of 20 units, N = 10000, squared error, batches of 1000",
    version=2,
    question="How does a method cope with a long chain of ill-conditioned linear layers?",
    settings=SETTINGS,
    data=data,
    model=partial(mlp, SETTINGS),
    loss=ng.MeanSquaredError(),
    batch_size=1000,
    metric="mse",
    max_steps=1500,
    max_seconds=2.0,
    expectation="Curvature should win: the condition of sixteen layers multiplies, which no "
    "diagonal scaling sees.",
    curvature_wins=True,
)
