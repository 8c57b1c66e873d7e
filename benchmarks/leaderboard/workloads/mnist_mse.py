"""MNIST 0 against 7 by the mean squared error: Fig. 1(a) of Karakida & Osawa (2020)."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images, mlp
from benchmarks.leaderboard.workload import Workload

SETTINGS = {
    "dataset": "mnist",
    "classes": [0, 7],
    "num_train": 100,
    "num_held_out": 1000,
    "input_norm": 1.0,
    "widths": [784, 2048, 2048, 1],
    "activation": "relu",
    "weight_variance": 2.0,
    "bias_variance": 0.0,
}

WORKLOAD = Workload(
    name="mnist-mse",
    title="MNIST 0 and 7, 784-2048-2048-1 ReLU, N = 100, mean squared error, full batch",
    version=1,
    question="How soon does a wide network reach what tuned training reaches on new images?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=partial(mlp, SETTINGS),
    loss=ng.MeanSquaredError(),
    batch_size=None,
    metric="mse",
    max_steps=400,
    max_seconds=40.0,
    dataset="mnist",
    expectation="Curvature should not win: the minimum-norm solution that it goes to is not "
    "what generalises best, so that speed does not help.",
    curvature_wins=False,
)
