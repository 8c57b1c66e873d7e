"""The deep autoencoder of MNIST: Fig. 1D of Bernacchia et al. (2018)."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import mlp, reconstruction
from benchmarks.leaderboard.workload import Workload

SETTINGS = {
    "dataset": "mnist",
    "num_train": 20000,
    "num_held_out": 2000,
    "widths": [784, 400, 200, 100, 50, 100, 200, 400, 784],
    "activation": "tanh",
    "weight_variance": 1.0,
    "bias_variance": 0.1,
}

WORKLOAD = Workload(
    name="mnist-autoencoder",
    title="MNIST autoencoder 784-400-200-100-50-100-200-400-784 tanh, N = 20000, squared error, "
    "batches of 1000",
    version=1,
    question="Does curvature help through eight layers and a narrow one?",
    settings=SETTINGS,
    data=partial(reconstruction, SETTINGS),
    model=partial(mlp, SETTINGS),
    loss=ng.MeanSquaredError(),
    batch_size=1000,
    metric="rmse",
    max_steps=400,
    max_seconds=60.0,
    dataset="mnist",
    expectation="Curvature should win: eight layers around a narrow one are the classical "
    "case of a badly conditioned fit, with batches large enough to see it.",
    curvature_wins=True,
)
