"""The registry of checks: what a paper claims, what is expected of us, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from natgrad_flax.arguments.renamed import Renamed
from ntk_analysis.names import did_you_mean
from ntk_analysis.reproduce.ruler import Error

Report = Callable[[str], object]
"""Called with what is being done now."""


Origin = Literal["paper", "paper, partly", "ours"]
Kind = Literal["misprint", "too general", "depends on solver or setting", "misread by us"]
KINDS: dict[Kind, str] = {
    "misprint": "holds with a misprint corrected",
    "too general": "holds under a further condition",
    "depends on solver or setting": "holds for one choice of what is not stated, not for another",
    "misread by us": "is right, and an earlier version of this project had misread it",
}
"""What a remark can say of a claim, with its meaning."""


class MissingDataError(RuntimeError):
    """A check needs data that are not on this machine; the message says which."""


@dataclass(frozen=True)
class Measurement:
    """One number of a check beside what it should be.

    Attributes:
      what: the quantity, with its setting.
      measured: the number.
      expected: in words, tolerance included.
      passed: whether it is as expected.
    """

    what: str
    measured: float
    expected: str
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
      measurements: at least one.
      data: curves and tables for figures, as JSON has them.
      notes: what a reader should know, such as a bound of the catalogue that does not hold.
    """

    measurements: tuple[Measurement, ...]
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every measurement is as expected."""
        return all(m.passed for m in self.measurements)


USUAL_MEMORY = 3 * 10**9
"""Bytes that a check may take without saying so."""


@dataclass(frozen=True)
class Check:
    """A claim of a paper that can be measured.

    Attributes:
      identifier: that of the catalogue, such as "KO-Fig1a".
      title: a few words.
      claim: what the paper says, in its own sense.
      setting: sizes, data, seeds.
      origin: whether the setting is the paper's, in part, or, where it states none, ours.
      run: does it. It gets a ``Report``, and raises ``MissingDataError`` where data are missing.
      kind: what kind of remark there is; "" where the claim holds as printed.
      remark: what holds, and on what it depends; "" where there is nothing to say.
      fast: seconds rather than minutes, so that the tests run it.
      differs: what is ours in a setting that is the paper's in part.
      memory: bytes that it takes at most, so that those which run side by side find room.
    """

    identifier: str
    title: str
    claim: str
    setting: str
    origin: Origin
    run: Callable[[Report], Outcome]
    kind: Kind | Literal[""] = ""
    remark: str = ""
    fast: bool = False
    differs: str = ""
    memory: int = USUAL_MEMORY

    erratum = Renamed("remark")

    @property
    def words(self) -> dict[str, Any]:
        """What a page says of the claim, whatever was measured."""
        names = ("title", "claim", "origin", "differs", "kind", "remark")
        return {name: getattr(self, name) for name in names}


_CHECKS: dict[str, Check] = {}


def check(
    identifier: str,
    title: str,
    *,
    claim: str,
    setting: str,
    origin: Origin,
    kind: Kind | Literal[""] = "",
    remark: str = "",
    fast: bool = False,
    differs: str = "",
    memory: int = USUAL_MEMORY,
) -> Callable[[Callable[[Report], Outcome]], Callable[[Report], Outcome]]:
    """Registers a function as a check; the arguments are ``Check``'s.

    Raises:
      ValueError: the identifier is taken.
    """
    if identifier in _CHECKS:
        raise ValueError(f"the check {identifier} is registered twice")

    def register(run: Callable[[Report], Outcome]) -> Callable[[Report], Outcome]:
        _CHECKS[identifier] = Check(
            identifier, title, claim, setting, origin, run, kind, remark, fast, differs, memory
        )
        return run

    return register


def registered() -> tuple[Check, ...]:
    """All checks that have been registered, in the order of the papers."""
    return tuple(_CHECKS.values())


def find_checks(identifiers: Iterable[str]) -> tuple[Check, ...]:
    """Checks by identifier; case does not matter.

    Raises:
      ValueError: one is unknown; the message offers the nearest ones.
    """
    known = {name.lower(): check for name, check in _CHECKS.items()}
    found: dict[str, Check] = {}
    for identifier in identifiers:
        chosen = known.get(identifier.strip().lower())
        if chosen is None:
            hint = did_you_mean(identifier, _CHECKS, most=3)
            raise ValueError(
                f"unknown check {identifier!r}; {hint}natgrad reproduce --list shows them"
            )
        found[chosen.identifier] = chosen
    return tuple(found.values())


def close(what: str, measured: float, expected: float, tolerance: float) -> Measurement:
    """Within an absolute tolerance of a number."""
    passed = math.isfinite(measured) and abs(measured - expected) <= tolerance
    return Measurement(what, measured, f"{expected:g} ± {tolerance:g}", passed)


def below(what: str, measured: float, bound: float) -> Measurement:
    """Below a bound, or equal to it."""
    return Measurement(what, measured, f"≤ {bound:g}{_norm(measured)}", bool(measured <= bound))


def above(what: str, measured: float, bound: float) -> Measurement:
    """Above a bound, or equal to it; infinity counts."""
    return Measurement(what, measured, f"≥ {bound:g}{_norm(measured)}", bool(measured >= bound))


def _norm(measured: float) -> str:
    """The norm of a bound on an error."""
    return f" ({measured.norm})" if isinstance(measured, Error) else ""


def between(what: str, measured: float, low: float, high: float) -> Measurement:
    """Inside a closed interval."""
    return Measurement(what, measured, f"{low:g} to {high:g}", bool(low <= measured <= high))
