"""Training of a finite network with one structure, compiled once."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from natgrad_flax import MeanSquaredError, Structure, natural_gradient
from ntk_analysis.coefficient import Damping
from ntk_analysis.empirical import Matrix


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """What a network did.

    Attributes:
      outputs_train: f_t(x), shape (steps + 1, N, C).
      outputs_test: f_t(x'), shape (steps + 1, N', C).
      seconds_per_step: median wall time of a step, without compilation and evaluation; None for
        no steps.
    """

    outputs_train: Matrix
    outputs_test: Matrix
    seconds_per_step: float | None


class Trainer:
    """Full-batch training with the mean squared error, always from the same initial parameters.

    Args:
      model: the network; it is not changed.
      structure: the Fisher approximation, or ``GradientDescent()``.
      x_train: inputs, shape (N, ...), in the precision of the model.
      y_train: targets, shape (N, C).
      x_test: test inputs, shape (N', ...).
      damping: rho in the 1/N convention, or an ``ng.RelativeDamping``.
    """

    def __init__(
        self,
        model: nnx.Module,
        structure: Structure,
        x_train: ArrayLike,
        y_train: ArrayLike,
        x_test: ArrayLike,
        damping: Damping = 0.0,
    ) -> None:
        self._begin_with(model, x_train, y_train, x_test)
        graphdef, loss = nnx.graphdef(model), MeanSquaredError()

        def step(state: nnx.State, x: Array, y: Array, rate: Array) -> nnx.State:
            current = nnx.merge(graphdef, state)
            update = natural_gradient(
                current, x, y, structure=structure, loss=loss, damping=damping
            )
            params = nnx.state(current, nnx.Param)
            nnx.update(current, jax.tree.map(lambda p, u: p - rate * u, params, update))
            return nnx.state(current)

        def forward(state: nnx.State, x: Array) -> Array:
            return nnx.merge(graphdef, state)(x)

        began = time.perf_counter()
        rate = jnp.ones((), self._x.dtype)
        self._step = jax.jit(step).lower(self._initial, self._x, self._y, rate).compile()
        self.compile_seconds = time.perf_counter() - began
        self._forward = jax.jit(forward)

    def beginning_with(
        self, model: nnx.Module, x_train: ArrayLike, y_train: ArrayLike, x_test: ArrayLike
    ) -> Trainer:
        """The same programs on other parameters and samples, all of the shapes they were before.

        Args:
          model: of the same architecture.
          x_train: as above, and so are the others.
          y_train: targets.
          x_test: test inputs.
        """
        other = copy.copy(self)
        other._begin_with(model, x_train, y_train, x_test)
        return other

    def _begin_with(
        self, model: nnx.Module, x_train: ArrayLike, y_train: ArrayLike, x_test: ArrayLike
    ) -> None:
        self._initial = nnx.state(model)
        self._x, self._y = jnp.asarray(x_train), jnp.asarray(y_train)
        self._inputs = jnp.concatenate([self._x, jnp.asarray(x_test)])

    def run(
        self, learning_rate: float, steps: int, on_step: Callable[[], object] | None = None
    ) -> TrainingRun:
        """Trains and evaluates before the first and after each step.

        Args:
          learning_rate: eta.
          steps: number of steps.
          on_step: called after each step.
        """
        state, seconds = self._initial, []
        rate = jnp.asarray(learning_rate, self._x.dtype)
        outputs = [np.asarray(self._forward(state, self._inputs), np.float64)]
        for _ in range(steps):
            began = time.perf_counter()
            state = jax.block_until_ready(self._step(state, self._x, self._y, rate))
            seconds.append(time.perf_counter() - began)
            outputs.append(np.asarray(self._forward(state, self._inputs), np.float64))
            if on_step:
                on_step()
        history, n = np.stack(outputs), len(self._x)
        median = statistics.median(seconds) if seconds else None
        return TrainingRun(history[:, :n], history[:, n:], median)
