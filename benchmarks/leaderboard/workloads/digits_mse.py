"""Two digits by the mean squared error, full batch: the problem of Karakida & Osawa (2020)."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images, mlp
from benchmarks.leaderboard.workload import Workload

SETTINGS = {
    "dataset": "digits",
    "classes": [0, 7],
    "num_train": 100,
    "num_held_out": 71,
    "num_validation": 35,
    "input_norm": 1.0,
    "widths": [64, 512, 512, 1],
    "activation": "relu",
    "weight_variance": 2.0,
    "bias_variance": 0.0,
}

WORKLOAD = Workload(
    name="digits-mse",
    title="Digits 0 and 7 (8 x 8), 64-512-512-1 ReLU, N = 100, mean squared error, full batch",
    version=2,
    question="How soon does a wide network reach what tuned training reaches on new images?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=partial(mlp, SETTINGS),
    loss=ng.MeanSquaredError(),
    batch_size=None,
    metric="mse",
    max_steps=1000,
    max_seconds=2.0,
    expectation="Curvature should not win: the minimum-norm solution that it goes to is not "
    "what generalises best, so that speed does not help.",
    curvature_wins=False,
)
