"""What the suites share: profiles, skips, and one measurement for all figures of a case."""

from __future__ import annotations

import itertools
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from benchmarks.machine import check_machine
from ntk_analysis.names import did_you_mean
from ntk_analysis.results import content_hash, write_json

VARIABLE = "NATGRAD_BENCH_PROFILE"
PROFILES = ("smoke", "fast", "regular", "large")
"""From seconds to hours: sizes of the tests, of `make bench`, of a workstation, of a GPU."""

FAILED = "failed"
"""The key of a failure, kept in place of figures: those that come later need not repeat it."""

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])


def profile() -> str:
    """The profile that the environment variable NATGRAD_BENCH_PROFILE names; "fast" without it.

    Raises:
      ValueError: there is no such profile; the nearest name is offered.
    """
    name = os.environ.get(VARIABLE) or "fast"
    if name not in PROFILES:
        hint = did_you_mean(name, PROFILES)
        raise ValueError(f"{VARIABLE}={name!r}: {hint}profiles are {', '.join(PROFILES)}")
    return name


def by_profile(*, smoke: Value, fast: Value, regular: Value, large: Value) -> Value:
    """The value for the profile of this process."""
    return {"smoke": smoke, "fast": fast, "regular": regular, "large": large}[profile()]


def unit(name: str) -> Callable[[Function], Function]:
    """Says in which unit asv shows what a benchmark returns."""

    def mark(function: Function) -> Function:
        function.unit = name  # type: ignore[attr-defined]
        return function

    return mark


class Suite(ABC):
    """Cases that are measured once each, however many figures asv tracks of them.

    asv runs every figure of every case in a process of its own. The first of them measures, checks
    what it measured, and leaves all figures in the folder that asv keeps for the suite and commit;
    the others read them. A subclass says what the cases are (``params``, ``param_names``), which
    have no meaning (``skipped``), and how one is measured (``measure``); its ``track_`` methods
    return entries of ``self.figures``.

    Attributes:
      figures: what ``measure`` found in this case.
    """

    params: ClassVar[tuple[list[Any], ...]]
    param_names: ClassVar[list[str]]
    # by hand: edits that measure the same thing keep the history
    version: ClassVar[str] = "1"
    timeout: ClassVar[float] = 900
    figures: dict[str, float]

    def skipped(self, *case: Any) -> str | None:
        """Why a case is left out, or None."""
        return None

    # without it a class stays abstract, and asv passes those by
    @abstractmethod
    def measure(self, *case: Any) -> Mapping[str, float]:
        """All figures of a case.

        Raises:
          ArithmeticError: what was measured gives a wrong answer.
        """

    def setup_cache(self) -> str:
        """The folder for the figures: asv starts its processes in one of each commit."""
        return os.getcwd()

    def setup(self, folder: str, *case: Any) -> None:
        """Reads the figures of a case, or measures them where no process has done so.

        Raises:
          NotImplementedError: the case is left out; asv prints the reason and takes this for
            "n/a", not for a failure.
          RuntimeError: the measurement failed in the process of another figure, or JAX runs on
            another device than the machine of the results.
        """
        reason = self.skipped(*case)
        if reason:
            raise NotImplementedError(reason)
        name = f"{type(self).__name__}-{content_hash([profile(), list(case)])[:16]}.json"
        path = Path(folder) / name
        if not path.exists():
            check_machine()
            try:
                write_json(path, dict(self.measure(*case)))
            except NotImplementedError:
                raise
            except Exception as error:
                write_json(path, {FAILED: f"{type(error).__name__}: {error}"})
                raise
        found = json.loads(path.read_text(encoding="utf-8"))
        if FAILED in found:
            raise RuntimeError(f"measured before, and failed: {found[FAILED]}")
        # JSON has no number for what is not finite
        self.figures = {key: math.nan if entry is None else entry for key, entry in found.items()}

    @classmethod
    def cases(cls) -> list[tuple[Any, ...]]:
        """Every combination of parameters, those that are skipped included."""
        return list(itertools.product(*cls.params))


class StepSuite(Suite):
    """A natural-gradient step beside an SGD step on the same problem.

    ``measure`` gives "ratio", "natural", "sgd", "flops" and "temporary".
    """

    @unit("SGD steps")
    def track_ratio_to_sgd(self, *case: Any) -> float:
        """Median step over the median SGD step beside it: up means a dearer natural gradient.

        The two alternate in one process, so a busy machine moves it less than it moves seconds.
        """
        return self.figures["ratio"]

    @unit("seconds")
    def track_step(self, *case: Any) -> float:
        """Median seconds of the natural-gradient step: up means slower training on this machine."""
        return self.figures["natural"]

    @unit("seconds")
    def track_sgd_step(self, *case: Any) -> float:
        """Median seconds of the SGD step: no code of ours, so up means a machine, JAX or Flax."""
        return self.figures["sgd"]

    @unit("Gflop")
    def track_flops(self, *case: Any) -> float:
        """XLA's count for the step: up means a program that computes more.

        LAPACK calls are not in it, and the body of a loop counts once.
        """
        return self.figures["flops"]

    @unit("bytes")
    def track_temporary_memory(self, *case: Any) -> float:
        """What XLA reserves beside arguments and results: up means that less fits."""
        return self.figures["temporary"]
