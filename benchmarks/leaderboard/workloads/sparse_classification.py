"""Sparse classification, judged by generalisation: after Fig. 4 of Kerekes et al. (2021)."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np

import natgrad_flax as ng
from benchmarks.leaderboard.samples import mlp
from benchmarks.leaderboard.workload import Data, Workload

# the paper trains diagonal networks, whose natural gradient needs a structure of its own; a
# fully connected linear network has the same functions and suits every contestant
SETTINGS: Mapping[str, Any] = {
    "data_seed": 0,
    "num_train": 3000,
    "num_held_out": 2000,
    "num_validation": 1000,
    "relevant": 20,
    "widths": [1000, 32, 32, 2],
    "activation": "identity",
    "weight_variance": 1.0,
    "bias_variance": 0.0,
}


@cache
def data() -> Data:
    """x ~ N(0, I), class by the sign of the sum of the first 20 of D = 1000 inputs, one-hot."""
    rng = np.random.default_rng(SETTINGS["data_seed"])
    inputs, train = SETTINGS["widths"][0], SETTINGS["num_train"]
    drawn = rng.standard_normal((train + SETTINGS["num_held_out"], inputs))
    positive = drawn[:, : SETTINGS["relevant"]].sum(axis=1) > 0
    x = drawn.astype(np.float32)
    y = np.stack([positive, ~positive], axis=1).astype(np.float32)
    return Data(x[:train], y[:train], x[train:], y[train:])


WORKLOAD = Workload(
    name="sparse-classification",
    title="Sparse classification, D = 1000 with 20 relevant, 1000-32-32-2 linear, N = 3000, "
    "cross-entropy, batches of 250",
    version=2,
    question="Which methods generalise where few of many inputs count?",
    settings=SETTINGS,
    data=data,
    model=partial(mlp, SETTINGS),
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=250,
    metric="error",
    max_steps=1000,
    max_seconds=2.0,
    expectation="Curvature should not win: it weighs the many inputs that do not count as "
    "much as the few that do.",
    curvature_wins=False,
)
