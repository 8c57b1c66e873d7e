"""Where training ends: f_infinity on test data, and its law over random initialisations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import Signals, Structure
from natgrad_flax.arguments.scalars import check_integer, check_number, check_seed
from natgrad_flax.damping import is_zero
from natgrad_flax.optimizer.gradient import resolve_damping
from ntk_analysis.analytic import Progress, analytic_inputs, analytic_kernels
from ntk_analysis.analytic_signals import check_limit, check_shared_weights
from ntk_analysis.coefficient import (
    Damping,
    Kernels,
    analytic_signals,
    check_coefficient_fits,
    check_theory_arguments,
    coefficient_pair,
)
from ntk_analysis.dynamics import check_targets
from ntk_analysis.empirical import Matrix, initial_signals
from ntk_analysis.infinite_width import num_outputs, require_limit
from ntk_analysis.prior import initial_outputs, prior_variances
from ntk_analysis.symmetric import symmetric_solve

Covariance = Literal["none", "variance", "full"]
_QUADRATURE = 64


@dataclass(frozen=True, eq=False)
class Prediction:
    """The outputs f_infinity on test inputs to which training converges; everything float64.

    Attributes:
      mean: shape (N', C). With analytic kernels the mean over random initialisations, otherwise
        f_infinity of the model itself.
      variance: of each test output over initialisations, the same for all C, shape (N',), or None.
      covariance: between test inputs, the same for all C, shape (N', N'), or None.
      samples: f_infinity for each drawn initialisation, shape (S, N', C), or None.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> found = na.predict(ng.Exact(), model, x, y, x, kernels="empirical")
      >>> found.mean.round(3).ravel().tolist(), found.variance
      ([1.0, 1.0, 1.0, 1.0], None)
    """

    mean: Matrix
    variance: Matrix | None = None
    covariance: Matrix | None = None
    samples: Matrix | None = None

    def accuracy(self, targets: ArrayLike) -> float:
        """The share of test samples that the mean classifies rightly.

        Args:
          targets: y', shape (N', C): one-hot, or for one output the sign of the class.

        Raises:
          ValueError: the shape is wrong.
        """
        return float(np.mean(_right(self.mean, check_targets(targets, self.mean.shape))))

    def sampled_accuracies(self, targets: ArrayLike) -> Matrix:
        """The accuracy for each drawn initialisation, shape (S,).

        Raises:
          ValueError: no initialisations were drawn, or the shape is wrong.
        """
        if self.samples is None:
            raise ValueError("no initialisations were drawn: pass initialisations= to predict")
        wanted = check_targets(targets, self.mean.shape)
        return np.array([np.mean(_right(sample, wanted)) for sample in self.samples])

    def expected_accuracy(self, targets: ArrayLike) -> float:
        """The mean accuracy over initialisations, in closed form up to a quadrature.

        Outputs are independent Gaussians with the variance of their test input, so the right one
        of C wins with probability E_z prod_k Phi((m - m_k) / s + z).

        Raises:
          ValueError: the variance was not computed, or the shape is wrong.
        """
        if self.variance is None:
            raise ValueError('no variance was computed: pass covariance="variance" to predict')
        # SciPy takes a third of a second to import, and few programs come here
        import scipy.special

        wanted = check_targets(targets, self.mean.shape)
        scale = np.sqrt(np.maximum(self.variance, 1e-300))
        if wanted.shape[1] == 1:
            margin = self.mean[:, 0] * np.sign(wanted[:, 0]) / scale
            return float(np.mean(scipy.special.ndtr(margin)))
        nodes, weights = scipy.special.roots_hermitenorm(_QUADRATURE)
        right = np.argmax(wanted, axis=1)
        margins = (self.mean[np.arange(len(right)), right][:, None] - self.mean) / scale[:, None]
        others = np.arange(wanted.shape[1]) != right[:, None]
        logs = scipy.special.log_ndtr(margins[None] + nodes[:, None, None])
        wins = np.exp(np.sum(np.where(others[None], logs, 0), axis=2))
        return float(np.mean(weights @ wins) / weights.sum())


def predict(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    y: ArrayLike,
    x_test: ArrayLike,
    *,
    damping: Damping = 0.0,
    ridge: float = 0.0,
    kernels: Kernels = "analytic",
    covariance: Covariance = "none",
    initialisations: int = 0,
    seed: int = 0,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Prediction:
    """The outputs to which training with the mean squared error converges.

    f_inf(x') = Theta-bar(x', x) (Theta-bar(x, x) + lambda)^{-1} (y - f_0(x)) + f_0(x'), which for
    an isotropic structure without ridge is alpha^{-1} Theta-bar(x', x) (y - f_0(x)) + f_0(x')
    (Karakida & Osawa 2020, Section 5.3). At infinite width f_0 is a Gaussian process with the
    kernel K (NNGP), so that f_inf has the mean K^ y and the covariance
    K'' - K^ K - K K^^T + K^ K K^^T with K^ = Theta-bar(x', x) (Theta-bar(x, x) + lambda)^{-1}.
    Where Theta-bar(x, x) is singular (samples twice, more outputs than parameters) the
    pseudo-inverse is meant: training leaves what no step can move.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``, whose limit is that of Exact.
      model: any model with signals; with analytic kernels an ``ng.MLP`` or an ``ng.ConvNet``,
        whose parameters do not matter.
      x: training inputs, shape (N, ...).
      y: targets, shape (N, C).
      x_test: test inputs, shape (N', ...).
      damping: rho in the 1/N convention, or an ``ng.RelativeDamping``.
      ridge: lambda >= 0. It penalises with lambda/2 (theta - theta_0)^T G (theta - theta_0); with
        ``GradientDescent()`` this is kernel ridge regression with the kernel Theta = K / N.
      kernels: "analytic" or "empirical".
      covariance: "none", "variance" or "full", over initialisations; analytic kernels only.
      initialisations: how many f_0 to draw, each from a network of the model's own widths;
        analytic kernels only.
      seed: of the first of them; the others follow.
      store: see ``analytic_kernels``.
      progress: told about finished blocks of kernels.

    Raises:
      ValueError, TypeError: bad arguments, a structure without a limit at test inputs, or arrays
        that cannot fit in memory.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> x_test = jnp.concatenate([x, jnp.ones((1, 4))])
      >>> found = na.predict(ng.Exact(), model, x, y, x_test, covariance="variance")
      >>> found.mean.shape, bool(np.allclose(found.mean[:4], y))
      ((5, 1), True)
      >>> bool(found.variance[:4].max() < 1e-6), bool(found.variance[4] > 0.1)
      (True, True)
    """
    check_theory_arguments(structure, damping, kernels)
    ridge = check_number("ridge", ridge, positive=False)
    if covariance not in get_args(Covariance):
        raise ValueError(f"covariance must be none, variance or full, got {covariance!r}")
    initialisations = check_integer("initialisations", initialisations, 0)
    seed = check_seed(seed, draws=max(1, initialisations))
    if kernels == "empirical":
        if covariance != "none" or initialisations:
            raise ValueError(
                "empirical kernels belong to one initialisation: covariance and initialisations "
                'need kernels="analytic"'
            )
        return _predict_empirical(structure, model, x, y, x_test, damping, ridge)
    check_limit(structure, True, damping)
    check_shared_weights(structure, model)
    inside = analytic_inputs(x, model, "x")
    outside = analytic_inputs(x_test, model, "x_test")
    outputs = num_outputs(require_limit(model))
    targets = check_targets(y, (len(inside), outputs))
    train, test = analytic_signals(
        structure, model, inside, outside, store=store, progress=progress
    )
    assert test is not None
    drawn = None
    if initialisations:
        seeds = range(seed, seed + initialisations)
        drawn = initial_outputs(model, np.concatenate([inside, outside]), seeds)
    prediction = predict_from_signals(
        structure, train, test, targets, damping=damping, ridge=ridge, initial=drawn
    )
    if covariance == "none":
        return prediction
    inner, cross = (
        analytic_kernels(model, a, inside, parts=("nngp",), store=store, progress=progress).nngp
        for a in (inside, outside)
    )
    matrix = prediction_matrix(structure, train, test, damping=damping, ridge=ridge)
    if covariance == "variance":
        variance = propagated(matrix, inner, cross, prior_variances(model, outside))
        return Prediction(prediction.mean, variance, None, prediction.samples)
    outer = analytic_kernels(model, outside, parts=("nngp",), progress=progress).nngp
    full = propagated(matrix, inner, cross, outer)
    return Prediction(prediction.mean, np.diagonal(full).copy(), full, prediction.samples)


def propagated(matrix: Matrix, inner: Matrix, cross: Matrix, outer: Matrix) -> Matrix:
    """K'' - K^ K - K K^^T + K^ K K^^T, the covariance of f_inf, or its diagonal.

    Args:
      matrix: K^, shape (N', N).
      inner: the NNGP kernel on training inputs, shape (N, N).
      cross: between test and training inputs, shape (N', N).
      outer: on test inputs, shape (N', N'); or its diagonal (N',) where only that is wanted.
    """
    if outer.ndim == 1:
        result: Matrix = outer + np.einsum("ij,ij->i", matrix @ inner - 2 * cross, matrix)
        return result
    mixed = matrix @ cross.T
    return np.asarray(outer - mixed - mixed.T + matrix @ inner @ matrix.T)


def predict_from_signals(
    structure: Structure,
    train: Signals,
    test: Signals,
    targets: Matrix,
    *,
    damping: Damping = 0.0,
    ridge: float = 0.0,
    initial: Matrix | None = None,
) -> Prediction:
    """As ``predict`` with analytic kernels, from signals that are at hand.

    Args:
      structure: the Fisher approximation.
      train: infinite-width signals on training inputs.
      test: the same on test inputs.
      targets: y, shape (N, C).
      damping: as in ``predict``.
      ridge: as in ``predict``.
      initial: f_0 on training, then test inputs, shape (S, N + N', C), or None.

    Raises:
      ValueError: the structure does not suit the network, or an array cannot fit in memory.
    """
    n, outputs = targets.shape
    columns = [targets]
    if initial is not None:
        columns += list(targets - initial[:, :n])
    vectors = np.concatenate(columns, axis=1)
    with jax.enable_x64(True):
        rho = _checked_damping(structure, train, damping)
        weights = _train_solve(structure, train, rho, ridge, vectors)
        moved = np.asarray(structure.coefficient_times(test, train, rho, jnp.asarray(weights)))
    mean = moved[:, :outputs]
    if initial is None:
        return Prediction(mean)
    parts = moved[:, outputs:].reshape(len(mean), -1, outputs)
    return Prediction(mean, samples=np.swapaxes(parts, 0, 1) + initial[:, n:])


def prediction_matrix(
    structure: Structure,
    train: Signals,
    test: Signals,
    *,
    damping: Damping = 0.0,
    ridge: float = 0.0,
) -> Matrix:
    """K^ = Theta-bar(x', x) (Theta-bar(x, x) + lambda)^{-1}, shape (N', N)."""
    with jax.enable_x64(True):
        rho = _checked_damping(structure, train, damping)
        coefficient = np.asarray(structure.coefficient(test, train, rho))
        # Theta-bar(x, x) is symmetric
        return _train_solve(structure, train, rho, ridge, coefficient.T).T


def _predict_empirical(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    y: ArrayLike,
    x_test: ArrayLike,
    damping: Damping,
    ridge: float,
) -> Prediction:
    signals = initial_signals(model, x, x_test)
    targets = check_targets(y, (signals.num_train, signals.num_outputs))
    start, outside = np.split(signals.outputs, [signals.num_train])
    residual = (targets - start).reshape(-1, 1)
    with jax.enable_x64(True):
        train = signals.train
        rho = _checked_damping(structure, train, damping)
        diagonal = structure.undamped_diagonal(train) if is_zero(damping) else None
        if diagonal is not None:
            weights = jnp.asarray(residual / (np.asarray(diagonal) + ridge)[:, None])
            moved = np.asarray(structure.coefficient_times(signals.test, train, rho, weights))
            return Prediction(moved.reshape(outside.shape) + outside)
    inside, across = coefficient_pair(structure, signals, damping)
    solved = symmetric_solve(inside + ridge * np.eye(len(inside)), residual)
    return Prediction((across @ solved).reshape(outside.shape) + outside)


def _checked_damping(structure: Structure, train: Signals, damping: Damping) -> jax.Array | float:
    check_coefficient_fits(structure, train, few=is_zero(damping))
    structure.check(train, damping)
    return resolve_damping(structure, train, damping)


def _train_solve(
    structure: Structure,
    train: Signals,
    damping: jax.Array | float,
    ridge: float,
    vectors: Matrix,
) -> Matrix:
    """(Theta-bar(x, x) + lambda)^+ V, without that matrix where it is diagonal."""
    diagonal = structure.undamped_diagonal(train) if is_zero(damping) else None
    if diagonal is not None:
        return vectors / (np.asarray(diagonal) + ridge)[:, None]
    matrix = np.asarray(structure.coefficient(train, train, damping))
    return symmetric_solve(matrix + ridge * np.eye(len(matrix)), vectors)


def _right(outputs: Matrix, targets: Matrix) -> np.ndarray:
    """Which samples are classified rightly, shape (N',)."""
    if targets.shape[1] == 1:
        return np.sign(outputs[:, 0]) == np.sign(targets[:, 0])
    return np.argmax(outputs, axis=1) == np.argmax(targets, axis=1)
