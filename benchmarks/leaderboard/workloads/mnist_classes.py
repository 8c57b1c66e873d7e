"""The ten classes of MNIST by cross-entropy, in mini-batches."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images, mlp
from benchmarks.leaderboard.workload import Workload

SETTINGS = {
    "dataset": "mnist",
    "classes": list(range(10)),
    "num_train": 10000,
    "num_held_out": 5000,
    "input_norm": 28.0,
    "widths": [784, 512, 512, 10],
    "activation": "relu",
    "weight_variance": 2.0,
    "bias_variance": 0.1,
}

WORKLOAD = Workload(
    name="mnist-classes",
    title="MNIST, 784-512-512-10 ReLU with biases, N = 10000, cross-entropy, batches of 128",
    version=1,
    question="What does curvature from small batches buy in a classification problem?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=partial(mlp, SETTINGS),
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=128,
    metric="error",
    max_steps=1500,
    max_seconds=30.0,
    dataset="mnist",
    expectation="Curvature should win by steps, not by seconds: batches of 128 are noisy, ten"
    " classes are learned in a few epochs, and a tuned first-order step costs a "
    "fraction of ours.",
    curvature_wins=False,
)
