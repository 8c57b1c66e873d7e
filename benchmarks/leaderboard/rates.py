"""The learning rate that theory gives a natural-gradient contestant on a workload."""

from __future__ import annotations

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.natural import damping_on
from benchmarks.leaderboard.program import OptaxProgram
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.optimizer.spectrum import rate_of_largest

ITERATIONS = 20
"""Of the power method, a training step each; lambda_max comes out some percent too small."""


class TheoreticalRate:
    """The rule of a contestant on a workload, for every seed.

    1/alpha where the sizes make the structure isotropic, which costs nothing (Karakida & Osawa
    2020, Corollary 4.2); else, and for networks whose sizes no theory knows, 1/lambda_max at the
    initial parameters on the first batch.

    Args:
      contestant: with a Fisher structure.
      workload: its model at seed 0 gives the sizes.
      program: the compiled step of the two.

    Attributes:
      note: the rule in words.
      compile_seconds: of what lambda_max needs beyond the step.

    Raises:
      ValueError: the contestant has no Fisher structure.
    """

    def __init__(self, contestant: Contestant, workload: Workload, program: OptaxProgram) -> None:
        if contestant.structure is None:
            raise ValueError(
                f"{contestant.name} has no Fisher structure: theory has no rate for it"
            )
        self.compile_seconds, self._known = 0.0, 0.0
        self._name = contestant.name
        data, model = workload.data(), workload.model(0)
        size = workload.batch_size or len(data.x_train)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ng.IsotropyWarning)
                self._known = ng.optimal_learning_rate(contestant.structure, model, size)
            self.note = "1/alpha"
            return
        # a TypeError: layers of which sizes alone say nothing
        except (ValueError, TypeError, ng.IsotropyWarning):
            self.note = "1/lambda_max on the first batch"
        self._method = PowerMethod(contestant, workload, program)
        self.compile_seconds = self._method.compile_seconds

    def __call__(self, seed: int) -> float:
        """The rate at the initial parameters of a seed.

        Raises:
          ValueError: no step moves the outputs.
        """
        return self._known or rate_of_largest(self._method(seed, ITERATIONS), self._name)


class PowerMethod:
    """lambda_max of H J G^{-1} J^T / N on the first batch, by the training step itself.

    Its inverse is the best constant learning rate of the linearised network. A step at learning
    rate 1 towards targets that lie v away from the outputs moves the parameters by G^{-1} J^T v /
    N: whatever a contestant can train on has an eigenvalue, with its own Fisher and damping (an
    adaptive one at its least), without the N C x N C matrix and without another program.

    Args:
      contestant: one with a Fisher structure.
      workload: its loss counts.
      program: the compiled step of the two.

    Attributes:
      compile_seconds: of the change of the outputs with the parameters.
    """

    def __init__(self, contestant: Contestant, workload: Workload, program: OptaxProgram) -> None:
        assert contestant.damping is not None
        self._workload, self._program = workload, program
        self._damping = damping_on(workload, contestant.damping)
        self._y, size = workload.data().y_train, workload.batch_size
        self._rows = None if size is None else np.arange(size)
        x = jnp.asarray(workload.data().x_train[:size])
        graphdef, parameters = nnx.split(workload.model(0))
        loss = workload.loss

        @jax.jit
        def image(parameters: nnx.State, change: nnx.State, x: Array) -> tuple[Array, Array]:
            def outputs(state: nnx.State) -> Array:
                values: Array = nnx.merge(graphdef, state)(x)
                return values

            f, moved = jax.jvp(outputs, (parameters,), (change,))
            mean = jax.nn.softmax(f) if isinstance(loss, ng.SoftmaxCrossEntropy) else f
            return mean, jnp.einsum("ncd,nd->nc", loss.fisher(f), moved)

        started = time.perf_counter()
        compiled = image.lower(parameters, parameters, x).compile()
        self.compile_seconds = time.perf_counter() - started
        self._image = lambda parameters, change: compiled(parameters, change, x)

    def __call__(self, seed: int, iterations: int) -> float:
        """lambda_max at the initial parameters of a seed, after some iterations."""
        state = self._program.start(seed, 1.0)
        parameters, memory, rate = state
        if isinstance(self._damping, ng.LevenbergMarquardt):
            least = jnp.asarray(self._damping.minimum, memory.damping.dtype)
            memory = memory._replace(damping=least)
        length = float(optax.tree.norm(parameters))
        rng = np.random.default_rng(0)
        # a random change of the parameters gives a residual in the range of the curvature
        change: Any = jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), parameters
        )
        mean, residual = self._image(parameters, change)
        eigenvalue, scale = 0.0, 1.0
        for _ in range(iterations):
            targets = self._targets(mean - scale * residual / jnp.linalg.norm(residual))
            change = self._program.direction((parameters, memory, rate), targets, self._rows)
            residual = self._image(parameters, change)[1]
            eigenvalue = float(jnp.linalg.norm(residual)) / scale
            # a change as long as the parameters loses the least digits in their difference
            scale *= length / max(float(optax.tree.norm(change)), 1e-30)
        return eigenvalue

    def _targets(self, batch: Array) -> Array:
        if self._rows is None:
            return batch
        return jnp.asarray(self._y).at[self._rows].set(batch)
