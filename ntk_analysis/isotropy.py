"""How isotropic a Fisher approximation makes training: the spectrum of Theta-bar(x, x)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import MLP, ConvNet, IsotropyWarning, Signals, Structure
from natgrad_flax.optimizer.learning_rate import model_geometry
from natgrad_flax.structures import Geometry
from natgrad_flax.structures.weight_sharing import (
    SharedGeometry,
    signals_geometry,
    traced_geometry,
)
from ntk_analysis.analytic_signals import check_limit
from ntk_analysis.coefficient import (
    Damping,
    Kernels,
    analytic_signals,
    check_theory_arguments,
    coefficient_matrix,
    coefficient_pair,
    limit_coefficients,
)
from ntk_analysis.conditions import NetworkRanks, failed_conditions, measured_ranks
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.infinite_width import require_limit
from ntk_analysis.limit_conditions import limit_failures
from ntk_analysis.symmetric import zero_below


@dataclass(frozen=True, eq=False)
class IsotropyReport:
    """The spectrum of Theta-bar(x, x) beside what the theory says of it.

    Theta-bar(x, x) = J G^{-1} J^T / N is symmetric, because G is, for every structure and with any
    damping; what is left of an antisymmetric part is rounding. It need not be positive: a damped
    block tri-diagonal G is indefinite.

    Attributes:
      structure: name of the Fisher approximation.
      eigenvalues: of the symmetric part, ascending, shape (N C,).
      asymmetry: the largest entry of |Theta-bar - Theta-bar^T| over the largest |eigenvalue|.
      theoretical_alpha: alpha of the structure at zero damping from sizes alone, the value of the
        theory whether or not its conditions hold; None where the structure has none.
      failed_conditions: what fails of the conditions behind it, one sentence each.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> report = na.isotropy(ng.Exact(), model, x)
      >>> print(
      ...     report.eigenvalues.round(3),
      ...     report.theoretical_alpha,
      ...     report.learning_rate,
      ... )
      [1. 1. 1. 1.] 1.0 1.0
    """

    structure: str
    eigenvalues: Matrix
    asymmetry: float
    theoretical_alpha: float | None
    failed_conditions: tuple[str, ...]

    @property
    def alpha(self) -> float:
        """The mean eigenvalue, trace / (N C): alpha where Theta-bar = alpha I."""
        return float(np.mean(self.eigenvalues))

    @property
    def condition_number(self) -> float:
        """Largest over smallest |eigenvalue|, 1 for an isotropic Fisher.

        Infinite where the smallest is 0: not above what rounding makes of a zero
        (``symmetric.zero_below``).
        """
        sizes = np.abs(self.eigenvalues)
        smallest, largest = float(sizes.min()), float(sizes.max())
        if smallest <= zero_below(len(sizes), largest, self.asymmetry * largest):
            return float("inf")
        return largest / smallest

    @property
    def deviation(self) -> float:
        """Spectral norm of Theta-bar / alpha - I; infinite where alpha is 0."""
        if self.alpha == 0:
            return float("inf")
        return float(np.max(np.abs(self.eigenvalues / self.alpha - 1)))

    @property
    def learning_rate(self) -> float:
        """1 / theoretical alpha, or 1 / lambda_max of Theta-bar(x, x).

        The second where there is no theoretical alpha, where a condition behind it fails, or where
        the linearised network would diverge with it (lambda_max of 2 alpha and more). NaN where no
        eigenvalue is positive. With a negative eigenvalue no learning rate converges.
        """
        largest = float(self.eigenvalues[-1])
        alpha = self.theoretical_alpha
        if alpha is not None and not self.failed_conditions and alpha > 0 and largest < 2 * alpha:
            return 1 / alpha
        return 1 / largest if largest > 0 else float("nan")

    def is_isotropic(self, tolerance: float = 1e-6) -> bool:
        """Whether the deviation is at most a tolerance.

        Rounding alone leaves about the condition number of the kernels times 1e-16. The unit-wise
        Fisher of a ReLU network is isotropic in the limit only, up to about 1 / sqrt(M (L - 1)).
        """
        return self.deviation <= tolerance


def isotropy(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    damping: Damping = 0.0,
    kernels: Kernels = "empirical",
) -> IsotropyReport:
    """Eigenvalues, condition number and alpha of Theta-bar(x, x) (Karakida & Osawa 2020, Eq. 14).

    An isotropic Fisher has Theta-bar(x, x) = alpha I, so that the linearised network fits its
    training samples in one step of the learning rate 1 / alpha.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: any module built of layers with signals.
      x: inputs, shape (N, ...).
      damping: rho, added to the Fisher in the 1/N convention; 0 means the pseudo-inverse. Or an
        ``ng.RelativeDamping``. The theoretical alpha and its conditions are those of zero damping.
      kernels: "empirical", those of this model, or "analytic", those of infinite width.

    Raises:
      ValueError, TypeError: bad inputs or damping, kernels of another name, a structure that does
        not suit the network, a matrix that cannot fit in memory or one that is not finite.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> report = na.isotropy(ng.KFAC(), model, x)
      >>> round(report.alpha, 3), report.is_isotropic()
      (8.0, True)
      >>> na.isotropy(ng.Diagonal(), model, x).is_isotropic()
      False
    """
    check_theory_arguments(structure, damping, kernels)
    if kernels == "empirical":
        signals = initial_signals(model, x)
        return isotropy_of(structure, signals, signals_geometry(model, signals.train), damping)
    check_limit(structure, False, damping)
    if structure.infinite_width == "train":
        matrix = coefficient_matrix(structure, model, x, damping=damping, kernels=kernels)
        return _report(structure, matrix, _limit_geometry(require_limit(model), np.shape(x)[0]), ())
    limits, _ = analytic_signals(structure, model, x, None)
    return limit_isotropy(structure, model, limits, damping)


def isotropy_of(
    structure: Structure,
    signals: InitialSignals,
    geometry: Geometry,
    damping: Damping = 0.0,
    ranks: NetworkRanks | None = None,
) -> IsotropyReport:
    """As ``isotropy``, from signals that are at hand: computed once, they serve all structures.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      signals: of the training samples; test samples, where there are any, are left aside.
      geometry: of the model and N, from ``signals_geometry``.
      damping: as in ``isotropy``.
      ranks: ``measured_ranks(signals.train)``, where they are at hand too.

    Raises:
      ValueError: the structure does not suit the network, an array cannot fit in memory, or
        Theta-bar is not finite.
    """
    train = InitialSignals(signals.train, signals.num_train)
    matrix, _ = coefficient_pair(structure, train, damping)
    if ranks is None:
        ranks = measured_ranks(train.everything)
    return _report(structure, matrix, geometry, failed_conditions(structure, geometry, ranks))


def limit_isotropy(
    structure: Structure, model: nnx.Module, signals: Signals, damping: Damping = 0.0
) -> IsotropyReport:
    """As ``isotropy`` with analytic kernels, from infinite-width signals that are at hand.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: the network that they are the limit of.
      signals: of ``coefficient.analytic_signals`` on the training samples.
      damping: as in ``isotropy``.

    Raises:
      ValueError: as ``isotropy``.
    """
    geometry = _limit_geometry(require_limit(model), signals.num_samples)
    failures = limit_failures(structure, geometry, signals)
    (matrix,) = limit_coefficients(structure, signals, None, geometry.num_outputs, damping)
    return _report(structure, matrix, geometry, failures)


def _limit_geometry(model: MLP | ConvNet, num_samples: int) -> Geometry:
    """The sizes of a model without signals of its samples."""
    if isinstance(model, MLP):
        return model_geometry(model, num_samples)
    return traced_geometry(model, model.input_shape, np.float32, num_samples)


def _report(
    structure: Structure, matrix: Matrix, geometry: Geometry, failures: tuple[str, ...]
) -> IsotropyReport:
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2).astype(np.float64)
    largest = np.max(np.abs(eigenvalues))
    asymmetry = float(np.max(np.abs(matrix - matrix.T)) / largest) if largest > 0 else 0.0
    return IsotropyReport(
        structure.name, eigenvalues, asymmetry, _theoretical_alpha(structure, geometry), failures
    )


def _theoretical_alpha(structure: Structure, geometry: Geometry) -> float | None:
    with warnings.catch_warnings():
        # what the warning is about is measured: the leverages of the inputs
        warnings.simplefilter("ignore", IsotropyWarning)
        try:
            if isinstance(geometry, SharedGeometry):
                return structure.shared_alpha(geometry)
            return structure.alpha(geometry)
        except ValueError:
            return None
