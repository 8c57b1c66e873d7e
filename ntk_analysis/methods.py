"""The training methods of an experiment: a structure, its damping and its learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx

from natgrad_flax import (
    BlockDiagonal,
    IsotropyWarning,
    RelativeDamping,
    Signals,
    Structure,
    optimal_learning_rate,
)
from natgrad_flax.optimizer.spectrum import check_coefficient, rate_of_alpha, rate_of_largest
from natgrad_flax.structures import NAMED
from natgrad_flax.structures.weight_sharing import SharedGeometry, signals_geometry
from ntk_analysis.coefficient import Damping
from ntk_analysis.conditions import failed_conditions, measured_ranks
from ntk_analysis.empirical import Matrix
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.names import find

_CLASSES: tuple[type[Structure], ...] = (GradientDescent, *NAMED)
STRUCTURES: dict[str, Structure] = {cls.style.command: cls() for cls in _CLASSES}
"""Structures by the name that the command line gives them."""

_ALIASES = {
    alias: name for name, structure in STRUCTURES.items() for alias in structure.style.aliases
}
_SMALL_RATES = {BlockDiagonal.style.command: (0.25, 0.5)}


@dataclass(frozen=True)
class Method:
    """One curve.

    Attributes:
      name: of the structure, a key of ``STRUCTURES``.
      factor: c, by which the theoretical learning rate is multiplied.
      damping: rho in the 1/N convention, or an ``ng.RelativeDamping``.
    """

    name: str
    factor: float
    damping: Damping

    @property
    def structure(self) -> Structure:
        """The Fisher approximation, or gradient descent."""
        return STRUCTURES[self.name]

    @property
    def identifier(self) -> str:
        """Unique among the methods of one experiment."""
        return self.name if self.factor == 1 else f"{self.name} c={self.factor:g}"

    @property
    def damping_text(self) -> str:
        """The damping in words."""
        if isinstance(self.damping, RelativeDamping):
            return f"relative {self.damping.ratio:g}"
        return f"{self.damping:g}"


@dataclass(frozen=True)
class LearningRate:
    """A learning rate and where it comes from.

    Attributes:
      value: eta, with the factor c.
      rule: "1/alpha" or "1/lambda_max" (of the coefficient matrix), before the factor.
      note: why the rule is not 1/alpha, or "".
    """

    value: float
    rule: str
    note: str


def find_structure(name: str) -> str:
    """The official name of a structure; case and underscores do not matter.

    Raises:
      ValueError: unknown; the message offers the nearest name.
    """
    return find("structure", name, STRUCTURES, _ALIASES)


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def default_dampings() -> list[tuple[str, str, str]]:
    """Kind ("relative damping") and value of every default but 0, and who has it, in words."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, structure in STRUCTURES.items():
        rho = structure.default_damping
        if isinstance(rho, RelativeDamping):
            groups.setdefault(("relative damping", f"{rho.ratio:g}"), []).append(name)
        elif rho:
            groups.setdefault(("damping", f"{rho:g}"), []).append(name)
    return [(*damping, listed(names)) for damping, names in groups.items()]


def small_rates() -> str:
    """Which structures run at smaller learning rates, too, and at which, in words."""
    return ", ".join(
        f"{name} at c = {listed([f'{factor:g}' for factor in factors])}"
        for name, factors in _SMALL_RATES.items()
    )


def learning_rates() -> str:
    """The learning rate of every structure in theory, in words."""
    known, others = [], []
    for name, structure in STRUCTURES.items():
        rate, bracket, source = structure.optimal_rate.partition(" (")
        if rate:
            known.append(f"{rate} for {name}{bracket}{source}")
        else:
            others.append(name)
    return (
        f"{', '.join(known)}, and 1/lambda_max of the coefficient matrix at initialisation for "
        f"{listed(others)}"
    )


def select_methods(
    structures: tuple[str, ...] | None, scale: float, damping: Damping | None
) -> tuple[Method, ...]:
    """The methods of an experiment.

    Args:
      structures: official names; all by default, and then the block-diagonal structure at smaller
        learning rates too.
      scale: multiplies every learning rate.
      damping: for every structure but gradient descent; by default 0, or a small relative one
        where training needs it.
    """

    def method(name: str, factor: float) -> Method:
        structure = STRUCTURES[name]
        rho = structure.default_damping if damping is None else damping
        return Method(name, factor * scale, rho if structure.takes_damping else 0.0)

    chosen = []
    for name in structures or STRUCTURES:
        chosen.append(method(name, 1.0))
        if structures is None:
            chosen.extend(method(name, factor) for factor in _SMALL_RATES.get(name, ()))
    return tuple(chosen)


def theoretical_learning_rate(
    method: Method,
    model: nnx.Module,
    num_samples: int,
    coefficient: Matrix,
    signals: Signals | None = None,
) -> LearningRate:
    """c / alpha where the structure is isotropic, else c / lambda_max (Corollary 4.2, Section 2).

    Args:
      method: the method.
      model: the network.
      num_samples: N.
      coefficient: Theta-bar(x, x) of the method, shape (N C, N C).
      signals: of the plain outputs on the training samples; without them the conditions of a
        network whose layers share weights are those that its sizes show.

    Raises:
      ValueError: the coefficient matrix is not finite, or has no positive eigenvalue.
    """
    check_coefficient(coefficient, method.structure.name)
    largest = spectrum(coefficient)[1]
    inverse = rate_of_largest(largest, method.structure.name)
    try:
        with warnings.catch_warnings():
            # no Forster transform here, so what only holds after one does not
            warnings.simplefilter("error", IsotropyWarning)
            rate = _isotropic_rate(method.structure, model, num_samples, signals)
    except (ValueError, TypeError, IsotropyWarning) as error:
        note = str(error) if method.structure.optimal_rate else ""
        return LearningRate(method.factor * inverse, "1/lambda_max", note)
    if rate * largest > 2:
        note = (
            f"at 1 / alpha = {rate:.3g} the linearised network would diverge, since lambda_max of "
            f"the coefficient matrix is {largest:.3g}; 1 / lambda_max is used"
        )
        return LearningRate(method.factor * inverse, "1/lambda_max", note)
    return LearningRate(method.factor * rate, "1/alpha", "")


def _isotropic_rate(
    structure: Structure, model: nnx.Module, num_samples: int, signals: Signals | None
) -> float:
    """1 / alpha.

    Raises:
      ValueError, TypeError: the structure has no alpha there, or a condition behind it fails.
    """
    geometry = None if signals is None else signals_geometry(model, signals)
    if signals is None or not isinstance(geometry, SharedGeometry):
        return optimal_learning_rate(structure, model, num_samples)
    alpha = structure.shared_alpha(geometry)
    failures = failed_conditions(structure, geometry, measured_ranks(signals))
    if failures:
        raise ValueError(
            f"{structure.name} is not isotropic here, so 1 / alpha is not its learning rate: "
            + "; ".join(failures)
        )
    return rate_of_alpha(alpha, structure.name)


def spectrum(coefficient: Matrix) -> tuple[float, float]:
    """The smallest and the largest real part of the eigenvalues of a coefficient matrix."""
    values = np.linalg.eigvals(coefficient).real
    return float(values.min()), float(values.max())
