"""A contestant: an optimizer with everything that its results depend on; and their register."""

from __future__ import annotations

import math
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from benchmarks.leaderboard.studies import STUDIES, TRIALS, Space
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping
from ntk_analysis.names import find

if TYPE_CHECKING:
    # a contestant that has no structure does not depend on any: its key does not, either
    from natgrad_flax import Structure
    from natgrad_flax.signals.fisher import FisherKind

Family = Literal["first-order", "quasi-Newton", "natural-gradient", "peer"]
RateRule = Literal[
    "theoretical", "theoretical: 1", "tuned", "line search", "fixed", "quadratic model"
]  # fmt: skip
Ruleset = Literal["tuned", "self-tuning"]
Damping = float | RelativeDamping | LevenbergMarquardt
Optimizer = Callable[[Workload, Array | float, int], optax.GradientTransformation]

SELF_TUNING = 1.5
"""How many times the budget of a workload a contestant has that nothing is tuned for."""


# the Fisher of cross-entropy vanishes as the classes are told apart; damping that followed it down
# would let each batch throw the parameters away
CROSS_ENTROPY_MINIMUM = 1e-2

# the entries of a Fisher in standard parametrisation are larger by the fan-in, some dozens here: a
# damping that is to mean the same as in NTK parametrisation has to be larger, too
STANDARD_DAMPING = 30.0


class Program(Protocol):
    """How a trial trains. States are whatever the program likes.

    Attributes:
      compile_seconds: what making the step took, compilation included.
    """

    compile_seconds: float

    def start(self, seed: int, rate: float) -> Any:
        """The state at the initial parameters of a seed."""
        ...

    def step(self, state: Any, batch: NDArray[np.integer] | None) -> Any:
        """One step on these rows of the training set, on all of them for None; may return early."""
        ...

    def wait(self, state: Any) -> None:
        """Returns when all steps up to this state are done."""
        ...

    def parameters(self, state: Any) -> nnx.State:
        """The parameters, in the tree of ``nnx.state(workload.model(seed))``."""
        ...


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
      rates: the smallest and the largest learning rate to try, where the rule is "tuned"; those
        in between, which entries may have, say nothing.
      standard_rates: the same for networks in standard parametrisation, if their good ones are
        elsewhere; see ``space``.
      judged: from the optimizer's state and the parameters that it moves to those that are judged,
        where these are others, as an average over steps is.
      structure: the Fisher approximation, for natural gradients.
      fisher: "exact" (true), "mc" or "empirical".
      damping: in the convention of natgrad_flax (added to the Fisher with its 1/N).
      damping_words: for contestants without ``structure``: their damping and its convention.
      unsuitable: why a workload is nothing for it, or "".
      program: makes the training program instead of ``optimizer``, for peers that bring their own.
      packages: distributions that nothing else here needs; their versions enter the key of a trial.
      source: the file that it stands in, which the register sets.
    """

    name: str
    title: str
    family: Family
    rate_rule: RateRule
    optimizer: Optimizer | None = None
    rates: tuple[float, ...] = ()
    standard_rates: tuple[float, ...] = ()
    judged: Callable[[Any, Any], Any] | None = None
    structure: Structure | None = None
    fisher: FisherKind | None = None
    damping: Damping | None = None
    damping_words: str = ""
    unsuitable: Callable[[Workload], str] = lambda workload: ""
    program: Callable[[Contestant, Workload], Program] | None = None
    packages: tuple[str, ...] = ()
    source: Path = Path(__file__)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(
                f"the name of a contestant is in lower case with hyphens, got {self.name!r}"
            )
        if self.family not in get_args(Family) or self.rate_rule not in get_args(RateRule):
            raise ValueError(
                f"contestant {self.name}: family is one of {', '.join(get_args(Family))} and "
                f"rate_rule one of {', '.join(get_args(RateRule))}, "
                f"got {self.family!r} and {self.rate_rule!r}"
            )
        if self.optimizer and self.program:
            raise ValueError(f"contestant {self.name} has optimizer= and program=: give one")
        tuned = self.rate_rule == "tuned"
        for rates in (self.rates, self.standard_rates or self.rates):
            if tuned != bool(rates) or (rates and not 0 < min(rates) < max(rates) < math.inf):
                raise ValueError(
                    f"contestant {self.name}: a tuned one names the smallest and the largest "
                    f"learning rate to try, both positive, another none, got {rates}"
                )

    @property
    def ruleset(self) -> Ruleset:
        """By which rules it runs: tuned on every workload, or by itself with a larger budget."""
        return "tuned" if self.rate_rule == "tuned" else "self-tuning"

    def budgeted(self, workload: Workload) -> Workload:
        """A workload with the budget of the contestant's ruleset."""
        if self.ruleset == "tuned":
            return workload
        steps, seconds = workload.max_steps, workload.max_seconds
        return replace(
            workload, max_steps=math.ceil(SELF_TUNING * steps), max_seconds=SELF_TUNING * seconds
        )

    @property
    def is_entry(self) -> bool:
        """Whether it was enlisted from a file of somebody else."""
        return self.name in _enlisted

    def space(self, workload: Workload) -> Space:
        """The smallest and the largest learning rate to try on a workload.

        In NTK parametrisation a gradient is smaller by the root of the fan-in and a step has to be
        larger by it, so a rate of SGD lies higher by the fan-in, one of Adam by its root. The
        natural gradient does not depend on it: one space serves both.
        """
        rates = (is_standard(workload) and self.standard_rates) or self.rates
        return min(rates), max(rates)

    def facts(self) -> dict[str, str]:
        """What the board says of the contestant, as JSON."""
        tuned = f"tuned, {STUDIES} studies of {TRIALS} trials"
        rule = tuned if self.rate_rule == "tuned" else self.rate_rule
        return {
            "title": self.title,
            "family": self.family,
            "structure": type(self.structure).__name__ if self.structure else "",
            "fisher": _FISHERS[self.fisher] if self.fisher else "",
            "damping": self.damping_words if self.damping is None else in_words(self.damping),
            "rate_rule": rule,
            "ruleset": self.ruleset,
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
    if isinstance(damping, RelativeDamping):
        return f"{damping.ratio:g} of the mean Gram diagonal"
    if isinstance(damping, LevenbergMarquardt):
        return (
            f"Levenberg-Marquardt from {damping.initial:g}, at least {damping.minimum:g} "
            f"(cross-entropy: {CROSS_ENTROPY_MINIMUM:g}), added to the Fisher (1/N){_STANDARD}"
        )
    if damping == 0:
        return "none: pseudo-inverse"
    return f"{damping:g}, added to the Fisher (1/N){_STANDARD}"


def contestants() -> dict[str, Contestant]:
    """All contestants by name: those of ``contestants/``, then the entries that were enlisted."""
    return {**_built_in(), **_enlisted}


_enlisted: dict[str, Contestant] = {}


@cache
def _built_in() -> dict[str, Contestant]:
    package = import_module("benchmarks.leaderboard.contestants")
    found: dict[str, Contestant] = {}
    for module in pkgutil.iter_modules(package.__path__):
        _add(found, import_module(f"{package.__name__}.{module.name}"))
    return found


def enlist(file: Path) -> list[Contestant]:
    """Makes the contestants of a file of somebody else known by their names, in this process.

    Args:
      file: a module with ``CONTESTANTS``, as those of ``contestants/`` are. It can import modules
        that stand beside it.

    Returns:
      They, in the order of the file.

    Raises:
      ValueError: no Python file, one that cannot be imported, or without contestants; or a name
        that is taken.
    """
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{file} is no Python file; name the file of an entry")
    folder = str(file.resolve().parent)
    spec = spec_from_file_location(f"leaderboard_entry_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise ValueError(
            f"{file} ends the program while it is imported (exit code {error.code}): take that out"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} cannot be imported, {reason}") from error
    known = dict(contestants())
    names = _add(known, module)
    _enlisted.update({name: known[name] for name in names})
    return [known[name] for name in names]


def _add(found: dict[str, Contestant], module: ModuleType) -> list[str]:
    """Adds the contestants of a module; their names."""
    file = Path(str(module.__file__))
    members: object = getattr(module, "CONTESTANTS", ())
    if not isinstance(members, (tuple, list)) or not members:
        raise ValueError(f"{file.name} has no CONTESTANTS, a tuple of Contestant(...)")
    names: list[str] = []
    for member in members:
        if not isinstance(member, Contestant):
            raise ValueError(f"CONTESTANTS of {file.name} has {member!r}, which is no Contestant")
        if member.name in found:
            raise ValueError(f"two contestants are called {member.name!r}; {file.name} has one")
        found[member.name] = replace(member, source=file)
        names.append(member.name)
    return names


def find_contestant(name: str) -> Contestant:
    """A contestant by name.

    Raises:
      ValueError: unknown; the message offers the nearest name.
    """
    return contestants()[find("contestant", name, contestants())]
