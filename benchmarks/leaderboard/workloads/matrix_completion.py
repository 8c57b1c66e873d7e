"""Completion of a matrix of low rank by factors: after Fig. 5 of Kerekes et al. (2021)."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.workload import Data, Workload

SETTINGS: Mapping[str, Any] = {
    "data_seed": 0,
    "side": 40,
    "rank": 3,
    "num_train": 800,
    "num_validation": 400,
    "factors": 3,
    "scale": 0.1,
}


class Factors(nnx.Module):
    """An entry of the product of factors, W_1 W_2 ... of the same square shape.

    An input is a row and a column of the matrix, each as a one-hot vector. The rows go through all
    factors but one, the columns through the last one, and their inner product is the entry.

    Args:
      side: rows and columns of every factor.
      factors: how many, at least 2.
      scale: of the product's entries at the start, a standard deviation.
      rngs: source of randomness.
    """

    def __init__(self, side: int, factors: int, scale: float, rngs: nnx.Rngs) -> None:
        self.side = side
        # entries of the product have the variance variance^factors / side
        variance = (side * scale**2) ** (1 / factors)

        def dense() -> ng.Dense:
            return ng.Dense(side, side, weight_variance=variance, rngs=rngs)

        self.rows = nnx.List(dense() for _ in range(factors - 1))
        self.columns = dense()

    def __call__(self, x: Array) -> Array:
        """Maps inputs (N, 2 side) to entries (N, 1)."""
        row, column = x[:, : self.side], x[:, self.side :]
        for factor in self.rows:
            row = factor(row)
        return jnp.sum(row * self.columns(column), axis=1, keepdims=True)


@cache
def data() -> Data:
    """Observed entries to train on, all others held out; the matrix has entries of rms 1."""
    rng = np.random.default_rng(SETTINGS["data_seed"])
    side, observed = SETTINGS["side"], SETTINGS["num_train"]
    left, right = rng.standard_normal((2, side, SETTINGS["rank"]))
    matrix = left @ right.T
    matrix *= side / np.linalg.norm(matrix)
    order = rng.permutation(side * side)
    eye = np.eye(side, dtype=np.float32)
    x = np.concatenate([eye[order // side], eye[order % side]], axis=1)
    y = matrix.reshape(-1, 1)[order].astype(np.float32)
    return Data(x[:observed], y[:observed], x[observed:], y[observed:])


def model(seed: int) -> nnx.Module:
    """Three square factors whose product starts near zero."""
    return Factors(SETTINGS["side"], SETTINGS["factors"], SETTINGS["scale"], rngs=nnx.Rngs(seed))


WORKLOAD = Workload(
    name="matrix-completion",
    title="A 40 x 40 matrix of rank 3 from 800 entries, three square factors, squared error, "
    "full batch",
    version=3,
    question="Which methods keep the bias towards low rank that makes factors generalise?",
    settings=SETTINGS,
    data=data,
    model=model,
    loss=ng.MeanSquaredError(),
    batch_size=None,
    metric="rmse",
    max_steps=2000,
    max_seconds=2.5,
    expectation="Curvature should not win: small factors learn the large directions first, "
    "and a natural gradient gives that bias up.",
    curvature_wins=False,
)
