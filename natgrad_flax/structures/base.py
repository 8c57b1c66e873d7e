"""The one protocol of every Fisher approximation."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import jax
import numpy as np
from jax import Array

from natgrad_flax.damping import RelativeDamping
from natgrad_flax.operators.base import Operator
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, ravel
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.gradient import Gradient, ParameterGradient
from natgrad_flax.signals.microbatches import Passes, in_microbatches
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.stacked import Stacking
from natgrad_flax.structures.geometry import Geometry, NeededRank, SharedGeometry
from natgrad_flax.structures.style import Style, style_of_class


class IsotropyWarning(UserWarning):
    """A learning rate 1 / alpha is right only for inputs that were prepared as the theory asks.

    Sizes do not show whether they were: K-FAC with fewer inputs than samples wants them after a
    Forster transform (``natgrad_datasets.forster_transform``).

    Example:
      >>> import warnings, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 64, 64, 1), rngs=nnx.Rngs(0))
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always", ng.IsotropyWarning)
      ...     rate = ng.optimal_learning_rate(ng.KFAC(first_layer="scaled"), model, 16)
      >>> str(caught[0].message).split(";")[0]
      'KFAC: layer 1 has 4 inputs for 16 samples'
    """


@dataclass(frozen=True)
class Structure(abc.ABC):
    """The base class of all Fisher approximations G: what they answer, from the signals of a batch.

    The output directions of the signals are a factor of the Fisher (``signals.fisher``), so
    F = J^T J / N with their Jacobian J, whatever the loss. A damping is added to F in this 1/N
    convention. It is a number, or an array of the shape that ``damping_scale`` has; the number 0
    stands for the pseudo-inverse.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> signals, residual = ng.fisher_signals(model, x, y, loss=ng.MeanSquaredError())
      >>> structure = ng.Diagonal()
      >>> updates = structure.solve(signals, residual, 1e-3)  # one a layer
      >>> [update["kernel"].shape for update in updates]
      [(4, 8), (8, 1)]
    """

    style: ClassVar[Style]
    """How it is called and drawn; made of the name of the class unless the class says it."""

    default_damping: ClassVar[float | RelativeDamping] = 0.0
    """The damping at which networks are trained with it, where a user gives none."""

    takes_damping: ClassVar[bool] = True
    """Whether it has a matrix that can be damped."""

    optimal_rate: ClassVar[str] = ""
    """1 / alpha in symbols, with its source in brackets; "" where theory knows no alpha."""

    without_biases: ClassVar[str] = ""
    """Which structure it is in a network without biases; "" for itself."""

    eigensystems: ClassVar[bool] = False
    """Whether its systems are solved by eigendecompositions, 27 times the flops of Cholesky's."""

    infinite_width: ClassVar[Literal["none", "train", "all"]] = "none"
    """Where the coefficient matrix has a limit as the width goes to infinity. At "train" between
    training inputs at zero damping alone, and where it is isotropic: alpha I with alpha of the
    model's widths."""

    why_no_limit: ClassVar[str] = "there is no formula in the kernels of the layers here"
    """Why there is no limit, or at "train" why not elsewhere; a clause."""

    damping_margin: ClassVar[float] = 100.0
    """How many times the unit roundoff a damping must be, beside eigenvalues of 1, for a step right
    to 1 %: solves with Gram matrices lose eps times the condition."""

    couples_layers: ClassVar[bool] = False
    """Whether layers are solved together, from the Gram matrix or Fisher block of each."""

    stacking: ClassVar[Stacking] = "none"
    """Which layers of a loop it takes as ``StackedSignals``: "all" where each layer is solved by
    itself, "inner" where moreover the first or the last is treated unlike others, "whole" where all
    are solved as one block, "none" where layers are told apart in any other way."""

    takes_momentum: ClassVar[bool] = False
    """Whether it solves blocks of the Fisher itself, by which the step before can be projected."""

    masks_units: ClassVar[bool] = False
    """Whether, undamped, a unit that is off on a sample has a system of its own, as if damped."""

    shared_weights: ClassVar[Literal["gram", "jacobians", "squares", "rows"]] = "jacobians"
    """What it builds of weights that positions share: Gram matrices, which may come from pairs of
    positions, the Jacobians of samples, of these the squares alone, or nothing but the rows of
    positions. Where it is Gram matrices, ``operator`` computes nothing, so that it can be asked of
    shapes."""

    limit_kernels: ClassVar[tuple[str, ...]] = ("tangent",)
    """The kernels of layers that this limit is made of: "inputs", "derivatives", "tangent"."""

    coefficient_arrays: ClassVar[tuple[float, float]] = (1.0, 3.5)
    """(a, b): building the coefficient matrix keeps a L + b arrays of its size, as measured."""

    def __init_subclass__(cls, **options: object) -> None:
        """Gives the class a style of its own, which it does not take from the one above it."""
        super().__init_subclass__(**options)
        if "style" not in vars(cls):
            cls.style = style_of_class(cls.__name__)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank] | None:
        """The ranks that isotropy needs, layer by layer; None where it is no matter of ranks.

        Args:
          geometry: the sizes, of a network with shared weights too.
        """
        return None

    def outside_theory(self, geometry: Geometry) -> list[str]:
        """Why there is no alpha whatever the ranks, a sentence each."""
        return []

    def shared_alpha(self, geometry: SharedGeometry) -> float:
        """alpha of the isotropy condition at zero damping, where positions share weights.

        Raises:
          ValueError: the structure has no alpha there.
        """
        return self.alpha(geometry)

    def no_limit(self, shared: bool) -> str:
        """Why this setting has no infinite-width coefficient matrix where its class has, or "".

        Args:
          shared: whether positions share the weights of the network.
        """
        return ""

    def after_forster(self) -> Structure | None:
        """The structure for inputs after a Forster transform, None where it gains nothing."""
        return None

    def coupling(self, depth: int) -> np.ndarray | None:
        """Sigma (L, L) of a structure that is G = S^T (Sigma (x) I) S / N, else None.

        Args:
          depth: L.

        Raises:
          ValueError: Sigma is one of another depth.
        """
        return None

    def largest_system(self, signals: Signals) -> int:
        """The side of the largest dense system that a step solves.

        Args:
          signals: of a batch, or their shapes.
        """
        return self.gram_size(signals)

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        return type(self).__name__

    @property
    def plain(self) -> Structure:
        """The approximation alone, without what a wrapper adds to it."""
        return self

    @property
    def inner(self) -> Structure:
        """What it is for layers among which are neither the first nor the last one."""
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

    def solve_and_report(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[tuple[LayerUpdate, ...], Any]:
        """``solve``, and how it went where there is something to say of it, else None."""
        return self.solve(signals, gradient, damping), None

    @property
    def passes(self) -> Passes:
        """How a batch runs through the model."""
        return in_microbatches

    def precondition(
        self, signals: Signals, gradient: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g for any g in the space of the parameters, one entry a layer."""
        return self.solve(signals, ParameterGradient(gradient), damping)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Theta-bar(x', x) = J(x') G^{-1} J(x)^T / N (Karakida & Osawa 2020, Eq. 11).

        Args:
          test: signals at x' of the plain outputs, S = C.
          train: signals at x, of the output directions of the Fisher.
          damping: as in ``solve``.

        Returns:
          Shape (N' C, N S). It acts on the coefficients w of the residual r = R w; for the mean
          squared error R = I, and this is the matrix of the paper.
        """
        operator = self.operator(train)

        def column(row: Array) -> Array:
            return ravel(operator.solve(ParameterGradient(train.unravel(row)), damping))

        columns = jax.lax.map(column, train.to_dense())
        return test.to_dense() @ columns.T / train.num_samples

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

    def alpha(self, geometry: Geometry) -> float:
        """alpha of the isotropy condition Theta-bar(x, x) = alpha I at zero damping.

        Raises:
          ValueError: theory knows none.
        """
        raise ValueError(
            f"{self.name} has no alpha that theory knows, so sizes alone give no learning rate; "
            "pass inputs as x= for 1 / lambda_max of its coefficient matrix"
        )

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """What the sizes violate of the assumptions behind alpha, a sentence each."""
        return []

    def check(self, signals: Signals, damping: object) -> None:  # noqa: B027
        """Raises ValueError, or warns, where this structure does not suit the network."""

    def gram_size(self, signals: Signals) -> int:
        """The side of the largest square array that ``solve`` builds."""
        return signals.size

    def system_arrays(self, signals: Signals) -> float:
        """How many arrays of that size a step holds at once, by XLA's plan on a CPU.

        Args:
          signals: of a batch, or their shapes.
        """
        return 1.0

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Entries of the P x P matrix G that can be non-zero, and numbers stored to know them.

        Raises:
          TypeError: nobody has counted them.
        """
        raise TypeError(f"the cost of {self.name} is not known")

    def block_form(self, layer: LayerSignals) -> str:
        """What it makes of the Fisher block of one layer, in words."""
        return f"as {self.name} says"


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
