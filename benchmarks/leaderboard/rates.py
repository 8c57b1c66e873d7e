"""The learning rate that theory gives a natural-gradient contestant on a workload."""

from __future__ import annotations

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.gradient import model_geometry, resolve_damping

# outputs N C up to which the spectrum of the coefficient matrix is a matter of a second
MATRIX_SIDE = 1024


class TheoreticalRate:
    """The rule of a contestant on a workload, for every seed.

    1/alpha where the sizes make the structure isotropic, which costs nothing (Karakida & Osawa
    2020, Corollary 4.2); else 1/lambda_max of the coefficient matrix on the first batch, where that
    is small enough or there is no alpha; else 1/alpha all the same.

    Args:
      contestant: with a Fisher structure.
      workload: its model at seed 0 gives the sizes.

    Attributes:
      compile_seconds: of the program of the coefficient matrix, where one is needed.

    Raises:
      ValueError: the contestant has no Fisher structure.
    """

    def __init__(self, contestant: Contestant, workload: Workload) -> None:
        structure = contestant.structure
        if structure is None:
            raise ValueError(
                f"{contestant.name} has no Fisher structure: theory has no rate for it"
            )
        self.compile_seconds, self._known = 0.0, 0.0
        data, model = workload.data(), workload.model(0)
        size = workload.batch_size or len(data.x_train)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ng.IsotropyWarning)
                self._known = ng.optimal_learning_rate(structure, model, size)
            self.note = "1/alpha"
            return
        except (ValueError, ng.IsotropyWarning) as error:
            failed = str(error)
        alpha = _alpha(structure, model, size)
        rows = min(size, max(1, MATRIX_SIDE // data.y_train.shape[1]))
        if rows < size and alpha is not None:
            self._known = 1 / alpha
            self.note = f"1/alpha, though {failed.split('; ')[0].split(': ', 1)[-1]}"
            return
        where = "the first batch" if rows == size else f"{rows} samples of the first batch"
        self.note = f"1/lambda_max on {where}"
        # an adapted damping starts where it likes: the rate is the undamped one
        damping = contestant.damping
        fixed = 0.0 if damping is None or isinstance(damping, ng.LevenbergMarquardt) else damping
        self._x = jnp.asarray(data.x_train[:rows])
        started = time.perf_counter()
        graphdef, state = nnx.split(model)

        def matrix(state: Any, x: Array) -> Array:
            signals = ng.jacobian_signals(nnx.merge(graphdef, state), x)
            rho = resolve_damping(structure, signals, fixed)
            return structure.coefficient(signals, signals, rho)

        self._matrix = jax.jit(matrix).lower(state, self._x).compile()
        self.compile_seconds = time.perf_counter() - started

    def __call__(self, model: nnx.Module) -> float:
        """The rate at the initial parameters of a model."""
        if self._known:
            return self._known
        matrix = np.asarray(self._matrix(nnx.state(model), self._x))
        # symmetric up to rounding, but for couplings of layers, whose spectrum is real all the same
        symmetric = np.allclose(matrix, matrix.T, rtol=0, atol=1e-3 * np.abs(matrix).max())
        values = np.linalg.eigvalsh(matrix) if symmetric else np.linalg.eigvals(matrix).real
        return float(1 / values.max())


def _alpha(structure: ng.Structure, model: nnx.Module, size: int) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.IsotropyWarning)
        try:
            return structure.alpha(model_geometry(model, size))
        except ValueError:
            return None
