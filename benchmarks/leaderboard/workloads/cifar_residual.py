"""CIFAR-10 by a small residual net of stock Flax layers, two epochs of mini-batches."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images
from benchmarks.leaderboard.workload import Workload

# GroupNorm: what BatchNorm makes of a sample depends on the others of its batch, so that there is
# no Fisher matrix of single samples
SETTINGS: Mapping[str, Any] = {
    "dataset": "cifar10",
    "classes": list(range(10)),
    "num_train": 5000,
    "num_held_out": 1000,
    "num_measured": 250,
    "layout": "image",
    "input_norm": 55.4,
    "parametrisation": "standard",
    "channels": [8, 16, 32],
    "blocks": 1,
    "normalisation": "group",
    "groups": 4,
    "outputs": 10,
}


def model(seed: int) -> nnx.Module:
    """The residual net at its initial parameters."""
    names = ("channels", "blocks", "outputs", "normalisation", "groups")
    return ng.ResidualNet(**{name: SETTINGS[name] for name in names}, rngs=nnx.Rngs(seed))


WORKLOAD = Workload(
    name="cifar-residual",
    title="CIFAR-10, residual net 8-16-32 with GroupNorm, N = 5000, cross-entropy, batches of 64",
    version=1,
    question="Does curvature still pay where normalisation has conditioned the problem already?",
    settings=SETTINGS,
    data=partial(images, SETTINGS),
    model=model,
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=64,
    metric="train",
    max_steps=156,
    max_seconds=300.0,
    dataset="cifar10",
    expectation="Curvature should not win: normalisation and skips have conditioned the "
    "problem already.",
    curvature_wins=False,
)
