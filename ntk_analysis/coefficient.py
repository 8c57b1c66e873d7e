"""Coefficient matrices: the kernels that govern natural-gradient training in function space."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import RelativeDamping, Structure
from natgrad_flax.checks import check_damping, check_fits, check_structure
from natgrad_flax.gradient import resolve_damping
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals

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
    """Theta-bar(x', x) = J(x') (G + rho)^{-1} J(x)^T / N (Karakida & Osawa 2020, Eq. 11).

    A step of the linearised network moves its outputs by -eta Theta-bar(x', x) (f(x) - y). With
    ``GradientDescent()`` it is the neural tangent kernel Theta(x', x) = K(x', x) / N.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: any module built of layers with signals.
      x_train: training inputs x, shape (N, ...).
      x_test: inputs x', shape (N', ...); the training inputs by default.
      damping: rho, added to the Fisher in the 1/N convention (so N rho to a Gram matrix); 0 means
        the pseudo-inverse. Or an ``ng.RelativeDamping``.
      kernels: "empirical", those of this model.

    Returns:
      Float64, shape (N' C, N C); samples first, then outputs.

    Raises:
      ValueError, TypeError: bad inputs or damping, a structure that does not suit the network,
        kernels other than "empirical", or a matrix that cannot fit in memory.
    """
    check_theory_arguments(structure, damping, kernels)
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
      ValueError: the structure does not suit the network, or an array cannot fit in memory.
    """
    with jax.enable_x64(True):
        train = signals.train
        check_fits(structure.gram_size(train), 8, f"the system that {structure.name} solves")
        structure.check(train, damping)
        rho = resolve_damping(structure, train, damping)
        both = np.asarray(structure.coefficient(signals.everything, train, rho))
    return both[: train.size], both[train.size :]


def check_theory_arguments(structure: object, damping: object, kernels: object) -> None:
    """Raises ValueError or TypeError on arguments that no theory can use."""
    check_structure(structure)
    check_damping(damping)
    if not isinstance(damping, (int, float, RelativeDamping)):
        raise TypeError(
            f"theory needs a fixed damping, a number or an ng.RelativeDamping, got {damping!r}"
        )
    if kernels == "analytic":
        raise ValueError(
            'kernels="analytic" (infinite width) is not there yet: it comes with the '
            'neural-tangents issue; use kernels="empirical"'
        )
    if kernels not in get_args(Kernels):
        raise ValueError(f'kernels must be "empirical" or "analytic", got {kernels!r}')
