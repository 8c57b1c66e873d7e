"""CIFAR-10 by a small vision transformer of stock Flax layers, two epochs of mini-batches."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images
from benchmarks.leaderboard.workload import Workload

SETTINGS: Mapping[str, Any] = {
    "dataset": "cifar10",
    "classes": list(range(10)),
    "num_train": 5000,
    "num_held_out": 1000,
    "num_measured": 250,
    "layout": "image",
    "input_norm": 55.4,
    "parametrisation": "standard",
    "patch": 4,
    "width": 64,
    "depth": 2,
    "heads": 4,
    "mlp": 128,
    "outputs": 10,
}


def model(seed: int) -> nnx.Module:
    """The transformer at its initial parameters."""
    names = ("patch", "width", "depth", "heads", "mlp", "outputs")
    return ng.VisionTransformer(**{name: SETTINGS[name] for name in names}, rngs=nnx.Rngs(seed))


WORKLOAD = Workload(
    name="cifar-transformer",
    title="CIFAR-10, vision transformer of width 64 and depth 2, N = 5000, cross-entropy, "
    "batches of 64",
    version=1,
    question="Does curvature bring a transformer over its slow start?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=model,
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=64,
    metric="train",
    max_steps=156,
    max_seconds=300.0,
    dataset="cifar10",
    expectation="Curvature should win by steps: attention starts slowly, and its layers "
    "differ in scale.",
    curvature_wins=True,
)
