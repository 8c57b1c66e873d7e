"""Ten digits by a recurrent net that reads their rows one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.samples import images
from benchmarks.leaderboard.workload import Data, Workload

SETTINGS: Mapping[str, Any] = {
    "dataset": "digits",
    "classes": list(range(10)),
    "num_train": 1400,
    "num_held_out": 360,
    "layout": "image",
    "input_norm": 8.0,
    "parametrisation": "standard",
    "rows": 8,
    "columns": 8,
    "units": 96,
    "outputs": 10,
}


class RowReader(nnx.Module):
    """A GRU (Cho et al. 2014) over a sequence, and a linear readout of its last state.

    Of stock affine layers, one for the inputs and one for the state, with the three gates side by
    side. The reset gate acts on the product with the state, as in cuDNN. nnx.GRUCell keeps a random
    state, which is no parameter.

    Args:
      inputs: features of a step.
      units: of the state.
      outputs: classes.
      rngs: draws the weights.
    """

    def __init__(self, inputs: int, units: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.of_input = nnx.Linear(inputs, 3 * units, rngs=rngs)
        self.of_state = nnx.Linear(units, 3 * units, rngs=rngs)
        self.readout = nnx.Linear(units, outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps sequences (N, T, inputs) to (N, outputs)."""
        driven = self.of_input(x)
        state = jnp.zeros((len(x), self.of_state.in_features), x.dtype)
        for step in range(x.shape[1]):
            given, kept = (
                jnp.split(part, 3, axis=1) for part in (driven[:, step], self.of_state(state))
            )
            reset, stay = (nnx.sigmoid(a + b) for a, b in zip(given[:2], kept[:2], strict=True))
            state = stay * state + (1 - stay) * jnp.tanh(given[2] + reset * kept[2])
        logits: Array = self.readout(state)
        return logits


def data() -> Data:
    """Images as sequences of rows."""
    found = images(SETTINGS)
    shape = (-1, SETTINGS["rows"], SETTINGS["columns"])
    return found._replace(
        x_train=found.x_train.reshape(shape), x_held_out=found.x_held_out.reshape(shape)
    )


def model(seed: int) -> nnx.Module:
    """The recurrent net at its initial parameters."""
    columns, units, outputs = (SETTINGS[name] for name in ("columns", "units", "outputs"))
    return RowReader(columns, units, outputs, rngs=nnx.Rngs(seed))


WORKLOAD = Workload(
    name="digits-rows",
    title="Ten digits (8 x 8) row by row, GRU of 96 units, cross-entropy, batches of 64",
    version=2,
    question="Does curvature pay through the steps of a recurrent net?",
    settings=SETTINGS,
    data=data,
    model=model,
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=64,
    metric="train",
    max_steps=1500,
    max_seconds=60.0,
    expectation="Curvature should win by steps: one matrix acts at every step, so that the "
    "curvature of its directions differs by what they grow to.",
    curvature_wins=True,
)
