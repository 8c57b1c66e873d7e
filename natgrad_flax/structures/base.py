"""The one protocol of every Fisher approximation."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import jax
from jax import Array

from natgrad_flax.layer_signals import LayerSignals, LayerUpdate
from natgrad_flax.operators.base import Operator, ravel
from natgrad_flax.operators.gradient import Gradient, ParameterGradient, Residual
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals
from natgrad_flax.signals import DenseSignals, Signals


class IsotropyWarning(UserWarning):
    """A learning rate rests on a preparation of the data that sizes cannot show."""


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide the theory of a structure.

    Attributes:
      layers: for each layer the parameters a unit (inputs, plus 1 with a bias) and the units.
      num_samples: N.
      num_outputs: C.
      active_fraction: gamma = P(phi' != 0) of the hidden activation, None where it is unknown.
    """

    layers: tuple[tuple[int, int], ...]
    num_samples: int
    num_outputs: int
    active_fraction: float | None = None

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)


@dataclass(frozen=True)
class Structure(abc.ABC):
    """A Fisher approximation G; everything it does is a function of signals.

    The signals are seeded by a factor of the Fisher (``fisher_kinds``), so F = J^T J / N with J the
    seeded Jacobian, whatever the loss. A damping is added to F in this 1/N convention.
    It is a number, or an array of the shape that ``damping_scale`` has; the number 0 stands for the
    pseudo-inverse.
    """

    infinite_width: ClassVar[Literal["none", "train", "all"]] = "none"
    """Where the coefficient matrix has a limit as the width goes to infinity."""

    damping_margin: ClassVar[float] = 1.0
    """How many times the unit roundoff a damping must be for a step that is right to 1 %."""

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        return type(self).__name__

    @property
    def plain(self) -> Structure:
        """The approximation alone, without what a wrapper adds to it."""
        return self

    @abc.abstractmethod
    def operator(self, signals: Signals) -> Operator:
        """G of a batch, as what can be solved with and multiplied by."""

    def solve(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g, one update a layer, without the P x P matrix.

        Args:
          signals: of the batch of the Fisher.
          gradient: g. As the ``Residual`` of the same batch it is solved for cheaper and, at small
            damping, with less rounding than as a ``ParameterGradient``.
          damping: rho.
        """
        return self.operator(signals).solve(gradient, damping)

    def precondition(
        self, signals: Signals, gradient: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g for any g in the space of the parameters, one entry a layer."""
        return self.solve(signals, ParameterGradient(gradient), damping)

    @abc.abstractmethod
    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Theta-bar(x', x) = J(x') G^{-1} J(x)^T / N (Karakida & Osawa 2020, Eq. 11).

        Args:
          test: signals at x' of the plain outputs, S = C.
          train: signals at x, seeded by the factor of the Fisher.
          damping: as in ``solve``.

        Returns:
          Shape (N' C, N S). It acts on the coefficients w of the residual r = R w; for the mean
          squared error R = I, and this is the matrix of the paper.
        """

    def coefficient_times(
        self, test: Signals, train: Signals, damping: Array | float, vectors: Array
    ) -> Array:
        """Theta-bar(x', x) V for V of shape (N S, k), shape (N' C, k).

        Without the matrix itself where the structure has a cheaper way.
        """
        return self.coefficient(test, train, damping) @ vectors

    def undamped_diagonal(self, train: Signals) -> Array | None:
        """Theta-bar(x, x) at zero damping where it is diagonal, (N S,); None where it is not.

        It is where the Gram matrices that are inverted have full rank, which is looked at. (For
        ``Exact`` Theta-bar is a projector without it, and so its own pseudo-inverse: as good as 1.)
        """
        return None

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """G itself, shape (P, P), parameters in the order of ``Signals.to_dense``."""
        return self.operator(signals).to_dense(damping)

    @abc.abstractmethod
    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of the Gram blocks that are inverted, over N: a relative damping of 1.

        Shape () where one damping serves all layers, (L,) where each layer has its own, (L, 2)
        where each of two Kronecker factors has.
        """

    @abc.abstractmethod
    def alpha(self, geometry: Geometry) -> float:
        """alpha of the isotropy condition Theta-bar(x, x) = alpha I at zero damping."""

    @abc.abstractmethod
    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """What the sizes violate of the assumptions behind alpha, a sentence each."""

    def check(self, signals: Signals, damping: object) -> None:  # noqa: B027
        """Raises ValueError, or warns, where this structure does not suit the network."""

    def gram_size(self, signals: Signals) -> int:
        """The side of the largest square array that ``solve`` builds."""
        return signals.size


def coefficient_by_columns(
    structure: Structure, test: Signals, train: Signals, damping: Array | float
) -> Array:
    """``Structure.coefficient`` for layers of any kind: J' (G^{-1} J^T) / N, column by column."""

    def column(row: Array) -> Array:
        return ravel(structure.precondition(train, train.unravel(row), damping))

    columns = jax.lax.map(column, train.to_dense())
    return test.to_dense() @ columns.T / train.num_samples


def has_shared_layers(signals: Signals) -> bool:
    """Whether a layer has other signals than one input and one derivative a sample."""
    kinds = (SharedSignals, ExplicitSignals)
    return any(isinstance(layer, kinds) for layer in signals.layers)


def dense_layer(layer: LayerSignals) -> DenseSignals:
    """A layer of which ``has_shared_layers`` says that it is not shared."""
    return cast(DenseSignals, layer)


def gradient(signals: Signals, residual: Residual) -> tuple[LayerUpdate, ...]:
    """J^T r / N, the gradient of the loss, one entry a layer."""
    return residual.vector(signals.layers)


def rank_failures(geometry: Geometry) -> list[str]:
    """Layers whose Jacobian J_l cannot have full row rank N C (Theorem 4.1 needs it)."""
    n, c = geometry.num_samples, geometry.num_outputs
    failures = []
    for index, (fan_in, units) in enumerate(geometry.layers):
        last = index == geometry.depth - 1
        if last and fan_in < n:
            failures.append(
                f"layer {index + 1} (the last) has {fan_in} inputs for {n} samples; its Jacobian "
                f"has full row rank only with at least {n}"
            )
        elif min(width for _, width in geometry.layers[index:]) < c:
            failures.append(
                f"outputs reach layer {index + 1} through fewer units than the {c} of them"
            )
        elif fan_in * units < n * c:
            failures.append(
                f"layer {index + 1} has {fan_in * units} parameters for N C = {n * c} outputs"
            )
    return failures
