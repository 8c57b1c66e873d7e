"""The compiled training step of a contestant on a workload."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.workload import METRICS, Workload

# rows of the training set on which the curve of the training loss is taken, where the settings of
# a workload do not have "num_measured"
MEASURED_SAMPLES = 2000


class OptaxProgram:
    """A contestant that is an optax transformation: one jitted step, buffers donated.

    Args:
      contestant: with an ``optimizer``.
      workload: what it trains.
    """

    def __init__(self, contestant: Contestant, workload: Workload) -> None:
        assert contestant.optimizer is not None
        self._make, self._workload = contestant.optimizer, workload
        self._judged = jax.jit(contestant.judged) if contestant.judged else None
        data = workload.data()
        self._x, self._y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
        size = workload.batch_size
        batch = None if size is None else jax.ShapeDtypeStruct((size,), jnp.int32)
        state = self.start(0, 1.0)
        started = time.perf_counter()
        step = jax.jit(self._step, donate_argnums=0)
        self._compiled = step.lower(state, self._x, self._y, batch).compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def code(self) -> str:
        """The compiled step, as XLA writes it."""
        return str(self._compiled.as_text())

    def shapes_after(self, state: Any) -> Any:
        """Shapes and dtypes of a state, after a step."""
        size = self._workload.batch_size
        batch = None if size is None else jax.ShapeDtypeStruct((size,), jnp.int32)
        return jax.eval_shape(self._step, state, self._x, self._y, batch)

    def start(self, seed: int, rate: float) -> tuple[nnx.State, Any, Array]:
        """Parameters, the optimizer's state, and the learning rate."""
        model = self._workload.model(seed)
        self._graphdef, parameters = nnx.split(model)
        optimizer = self._make(self._workload, rate, seed)
        state = parameters, optimizer.init(parameters), jnp.asarray(rate, jnp.float32)
        return _copied(state)

    def _step(
        self, state: tuple[nnx.State, Any, Array], x: Array, y: Array, batch: Array | None
    ) -> tuple[nnx.State, Any, Array]:
        parameters, memory, rate = state
        if batch is not None:
            x, y = x[batch], y[batch]
        loss = partial(_objective, self._graphdef, self._workload, x, y)
        value, gradient = jax.value_and_grad(loss)(parameters)
        optimizer = optax.with_extra_args_support(self._make(self._workload, rate, 0))
        updates, memory = optimizer.update(
            gradient,
            memory,
            parameters,
            module=nnx.merge(self._graphdef, parameters),
            x=x,
            y=y,
            value=value,
            grad=gradient,
            # line searches pass on what else they were given: the batch, which the loss has
            value_fn=lambda moved, module, x, y: loss(moved),
        )
        moved: Any = optax.apply_updates(parameters, updates)
        return moved, memory, rate

    def step(
        self, state: tuple[nnx.State, Any, Array], batch: NDArray[np.integer] | None
    ) -> tuple[nnx.State, Any, Array]:
        """Dispatched, not waited for."""
        rows = None if batch is None else jnp.asarray(batch, jnp.int32)
        moved: tuple[nnx.State, Any, Array] = self._compiled(state, self._x, self._y, rows)
        return moved

    def direction(
        self, state: tuple[nnx.State, Any, Array], targets: Array, batch: NDArray[np.integer] | None
    ) -> nnx.State:
        """What a step towards other targets, of the shape of y_train, subtracts; no state moves."""
        rows = None if batch is None else jnp.asarray(batch, jnp.int32)
        moved = self._compiled(_copied(state), self._x, targets, rows)
        change: nnx.State = jax.tree.map(jnp.subtract, state[0], moved[0])
        return change

    def wait(self, state: tuple[nnx.State, Any, Array]) -> None:
        """Waits for the parameters."""
        jax.block_until_ready(state[0])

    def parameters(self, state: tuple[nnx.State, Any, Array]) -> nnx.State:
        """Those that are judged; as a rule the first of the three."""
        parameters, memory, _ = state
        if self._judged is None:
            return parameters
        judged: nnx.State = self._judged(memory, parameters)
        return judged


def _copied(state: tuple[nnx.State, Any, Array]) -> tuple[nnx.State, Any, Array]:
    # the step donates its arguments: nothing may stand in a state twice, or elsewhere too
    copied: tuple[nnx.State, Any, Array] = jax.tree.map(lambda leaf: leaf.copy(), state)
    return copied


def _objective(graphdef: Any, workload: Workload, x: Array, y: Array, parameters: Any) -> Array:
    return workload.loss(nnx.merge(graphdef, parameters)(x), y)


class Evaluation:
    """Training loss and metric of parameters, compiled once; never on the clock.

    Args:
      workload: with its held-out samples.
      validation: whether the metric is that of the samples that choose learning rates.
    """

    def __init__(self, workload: Workload, *, validation: bool = False) -> None:
        data = workload.data()
        rows = workload.settings.get("num_measured", MEASURED_SAMPLES)
        self._train = tuple(jnp.asarray(a[:rows]) for a in data[:2])
        held_out = workload.judged(validation=validation)
        self._held_out = tuple(jnp.asarray(a) for a in held_out)
        graphdef = nnx.graphdef(workload.model(0))
        metric = METRICS[workload.metric].function

        @jax.jit
        def measure(parameters: Any, train: Any, held_out: Any) -> tuple[Array, Array]:
            model = nnx.merge(graphdef, parameters)
            loss = workload.loss(model(train[0]), train[1])
            return loss, loss if metric is None else metric(model(held_out[0]), held_out[1])

        self._measure = measure

    def __call__(self, parameters: nnx.State) -> tuple[float, float]:
        """(training loss, metric)."""
        loss, judged = self._measure(parameters, self._train, self._held_out)
        return float(loss), float(judged)
