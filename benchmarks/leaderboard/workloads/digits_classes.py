"""All ten digits by cross-entropy, in mini-batches."""

from functools import partial

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images, mlp
from benchmarks.leaderboard.workload import Workload

SETTINGS = {
    "dataset": "digits",
    "classes": list(range(10)),
    "num_train": 1400,
    "num_held_out": 360,
    "num_validation": 180,
    "input_norm": 8.0,
    "widths": [64, 256, 256, 10],
    "activation": "relu",
    "weight_variance": 2.0,
    "bias_variance": 0.1,
}

WORKLOAD = Workload(
    name="digits-classes",
    title="Ten digits (8 x 8), 64-256-256-10 ReLU with biases, cross-entropy, batches of 64",
    version=2,
    question="What does curvature from small batches buy in a classification problem?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=partial(mlp, SETTINGS),
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=64,
    metric="error",
    max_steps=1000,
    max_seconds=2.0,
    expectation="Curvature should not win by seconds: a whole tuned run takes half a second, "
    "less than a structure takes to compile.",
    curvature_wins=False,
)
