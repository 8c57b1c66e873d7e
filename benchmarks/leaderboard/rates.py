"""The learning rate that theory gives a natural-gradient contestant on a workload."""

from __future__ import annotations

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.natural import fisher_on
from benchmarks.leaderboard.workload import Workload

ITERATIONS = 20
"""Of the power method, a natural gradient each; lambda_max comes out some percent too small."""


class TheoreticalRate:
    """The rule of a contestant on a workload, for every seed.

    1/alpha where the sizes make the structure isotropic, which costs nothing (Karakida & Osawa
    2020, Corollary 4.2); else 1/lambda_max at the initial parameters on the first batch.

    Args:
      contestant: with a Fisher structure.
      workload: its model at seed 0 gives the sizes.

    Attributes:
      note: the rule in words.
      compile_seconds: of the program of lambda_max, where it is needed.

    Raises:
      ValueError: the contestant has no Fisher structure.
    """

    def __init__(self, contestant: Contestant, workload: Workload) -> None:
        if contestant.structure is None:
            raise ValueError(
                f"{contestant.name} has no Fisher structure: theory has no rate for it"
            )
        self.compile_seconds, self._known = 0.0, 0.0
        data, model = workload.data(), workload.model(0)
        size = workload.batch_size or len(data.x_train)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ng.IsotropyWarning)
                self._known = ng.optimal_learning_rate(contestant.structure, model, size)
            self.note = "1/alpha"
            return
        except (ValueError, ng.IsotropyWarning):
            self.note = "1/lambda_max on the first batch"
        self._x = jnp.asarray(data.x_train[:size])
        started = time.perf_counter()
        program = eigenvalue_program(contestant, workload, model, ITERATIONS)
        self._eigenvalue = program.lower(nnx.state(model), self._x).compile()
        self.compile_seconds = time.perf_counter() - started

    def __call__(self, model: nnx.Module) -> float:
        """The rate at the initial parameters of a model."""
        return self._known or float(1 / self._eigenvalue(nnx.state(model), self._x))


def eigenvalue_program(
    contestant: Contestant, workload: Workload, model: nnx.Module, iterations: int
) -> Any:
    """A jitted function (parameters, inputs) -> lambda_max of H J G^{-1} J^T / N at these inputs.

    Its inverse is the best constant learning rate of the linearised network. By power iteration
    with the steps themselves: whatever a contestant can train on, with its own Fisher and damping
    (an adaptive one at its least), and without the N C x N C matrix.

    Args:
      contestant: one with a Fisher structure.
      workload: its loss counts.
      model: gives the graph.
      iterations: each costs one natural gradient.
    """
    assert contestant.structure is not None
    assert contestant.fisher is not None
    structure, loss = contestant.structure, workload.loss
    fisher = fisher_on(workload, contestant.fisher)
    own = contestant.damping
    damping = own.minimum if isinstance(own, ng.LevenbergMarquardt) else own or 0.0
    graphdef = nnx.graphdef(model)

    def run(state: nnx.State, x: Array) -> Array:
        def outputs(state: nnx.State) -> Array:
            values: Array = nnx.merge(graphdef, state)(x)
            return values

        f = outputs(state)
        curvature = loss.fisher(f)
        mean = jax.nn.softmax(f) if isinstance(loss, ng.SoftmaxCrossEntropy) else f

        def apply(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # targets whose residual is the vector
            direction = ng.natural_gradient(
                nnx.merge(graphdef, state),
                x,
                mean - carry[0],
                structure=structure,
                loss=loss,
                damping=damping,
                fisher=fisher,
                key=jax.random.key(0),
            )
            change = jax.jvp(outputs, (state,), (direction,))[1]
            image = jnp.einsum("ncd,nd->nc", curvature, change)
            length = jnp.linalg.norm(image)
            return image / length, length

        drawn = jax.random.normal(jax.random.key(1), f.shape)
        vector = jnp.einsum("ncd,nd->nc", curvature, drawn)
        start = vector / jnp.linalg.norm(vector), jnp.zeros(())
        return jax.lax.fori_loop(0, iterations, apply, start)[1]

    return jax.jit(run)
