"""Training curves predicted from the kernels at initialisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import Loss, MeanSquaredError, Structure
from natgrad_flax.arguments.arrays import check_concrete, real_array
from natgrad_flax.arguments.scalars import check_learning_rate, check_steps
from natgrad_flax.linear.descent import check_memory
from ntk_analysis.coefficient import (
    Damping,
    Kernels,
    analytic_coefficients,
    check_theory_arguments,
    coefficient_pair,
)
from ntk_analysis.empirical import Matrix, initial_signals
from ntk_analysis.resonance import warn_of_resonance


@dataclass(frozen=True, eq=False)
class LinearisedDynamics:
    """Outputs of the linearised network at every step, all float64.

    Attributes:
      outputs_train: f_t(x), shape (steps + 1, N, C); the first entry is the network's own output.
      outputs_test: f_t(x'), shape (steps + 1, N', C), or None without test inputs.
      targets_train: y, shape (N, C).

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> settings = {"learning_rate": 0.5, "steps": 3, "x_test": jnp.ones((2, 4))}
      >>> found = na.predict_dynamics(ng.Exact(), model, x, y, **settings)
      >>> found.outputs_train.shape, found.outputs_test.shape
      ((4, 4, 1), (4, 2, 1))
    """

    outputs_train: Matrix
    outputs_test: Matrix | None
    targets_train: Matrix

    @property
    def train_losses(self) -> Matrix:
        """1/(2N) sum |f_t - y|^2 after each step, shape (steps + 1,)."""
        return squared_losses(self.outputs_train, self.targets_train)

    def test_losses(self, targets: ArrayLike) -> Matrix:
        """1/(2N') sum |f_t(x') - y'|^2 after each step, shape (steps + 1,).

        Args:
          targets: y', shape (N', C).

        Raises:
          ValueError: there are no test outputs, or the shape is wrong.
        """
        if self.outputs_test is None:
            raise ValueError("no test outputs were predicted: pass x_test to predict_dynamics")
        return squared_losses(self.outputs_test, targets)


def predict_dynamics(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    y: ArrayLike,
    learning_rate: float,
    steps: int,
    damping: Damping = 0.0,
    x_test: ArrayLike | None = None,
    kernels: Kernels = "empirical",
    *,
    loss: Loss | None = None,
) -> LinearisedDynamics:
    """Training of the linearised network with a fixed metric, step by step and exactly.

    With the coefficient matrix at initialisation, damping included,
    f_{t+1}(x) - y = (I - eta Theta-bar(x, x)) (f_t(x) - y) and
    f_{t+1}(x') = f_t(x') - eta Theta-bar(x', x) (f_t(x) - y). For gradient descent these are the
    dynamics of Karakida & Osawa (2020), Eq. 5; for an isotropic Fisher they shrink the residual by
    1 - c per step at eta = c / alpha (Corollary 4.2).

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: any module built of layers with signals.
      x: training inputs, shape (N, ...).
      y: targets, shape (N, C).
      learning_rate: eta > 0.
      steps: number of steps, at least 0.
      damping: rho, added to the Fisher in the 1/N convention, or an ``ng.RelativeDamping``.
      x_test: test inputs, shape (N', ...).
      kernels: "empirical", those of this model, or "analytic", those of its infinite-width limit;
        f_0 is the model's own output in both cases.
      loss: the mean squared error, the only one whose linearised dynamics are linear.

    Raises:
      ValueError, TypeError: bad arguments, or a structure that does not suit the network.

    Warns:
      ResonanceWarning: a positive damping lies among the resonances of an indefinite coupling
        (``resonance_window``); not looked for where L N C exceeds 3000.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> found = na.predict_dynamics(
      ...     ng.Exact(), model, x, y, learning_rate=0.5, steps=3
      ... )
      >>> # (1 - eta)^2 a step
      >>> print((found.train_losses / found.train_losses[0]).round(4))
      [1.     0.25   0.0625 0.0156]
    """
    if loss is not None and not isinstance(loss, MeanSquaredError):
        raise ValueError(
            f"training curves are predicted for the mean squared error only, got {loss!r}"
        )
    check_theory_arguments(structure, damping, kernels)
    learning_rate, steps = check_learning_rate(learning_rate), check_steps(steps)
    signals = initial_signals(model, x, x_test)
    targets = check_targets(y, (signals.num_train, signals.num_outputs))
    shape = (steps + 1, *signals.outputs.shape)
    check_memory(shape, np.float64, "the outputs at every step", "take fewer steps")
    if kernels == "analytic":
        *outside, train = analytic_coefficients(structure, model, x, x_test, damping)
        test = outside[0] if outside else np.zeros((0, len(train)))
    else:
        train, test = coefficient_pair(structure, signals, damping)
    warn_of_resonance(structure, signals.train, damping)
    return linearised_dynamics(train, test, signals.outputs, targets, learning_rate, steps)


def linearised_dynamics(
    coefficient_train: Matrix,
    coefficient_test: Matrix,
    outputs: Matrix,
    targets: Matrix,
    learning_rate: float,
    steps: int,
) -> LinearisedDynamics:
    """As ``predict_dynamics``, from matrices that are at hand.

    Args:
      coefficient_train: Theta-bar(x, x), shape (N C, N C).
      coefficient_test: Theta-bar(x', x), shape (N' C, N C); N' may be 0.
      outputs: f_0 on training, then test samples, shape (N + N', C).
      targets: y, shape (N, C).
      learning_rate: eta.
      steps: number of steps.
    """
    n, c = targets.shape
    inside = np.empty((steps + 1, n, c))
    outside = np.empty((steps + 1, len(outputs) - n, c))
    inside[0], outside[0] = outputs[:n], outputs[n:]
    residual = (outputs[:n] - targets).reshape(-1)
    # a learning rate above its bound diverges, in theory too
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps):
            outside[t + 1] = outside[t] - learning_rate * (coefficient_test @ residual).reshape(
                -1, c
            )
            residual = residual - learning_rate * (coefficient_train @ residual)
            inside[t + 1] = residual.reshape(n, c) + targets
    return LinearisedDynamics(inside, outside if len(outputs) > n else None, targets)


def squared_losses(outputs: ArrayLike, targets: ArrayLike) -> Matrix:
    """1/(2N) sum_n |f_t(x_n) - y_n|^2 for outputs (T, N, C) and targets (N, C), shape (T,).

    Raises:
      ValueError: the shapes do not fit.
    """
    values, wanted = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if values.ndim != 3 or values.shape[1:] != wanted.shape:
        raise ValueError(
            f"targets must have shape {values.shape[1:]} for outputs of {values.shape}, got "
            f"{wanted.shape}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        result: Matrix = np.sum((values - wanted) ** 2, axis=(1, 2)) / (2 * len(wanted))
    return result


def check_targets(y: ArrayLike, shape: tuple[int, int]) -> Matrix:
    """Targets as a float64 array.

    Args:
      y: the targets.
      shape: (N, C).

    Raises:
      ValueError: another shape, NaN or infinite entries.
      TypeError: no real numbers.
    """
    check_concrete(y, "y")
    targets = real_array(y, "y")
    if targets.shape != shape:
        raise ValueError(f"y must have shape (N, C) = {shape}, got {targets.shape}")
    if not np.isfinite(targets).all():
        raise ValueError("y has NaN or infinite entries")
    return targets
