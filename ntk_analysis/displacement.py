"""How far training moves the parameters of the linearised network."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import Residual, Signals, Structure
from natgrad_flax.arguments.scalars import as_number, check_learning_rate, check_steps
from natgrad_flax.optimizer.gradient import resolve_damping
from natgrad_flax.optimizer.trees import as_state
from natgrad_flax.signals.base import LayerUpdate, named_updates
from ntk_analysis.coefficient import Damping, check_theory_arguments, coefficient_pair
from ntk_analysis.dynamics import check_targets
from ntk_analysis.empirical import Matrix, initial_signals
from ntk_analysis.resonance import iteration_radius


def parameter_displacement(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    y: ArrayLike,
    learning_rate: float,
    steps: int | float,
    damping: Damping = 0.0,
) -> nnx.State:
    """theta_t - theta_0 of the linearised network, trained with the metric of initialisation.

    theta_t - theta_0 = -eta G_0^{-1} J_0^T / N sum_{s<t} (f_s - y). For isotropic structures it is
    (1 - (1 - alpha eta)^t) / alpha G_0^{-1} J_0^T (y - f_0) / N (Karakida & Osawa 2020, Eq. 22).
    Structures that fit the training data alike differ in it, and so outside the training data.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: any module built of layers with signals.
      x: training inputs, shape (N, ...).
      y: targets of the mean squared error, shape (N, C).
      learning_rate: eta > 0.
      steps: t, an integer of at least 0, or ``math.inf`` for the limit.
      damping: rho, added to the Fisher in the 1/N convention, or an ``ng.RelativeDamping``.

    Returns:
      A state with the tree of ``nnx.state(model, nnx.Param)`` and float64 NumPy arrays.

    Raises:
      ValueError, TypeError: bad arguments, a structure that does not suit the network, or
        steps = ``math.inf`` where the spectral radius of I - eta Theta-bar is not below 1.

    Example:
      >>> import math, jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> moved = na.parameter_displacement(
      ...     ng.Exact(), model, x, y, 0.1, steps=math.inf
      ... )
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=ng.Exact(), loss=ng.MeanSquaredError()
      ... )
      >>> u, v = (tree["layers"][0]["kernel"] for tree in (moved, step))
      >>> bool(np.allclose(u, -v, atol=1e-4))
      True
    """
    check_theory_arguments(structure, damping, "empirical")
    learning_rate = check_learning_rate(learning_rate)
    steps = steps if as_number(steps) == math.inf else check_steps(steps)
    initial = initial_signals(model, x)
    targets = check_targets(y, (initial.num_train, initial.num_outputs))
    matrix, _ = coefficient_pair(structure, initial, damping)
    total = summed_residuals(matrix, initial.outputs - targets, learning_rate, steps)
    signals = initial.train
    updates = solve_residual(structure, signals, -learning_rate * total, damping)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(model, nnx.Param))
        state = as_state(params, named_updates(signals.layers, updates))
        moved: nnx.State = jax.tree.map(np.asarray, state)
    return moved


def summed_residuals(
    coefficient_train: Matrix, residual: Matrix, learning_rate: float, steps: int | float
) -> Matrix:
    """sum_{s<t} (f_s - y) over the steps of the linearised network.

    Args:
      coefficient_train: Theta-bar(x, x), shape (N C, N C).
      residual: f_0 - y, shape (N, C).
      learning_rate: eta.
      steps: t, or ``math.inf``.

    Returns:
      Float64, shape (N, C).

    Raises:
      ValueError: t is infinite and the sum does not converge.
    """
    current = residual.reshape(-1)
    if math.isinf(steps):
        radius = iteration_radius(coefficient_train, learning_rate)
        if radius >= 1 - len(current) * np.finfo(np.float64).eps:
            raise ValueError(
                "training has no limit: the spectral radius of I - eta Theta-bar is "
                f"{radius:.6g}, and steps=math.inf needs it below 1; use a smaller learning rate, "
                "another damping, or a finite number of steps"
            )
        limit = np.linalg.solve(learning_rate * coefficient_train, current)
        return np.asarray(limit, np.float64).reshape(residual.shape)
    total = np.zeros_like(current)
    for _ in range(int(steps)):
        total += current
        current = current - learning_rate * (coefficient_train @ current)
    return total.reshape(residual.shape)


def solve_residual(
    structure: Structure, signals: Signals, residual: Matrix, damping: Damping = 0.0
) -> tuple[LayerUpdate, ...]:
    """G^{-1} J^T r / N in float64, one update a layer in the order of the signals.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      signals: float64 signals of the plain outputs on the N training samples.
      residual: r, shape (N, C).
      damping: as in ``parameter_displacement``.
    """
    with jax.enable_x64(True):
        rho = resolve_damping(structure, signals, damping)
        return structure.solve(signals, Residual(jnp.asarray(residual), None), rho)
