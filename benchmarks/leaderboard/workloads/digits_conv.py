"""Ten digits by a small convolutional net, in mini-batches: real images without any files."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import conv_net, images
from benchmarks.leaderboard.workload import Workload

SETTINGS = {
    "dataset": "digits",
    "classes": list(range(10)),
    "num_train": 1400,
    "num_held_out": 360,
    "layout": "image",
    "input_norm": 8.0,
    "input_shape": [8, 8, 1],
    "channels": [16, 32],
    "strides": [1, 2],
    "pooling": "flatten",
    "outputs": 10,
    "weight_variance": 2.0,
    "bias_variance": 0.1,
}

WORKLOAD = Workload(
    name="digits-conv",
    title="Ten digits (8 x 8), ConvNet 16-32 with biases, cross-entropy, batches of 64",
    version=1,
    question="Does curvature of shared weights pay on a convolutional net as small as can be?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=partial(conv_net, SETTINGS),
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=64,
    metric="train",
    max_steps=100,
    max_seconds=20.0,
    expectation="Curvature should win by steps, for positions of an image are correlated "
    "inputs; compilation decides the seconds.",
    curvature_wins=True,
)
