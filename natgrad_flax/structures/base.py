"""The one protocol of every Fisher approximation."""

from __future__ import annotations

import abc
import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.layer_signals import LayerSignals, LayerUpdate
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals
from natgrad_flax.signals import DenseSignals, Residual, Signals

Space = Literal["auto", "sample", "parameter"]


def check_space(space: str) -> None:
    """Raises ValueError on an unknown space to solve in."""
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {', '.join(get_args(Space))}, got {space!r}")


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

    @property
    def params(self) -> tuple[int, ...]:
        """P_l."""
        return tuple(fan_in * units for fan_in, units in self.layers)

    @property
    def biases(self) -> tuple[bool, ...]:
        """Which layers have a bias, which shows where they follow each other.

        Layer 1 is taken to be like layer 2, and a single layer to have none.
        """
        pairs = itertools.pairwise(self.layers)
        shown = [fan_in > units for (_, units), (fan_in, _) in pairs]
        return (*shown[:1], *shown) if shown else (False,) * self.depth


@dataclass(frozen=True)
class Structure(abc.ABC):
    """A Fisher approximation G; everything it does is a function of signals.

    The signals are seeded by a factor of the Fisher (``natgrad_flax.fisher``), so F = J^T J / N
    with J the seeded Jacobian, whatever the loss. A damping is added to F in this 1/N convention.
    It is a number, or an array of the shape that ``damping_scale`` has; the number 0 stands for the
    pseudo-inverse.
    """

    infinite_width: ClassVar[Literal["none", "train", "all"]] = "none"
    """Where the coefficient matrix has a limit as the width goes to infinity."""

    couples_layers: ClassVar[bool] = False
    """Whether layers are solved together, from the Gram matrix or Fisher block of each."""

    masks_units: ClassVar[bool] = False
    """Whether, undamped, a unit that is off on a sample has a system of its own, as if damped."""

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
    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N, one update a layer, without the P x P matrix."""

    @abc.abstractmethod
    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g for any g in the space of the parameters, one entry a layer.

        Of the same batch and a gradient J^T r / N ``solve`` does this cheaper and, at small
        damping, with less rounding.
        """

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

    @abc.abstractmethod
    def to_dense(self, signals: Signals, damping: float = 0.0) -> Array:
        """G itself, shape (P, P), parameters in the order of ``Signals.to_dense``."""

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

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Entries of the P x P matrix G that can be non-zero, and numbers stored to know them.

        Raises:
          TypeError: nobody has counted them.
        """
        raise TypeError(f"the cost of {self.name} is not known")

    def block_form(self, layer: LayerSignals) -> str:
        """What it makes of the Fisher block of one layer, in words."""
        return f"as {self.name} says"


def coefficient_by_columns(
    structure: Structure, test: Signals, train: Signals, damping: Array | float
) -> Array:
    """``Structure.coefficient`` for layers of any kind: J' (G^{-1} J^T) / N, column by column."""

    def column(row: Array) -> Array:
        return ravel(structure.precondition(train, train.unravel(row), damping))

    columns = jax.lax.map(column, train.to_dense())
    return test.to_dense() @ columns.T / train.num_samples


def block_words(layer: LayerSignals, small: bool) -> str:
    """Which matrix of a Jacobian block is built, and what of: J_l^T J_l where ``small``."""
    return "P x P" if small else f"by {layer.gram_by}"


def has_shared_layers(signals: Signals) -> bool:
    """Whether a layer has other signals than one input and one derivative a sample."""
    kinds = (SharedSignals, ExplicitSignals)
    return any(isinstance(layer, kinds) for layer in signals.layers)


def dense_layer(layer: LayerSignals) -> DenseSignals:
    """A layer of which ``has_shared_layers`` says that it is not shared."""
    return cast(DenseSignals, layer)


def dual_direction(
    layer: LayerSignals,
    index: int,
    residual: Residual,
    solution: Array,
    shift: Array | float,
) -> Array:
    """The direction of an update, from a solve in sample space.

    With r = R w in the span of the seeds, (J^T J + s)^{-1} J^T w = J^T v, v = (J J^T + s)^{-1} w.
    Otherwise, by Woodbury, (J^T J + s)^{-1} g = (g - J^T v) / s with v = (J J^T + s)^{-1} J g.

    Args:
      layer: the signals of the layer.
      index: its place in the network.
      residual: the residual.
      solution: v, shape (N S,).
      shift: s = N rho.
    """
    spread = layer.combine(solution.reshape(layer.num_samples, layer.num_seeds))
    if residual.coefficients is not None:
        return spread
    return (residual.direction(layer, index) - spread) / shift


def sample_targets(layer: LayerSignals, index: int, residual: Residual) -> Array:
    """The right-hand side (N S,) of the solve in sample space: w, or this layer's part of J g."""
    if residual.coefficients is not None:
        return residual.coefficients.reshape(-1)
    return layer.gram_times(residual.direction(layer, index)).reshape(-1)


def woodbury(
    layer: LayerSignals, slope: LayerUpdate, solution: Array, shift: Array | float
) -> LayerUpdate:
    """N (g - J^T v) / s, which is (J^T J + s)^{-1} N g for v = (J J^T + s)^{-1} J g.

    Args:
      layer: the signals of the layer.
      slope: g.
      solution: v, shape (N S,).
      shift: s = N rho.
    """
    n = layer.num_samples
    back = layer.vjp(solution.reshape(n, layer.num_seeds))
    return jax.tree.map(lambda g, spread: n * (g - spread) / shift, slope, back)


def pull_back_solution(layer: LayerSignals, solution: Array) -> LayerUpdate:
    """N J^T v, what is left of ``woodbury`` at zero damping with v = (K^+)^2 J g."""
    n = layer.num_samples
    return layer.vjp(n * solution.reshape(n, layer.num_seeds))


def gradient(signals: Signals, residual: Residual) -> tuple[LayerUpdate, ...]:
    """J^T r / N, the gradient of the loss, one entry a layer."""
    # the division goes to the small side of the product: (N, M) and not (K, M)
    return tuple(
        layer.pull_back(residual.direction(layer, index) / signals.num_samples)
        for index, layer in enumerate(signals.layers)
    )


def ravel(updates: tuple[LayerUpdate, ...]) -> Array:
    """One vector (P,) in the column order of ``Signals.to_dense``."""
    return jnp.concatenate(
        [
            jnp.ravel(update[key])
            for update in updates
            for key in ("kernel", "bias")
            if key in update
        ]
    )


def triangle(side: int) -> int:
    """Entries of a symmetric (side, side) matrix, those in pairs once."""
    return side * (side + 1) // 2


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
