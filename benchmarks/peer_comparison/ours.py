"""natgrad's side: the same quantities from its own structures, and the jitted step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.peer_comparison import exchange
from benchmarks.peer_comparison.examples import Example, as_problem, layers_of
from natgrad_flax.signals.fisher import FisherKind
from natgrad_flax.structures import NAMED

RATE = 1e-3
"""Learning rate of the timed steps."""

KFAC = ng.KFAC(last_layer="literal", split="pi")
"""B* of the last layer as of every other, and the damping of Martens & Grosse (2015)."""

STRUCTURES: dict[str, ng.Structure] = {
    "fisher": ng.Exact(),
    **{cls.style.command: cls() for cls in NAMED},
    "kfac": KFAC,
    "kfac-reduce": replace(KFAC, sharing="reduce"),
}
"""Structures by the names of quantities, which those of the peers are compared with."""


class Side:
    """The quantities of an example.

    Args:
      example: model and batch.

    Attributes:
      problem: the example as arrays.
    """

    def __init__(self, example: Example) -> None:
        self._example, self.problem = example, as_problem(example)
        self._found: dict[str, exchange.Array] = {}
        self._graphdef, self._state = nnx.split(example.model)
        self._signals = jax.jit(self._of_fisher, static_argnames="fisher")

    def quantity(self, name: str) -> exchange.Array:
        """A matrix or vector, in the order of ``exchange``.

        Args:
          name: "gradient", "STRUCTURE/FISHER" for an undamped matrix, or "step/STRUCTURE/FISHER"
            for the natural gradient; FISHER is "exact", "empirical" or "mc".
        """
        if name not in self._found:
            self._found[name] = self._quantity(name)
        return self._found[name]

    def _quantity(self, name: str) -> exchange.Array:
        if name == "gradient":
            return self._vector(jax.jit(jax.grad(self._loss))(self._state))
        kind, _, fisher = name.rpartition("/")
        structure = STRUCTURES[kind.removeprefix("step/")]
        if kind.startswith("step/"):
            return self._vector(self._direction(structure, fisher))
        # the Monte-Carlo Fisher of given draws is the empirical one of these targets
        targets = jnp.asarray(self.problem.drawn) if fisher == "mc" else self._example.y
        which = "exact" if fisher == "exact" else "empirical"
        signals = self._signals(self._state, self._example.x, targets, fisher=which)
        matrix = np.asarray(structure.to_dense(signals))
        if kind == "diagonal":
            return np.diagonal(matrix)
        return matrix * self._kept() if kind == "quasi-diagonal" else matrix

    def _loss(self, state: nnx.State) -> Array:
        outputs = nnx.merge(self._graphdef, state)(self._example.x)
        return self._example.loss(outputs, self._example.y)

    def _of_fisher(self, state: nnx.State, x: Array, y: Array, fisher: FisherKind) -> Any:
        model = nnx.merge(self._graphdef, state)
        return ng.fisher_signals(model, x, y, loss=self._example.loss, fisher=fisher)[0]

    def _direction(self, structure: ng.Structure, fisher: Any) -> nnx.State:
        example = self._example
        return ng.natural_gradient(
            example.model,
            example.x,
            example.y,
            structure=structure,
            loss=example.loss,
            damping=example.damping,
            fisher=fisher,
            key=example.key,
        )

    def _vector(self, state: Any) -> exchange.Array:
        """A state with the tree of the parameters as one vector."""
        parts = []
        for layer in layers_of(nnx.merge(self._graphdef, state)):
            parts.append(np.asarray(layer.kernel[...]).reshape(-1))
            if layer.bias is not None:
                parts.append(np.asarray(layer.bias[...]))
        return np.concatenate(parts)

    def _kept(self) -> exchange.Array:
        """Where the quasi-diagonal matrix is the Fisher's: the diagonal, and rows of biases."""
        is_bias = np.concatenate(
            [np.arange(layer.num_params) >= layer.kernel.size for layer in self.problem.layers]
        )
        return np.eye(len(is_bias), dtype=bool) | is_bias[:, None] | is_bias


class Training:
    """K-FAC in training, by one jitted step.

    Args:
      example: where it starts.

    Attributes:
      state: the parameters.
    """

    def __init__(self, example: Example) -> None:
        graphdef, self.state = nnx.split(example.model)
        self._steps = 0

        @jax.jit
        def step(state: nnx.State, x: Array, y: Array, count: int) -> nnx.State:
            direction = ng.natural_gradient(
                nnx.merge(graphdef, state),
                x,
                y,
                structure=KFAC,
                loss=example.loss,
                damping=example.damping,
                fisher="mc",
                key=jax.random.fold_in(example.key, count),
            )
            return jax.tree.map(lambda leaf, slope: leaf - RATE * slope, state, direction)

        self._step, self._batch = step, (example.x, example.y)

    def step(self) -> None:
        """One step from where the last one ended, over when it returns."""
        self.state = jax.block_until_ready(self._step(self.state, *self._batch, self._steps))
        self._steps += 1
