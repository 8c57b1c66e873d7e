"""Coefficient matrices: the kernels that govern natural-gradient training in function space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import RelativeDamping, Signals, Structure
from natgrad_flax.arguments.memory import check_fits
from natgrad_flax.arguments.scalars import as_number
from natgrad_flax.optimizer.checks import check_damping, check_structure
from natgrad_flax.optimizer.gradient import resolve_damping
from natgrad_flax.optimizer.learning_rate import model_geometry
from natgrad_flax.optimizer.spectrum import check_coefficient, check_symmetric
from ntk_analysis.analytic import analytic_inputs, analytic_kernels
from ntk_analysis.analytic_signals import (
    check_limit,
    check_shared_weights,
    limit_signals,
)
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.infinite_width import num_outputs, require_limit
from ntk_analysis.limit_conditions import limit_failures

Damping = float | RelativeDamping
Kernels = Literal["empirical", "analytic"]


def coefficient_matrix(
    structure: Structure,
    model: nnx.Module,
    x_train: ArrayLike,
    x_test: ArrayLike | None = None,
    damping: Damping = 0.0,
    kernels: Kernels = "empirical",
) -> Matrix:
    """What carries a step from training residuals to outputs (Karakida & Osawa 2020, Eq. 11).

    It is Theta-bar(x', x) = J(x') (G + rho)^{-1} J(x)^T / N with the Jacobian J of the outputs: a
    step of the linearised network moves its outputs by -eta Theta-bar(x', x) (f(x) - y). With
    ``GradientDescent()`` it is the neural tangent kernel Theta(x', x) = K(x', x) / N.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: any module built of layers with signals.
      x_train: training inputs x, shape (N, ...).
      x_test: inputs x', shape (N', ...); the training inputs by default.
      damping: rho, added to the Fisher in the 1/N convention (so N rho to a Gram matrix); 0 means
        the pseudo-inverse. Or an ``ng.RelativeDamping``.
      kernels: "empirical", those of this model; or "analytic", those of its infinite-width limit
        (exact, layer-wise and gradient descent; of an ``ng.MLP`` also K-FAC, FOOF and Shampoo, and
        unit-wise and others between training inputs at zero damping: ``Structure.infinite_width``),
        where outputs are independent of each other.

    Returns:
      Float64, shape (N' C, N C); samples first, then outputs.

    Raises:
      ValueError, TypeError: bad inputs or damping, a structure that does not suit the network or
        has no infinite-width limit, or a matrix that cannot fit in memory.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> theta = na.coefficient_matrix(ng.BlockDiagonal(), model, x)
      >>> bool(np.allclose(theta, 2 * np.eye(4)))  # alpha I, alpha = L
      True
    """
    check_theory_arguments(structure, damping, kernels)
    if kernels == "analytic":
        return next(analytic_coefficients(structure, model, x_train, x_test, damping))
    signals = initial_signals(model, x_train, x_test)
    train, test = coefficient_pair(structure, signals, damping)
    return train if x_test is None else test


def coefficient_pair(
    structure: Structure, signals: InitialSignals, damping: Damping = 0.0
) -> tuple[Matrix, Matrix]:
    """Theta-bar(x, x) and Theta-bar(x', x) of signals that are at hand.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      signals: of training and test samples.
      damping: as in ``coefficient_matrix``.

    Returns:
      Float64 arrays (N C, N C) and (N' C, N C).

    Raises:
      ValueError: the structure does not suit the network, an array cannot fit in memory, or a
        matrix that is not finite or lost in rounding.
    """
    with jax.enable_x64(True):
        train = signals.train
        check_coefficient_fits(structure, train)
        structure.check(train, damping)
        rho = resolve_damping(structure, train, damping)
        both = np.asarray(structure.coefficient(signals.everything, train, rho))
    check_coefficient(both, structure.name)
    check_symmetric(both[: train.size], structure.name)
    return both[: train.size], both[train.size :]


def analytic_coefficients(
    structure: Structure,
    model: nnx.Module,
    x_train: ArrayLike,
    x_test: ArrayLike | None,
    damping: Damping = 0.0,
) -> Iterator[Matrix]:
    """Theta-bar(x', x), where there are test inputs, then Theta-bar(x, x), at infinite width.

    The kernels are computed once; each matrix is made when it is asked for.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: an ``ng.MLP`` or an ``ng.ConvNet``.
      x_train: shape (N, ...).
      x_test: shape (N', ...), or None.
      damping: as in ``coefficient_matrix``.

    Yields:
      Float64 arrays (N' C, N C) and (N C, N C).

    Raises:
      ValueError, TypeError: as ``coefficient_matrix``.
    """
    check_limit(structure, x_test is not None, damping)
    check_shared_weights(structure, model)
    outputs = num_outputs(require_limit(model))
    if structure.infinite_width == "train":
        signals, _ = analytic_signals(structure, model, x_train, None)
        geometry = model_geometry(model, signals.num_samples)
        if failures := limit_failures(structure, geometry, signals):
            raise ValueError(
                f"{structure.name} has an infinite-width kernel only where it is isotropic. "
                f"{'; '.join(failures)}"
            )
        yield structure.alpha(geometry) * np.eye(geometry.num_samples * outputs)
        return
    train, test = analytic_signals(structure, model, x_train, x_test)
    yield from limit_coefficients(structure, train, test, outputs, damping)


def limit_coefficients(
    structure: Structure,
    train: Signals,
    test: Signals | None,
    outputs: int,
    damping: Damping = 0.0,
) -> Iterator[Matrix]:
    """As ``analytic_coefficients``, from infinite-width signals that are at hand.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      train: of ``analytic_signals``, on training inputs.
      test: on test inputs, or None.
      outputs: C.
      damping: as in ``coefficient_matrix``.
    """
    with jax.enable_x64(True):
        check_coefficient_fits(structure, train)
        structure.check(train, damping)
        rho = resolve_damping(structure, train, damping)
    for rows in (train,) if test is None else (test, train):
        with jax.enable_x64(True):
            one = np.asarray(structure.coefficient(rows, train, rho))
        check_coefficient(one, structure.name)
        if rows is train:
            check_symmetric(one, structure.name)
        size = one.shape[0] * one.shape[1] * outputs**2
        check_fits(math.isqrt(size), 8, "the coefficient matrix of all outputs", 1.0)
        yield np.kron(one, np.eye(outputs))


def analytic_signals(
    structure: Structure,
    model: nnx.Module,
    x_train: ArrayLike,
    x_test: ArrayLike | None,
    **options: Any,
) -> tuple[Signals, Signals | None]:
    """Infinite-width signals on training and test inputs that a structure can work with.

    Args:
      structure: the Fisher approximation; it decides which kernels are computed.
      model: an ``ng.MLP`` or an ``ng.ConvNet``.
      x_train: shape (N, ...).
      x_test: shape (N', ...), or None.
      **options: ``store``, ``progress`` and ``devices`` of ``analytic_kernels``.

    Raises:
      ValueError, TypeError: as ``analytic_kernels``.
    """
    check_shared_weights(structure, model)
    inside = analytic_inputs(x_train, model, "x_train")
    outside = None if x_test is None else analytic_inputs(x_test, model, "x_test")
    parts = structure.limit_kernels
    train = analytic_kernels(model, inside, parts=parts, **options)
    cross = None
    if outside is not None:
        cross = analytic_kernels(model, outside, inside, parts=parts, **options)
    return limit_signals(require_limit(model), train, cross, inside, outside)


def check_coefficient_fits(structure: Structure, signals: Signals, *, few: bool = False) -> None:
    """Refuses a coefficient matrix (N C, N C) that cannot fit with what it is made of.

    It is computed operation by operation, so that Gram matrices of all layers are there at once;
    the counts are those of measured peaks.

    Args:
      structure: the Fisher approximation.
      signals: of the training samples.
      few: it acts on a few vectors alone.

    Raises:
      ValueError: it does not fit.
    """
    depth = len(signals.layers)
    each, more = (1.0, 2.5) if few else structure.coefficient_arrays
    what = f"the coefficient matrix of {structure.name}, which it solves for,"
    check_fits(signals.size, 8, what, each * depth + more)


def check_theory_arguments(structure: object, damping: object, kernels: object) -> None:
    """Raises ValueError or TypeError on arguments that no theory can use."""
    check_structure(structure)
    check_damping(damping)
    if not isinstance(damping, RelativeDamping) and as_number(damping) is None:
        raise TypeError(
            f"theory needs a fixed damping, a number or an ng.RelativeDamping, got {damping!r}"
        )
    if kernels not in get_args(Kernels):
        raise ValueError(f'kernels must be "empirical" or "analytic", got {kernels!r}')
