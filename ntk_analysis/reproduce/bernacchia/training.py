"""Runs for the figures: test error against examples and against seconds of training alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from natgrad_flax import MeanSquaredError

LOSS = MeanSquaredError()

State: TypeAlias = tuple[Any, Any]
"""Parameters, and what the method keeps beside them."""
Step: TypeAlias = Callable[[State, Array, Array], State]
Program: TypeAlias = Callable[[State, Array, Array, Array], State]


def natural_step(graphdef: Any, optimizer: optax.GradientTransformationExtraArgs) -> Step:
    """A step of natural gradient; beside the parameters stands the state of the optimizer."""

    def step(state: State, x: Array, y: Array) -> State:
        params, kept = state
        module = nnx.merge(graphdef, params)
        # of the updates it replaces it asks the shapes only
        moves, kept = optimizer.update(params, kept, params, module=module, x=x, y=y)
        return optax.apply_updates(params, moves), kept

    return step


def gradient_step(graphdef: Any) -> Step:
    """A step of gradient descent on the unweighted loss; beside the parameters stands its rate."""

    def step(state: State, x: Array, y: Array) -> State:
        params, rate = state
        slopes = jax.grad(lambda params: LOSS(nnx.merge(graphdef, params)(x), y))(params)
        return jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, slopes), rate

    return step


def compiled(step: Step) -> Program:
    """The program (state, rows, x, y) -> state: a step on x[rows[k]], y[rows[k]] for every k."""

    @jax.jit
    def program(state: State, rows: Array, x: Array, y: Array) -> State:
        def body(state: State, chosen: Array) -> tuple[State, None]:
            return step(state, x[chosen], y[chosen]), None

        return jax.lax.scan(body, state, rows)[0]

    return program


def batches(
    num_samples: int, batch: int, every: int, examples: int, seed: int
) -> NDArray[np.int32]:
    """Numbers of the samples of every batch; each pass has all samples in a new random order.

    Args:
      num_samples: of the training set.
      batch: size of a batch.
      every: examples between two points of a curve, a multiple of ``batch``.
      examples: of all, a multiple of ``every``.
      seed: of the orders, which do not depend on ``batch``.

    Returns:
      Shape (examples / every, every / batch, batch).

    Raises:
      ValueError: numbers that do not divide.
    """
    if every % batch or examples % every:
        raise ValueError(
            f"{examples} examples cannot be cut into {every}, and those into batches of {batch}"
        )
    rng = np.random.default_rng(seed)
    passes = math.ceil(examples / num_samples)
    order = np.concatenate([rng.permutation(num_samples) for _ in range(passes)])[:examples]
    return order.astype(np.int32).reshape(-1, every // batch, batch)


class Run:
    """A method in training, whose clock runs during its steps and never during evaluation.

    Args:
      program: from ``compiled``. It is compiled and run once here, without effect.
      error: from parameters to the test error.
      state: at the beginning.
      data: training inputs (N, n_0) and targets (N, n_L).
      order: from ``batches``; begun anew where it ends.

    Attributes:
      state: after the last step.
      examples: seen at every point of the curve, from 0.
      seconds: of training until then.
      errors: test errors; not finite after a divergence.
    """

    def __init__(
        self,
        program: Program,
        error: Callable[[Any], float],
        state: State,
        data: tuple[Array, Array],
        order: NDArray[np.int32],
    ) -> None:
        self._program, self._error, self._data, self._order = program, error, data, order
        self.state = state
        jax.block_until_ready(program(state, jnp.asarray(order[0]), *data))
        self.examples, self.seconds = [0], [0.0]
        self.errors = [error(state[0])]

    @property
    def finite(self) -> bool:
        """Whether it has not diverged."""
        return math.isfinite(self.errors[-1])

    def advance(self) -> None:
        """Trains to the next point of the curve; nothing happens after a divergence."""
        if not self.finite:
            return
        rows = jnp.asarray(self._order[(len(self.examples) - 1) % len(self._order)])
        start = time.perf_counter()
        self.state = jax.block_until_ready(self._program(self.state, rows, *self._data))
        self.seconds.append(self.seconds[-1] + time.perf_counter() - start)
        self.examples.append(self.examples[-1] + rows.size)
        self.errors.append(self._error(self.state[0]))

    def after(self, seconds: float) -> float:
        """The test error after so many seconds, between two points by a straight line."""
        return float(np.interp(seconds, self.seconds, self.errors))

    def curve(self) -> dict[str, list[float]]:
        """The three lists as a figure needs them, without the point of a divergence."""
        end = len(self.errors) if self.finite else len(self.errors) - 1
        return {
            "examples": [float(number) for number in self.examples[:end]],
            "seconds": [round(value, 6) for value in self.seconds[:end]],
            "errors": [round(value, 6) for value in self.errors[:end]],
        }
