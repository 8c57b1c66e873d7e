"""CIFAR-10 by a convolutional net, two epochs of mini-batches."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import conv_net, images
from benchmarks.leaderboard.workload import Workload

# a quarter of a million parameters, but early strides and the mean over positions: a board has some
# hundred trials, and averaged factors of a flattened readout have as many rows as it has inputs
SETTINGS = {
    "dataset": "cifar10",
    "classes": list(range(10)),
    "num_train": 10000,
    "num_held_out": 1000,
    "num_measured": 500,
    "layout": "image",
    "input_norm": 55.4,
    "input_shape": [32, 32, 3],
    "channels": [32, 64, 128, 128],
    "strides": [2, 2, 2, 1],
    "pooling": "average",
    "outputs": 10,
    "weight_variance": 2.0,
    "bias_variance": 0.1,
}

WORKLOAD = Workload(
    name="cifar-conv",
    title="CIFAR-10, ConvNet 32-64-128-128, N = 10000, cross-entropy, batches of 128",
    version=1,
    question="How much more does curvature learn from two epochs of real images?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=partial(conv_net, SETTINGS),
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=128,
    metric="train",
    max_steps=156,
    max_seconds=300.0,
    dataset="cifar10",
    expectation="Curvature should win by steps, for positions of an image are strongly "
    "correlated inputs; by seconds only where factors are renewed seldom.",
    curvature_wins=True,
)
