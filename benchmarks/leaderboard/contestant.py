"""A contestant: an optimizer with everything that its results depend on; and their register."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal

import optax
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.signals.fisher import FisherKind
from ntk_analysis.names import find

if TYPE_CHECKING:
    from benchmarks.leaderboard.program import Program

Family = Literal["first-order", "quasi-Newton", "natural-gradient", "peer"]
RateRule = Literal["theoretical", "theoretical: 1", "tuned", "line search"]
Damping = float | ng.RelativeDamping | ng.LevenbergMarquardt
Optimizer = Callable[[Workload, Array | float, int], optax.GradientTransformation]

TUNING_TRIALS = 6
"""Learning rates that every tuned contestant tries on a workload, no more and no less."""


# the Fisher of cross-entropy vanishes as the classes are told apart; damping that followed it down
# would let each batch throw the parameters away
CROSS_ENTROPY_MINIMUM = 1e-2

# the entries of a Fisher in standard parametrisation are larger by the fan-in, some dozens here: a
# damping that is to mean the same as in NTK parametrisation has to be larger, too
STANDARD_DAMPING = 30.0


@dataclass(frozen=True)
class Contestant:
    """An optimizer on the leaderboard.

    Attributes:
      name: its key, in lower case with hyphens.
      title: what the board calls it.
      family: which kind of method.
      rate_rule: where its learning rate comes from.
      optimizer: from workload, learning rate and seed to an optax transformation. Its ``update``
        gets the batch as extra arguments: module, x, y, value, grad and value_fn.
      rates: learning rates to try, TUNING_TRIALS of them, where the rule is "tuned".
      standard_rates: the same for networks in standard parametrisation, if their good ones are
        elsewhere; see ``grid``.
      structure: the Fisher approximation, for natural gradients.
      fisher: "exact" (true), "mc" or "empirical".
      damping: in the convention of natgrad_flax (added to the Fisher with its 1/N).
      damping_words: for contestants without ``structure``: their damping and its convention.
      unsuitable: why a workload is nothing for it, or "".
      program: makes the training program instead of ``optimizer``, for peers that bring their own.
      packages: distributions that nothing else here needs; their versions enter the key of a trial.
    """

    name: str
    title: str
    family: Family
    rate_rule: RateRule
    optimizer: Optimizer | None = None
    rates: tuple[float, ...] = ()
    standard_rates: tuple[float, ...] = ()
    structure: ng.Structure | None = None
    fisher: FisherKind | None = None
    damping: Damping | None = None
    damping_words: str = ""
    unsuitable: Callable[[Workload], str] = lambda workload: ""
    program: Callable[[Contestant, Workload], Program] | None = None
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wanted = TUNING_TRIALS if self.rate_rule == "tuned" else 0
        for rates in (self.rates, self.standard_rates or self.rates):
            if len(set(rates)) != wanted or len(rates) != wanted:
                raise ValueError(
                    f"contestant {self.name}: a tuned one tries {TUNING_TRIALS} different "
                    f"learning rates, another none, got {rates}"
                )

    def grid(self, workload: Workload) -> tuple[float, ...]:
        """The learning rates to try on a workload, ascending.

        In NTK parametrisation a gradient is smaller by the root of the fan-in and a step has to be
        larger by it, so a rate of SGD lies higher by the fan-in, one of Adam by its root. The
        natural gradient does not depend on it: one grid serves both.
        """
        other = self.standard_rates if is_standard(workload) else ()
        return tuple(sorted(other or self.rates))

    def facts(self) -> dict[str, str]:
        """What the board says of the contestant, as JSON."""
        rule = f"tuned, {TUNING_TRIALS} trials" if self.rate_rule == "tuned" else self.rate_rule
        return {
            "title": self.title,
            "family": self.family,
            "structure": type(self.structure).__name__ if self.structure else "",
            "fisher": _FISHERS[self.fisher] if self.fisher else "",
            "damping": self.damping_words if self.damping is None else in_words(self.damping),
            "rate_rule": rule,
        }


_STANDARD = f"; {STANDARD_DAMPING:g} times as much in standard parametrisation"
_FISHERS = {
    "exact": "true",
    "mc": "Monte-Carlo, 1 sample",
    "empirical": "empirical",
    "improved": "improved empirical",
}


def is_standard(workload: Workload) -> bool:
    """Whether its network is in standard parametrisation, not in that of the NTK."""
    return workload.settings.get("parametrisation") == "standard"


def in_words(damping: Damping) -> str:
    """A damping with its convention."""
    if isinstance(damping, ng.RelativeDamping):
        return f"{damping.ratio:g} of the mean Gram diagonal"
    if isinstance(damping, ng.LevenbergMarquardt):
        return (
            f"Levenberg-Marquardt from {damping.initial:g}, at least {damping.minimum:g} "
            f"(cross-entropy: {CROSS_ENTROPY_MINIMUM:g}), added to the Fisher (1/N){_STANDARD}"
        )
    if damping == 0:
        return "none: pseudo-inverse"
    return f"{damping:g}, added to the Fisher (1/N){_STANDARD}"


@cache
def contestants() -> dict[str, Contestant]:
    """All contestants by name: ``CONTESTANTS`` of each module of ``contestants/``."""
    package = import_module("benchmarks.leaderboard.contestants")
    found: dict[str, Contestant] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        members: Iterable[Contestant] = getattr(
            import_module(f"{package.__name__}.{entry.name}"), "CONTESTANTS", ()
        )
        for contestant in members:
            if contestant.name in found:
                raise ValueError(f"two contestants are called {contestant.name!r}")
            found[contestant.name] = contestant
    return found


def find_contestant(name: str) -> Contestant:
    """A contestant by name.

    Raises:
      ValueError: unknown; the message offers the nearest name.
    """
    return contestants()[find("contestant", name, contestants())]
