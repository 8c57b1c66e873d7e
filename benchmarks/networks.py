"""What a natural-gradient step of networks with shared weights costs, beside an SGD step.

A ConvNet and a small vision transformer at the sizes of CIFAR-10, with a Monte-Carlo Fisher. Their
lines of the table in docs/structures.md come from ``python -m benchmarks.step --line conv-mc``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from benchmarks.common import StepSuite, by_profile, profile
from benchmarks.problems import LINES, STRUCTURES, Line
from benchmarks.step import REPEATS, measure

CASES = by_profile(
    smoke=(["small conv", "small transformer"], ["K-FAC"]),
    fast=(["conv", "transformer"], ["K-FAC"]),
    regular=(["conv", "transformer"], list(STRUCTURES)),
    large=(["conv", "transformer"], list(STRUCTURES)),
)
"""Networks and structures; the fast profile has a minute for them."""


class NetworkStep(StepSuite):
    """One step of each structure on a ConvNet and on a vision transformer.

    A rise of the ratio says that weights which positions share got dearer: the patches of a
    convolution, the Jacobians of tokens, or the factors of K-FAC. Before anything counts, the step
    that was timed must satisfy G u = g to rounding.
    """

    params: ClassVar[tuple[list[Any], ...]] = CASES
    param_names: ClassVar = ["network", "structure"]

    def measure(self, network: str, structure: str) -> Mapping[str, float]:
        """All figures of a case; see the class.

        Raises:
          ArithmeticError: the step is not the natural gradient of its structure.
        """
        found = measure(line_of(network), STRUCTURES[structure], REPEATS)
        return {
            "ratio": found.ratio,
            "natural": found.natural,
            "sgd": found.sgd,
            "flops": found.flops / 1e9,
            "temporary": found.temporary_bytes,
        }

    def skipped(self, *case: Any) -> str | None:
        """What takes too long for the regular profile."""
        if profile() == "regular" and case[1] == "tri-diag":
            return "the coupled system of all layers costs ten times the others; large has it"
        return None


def line_of(network: str) -> Line:
    """The line of a network; the small ones are cut from the large."""
    if not network.startswith("small "):
        return LINES[f"{network}-mc"]
    whole = network.removeprefix("small ")
    shape = {"conv": (6, 6, 2), "transformer": (4, 4, 2)}[whole]
    return dataclasses.replace(
        LINES[f"{whole}-mc"], widths=(*shape, 3), num_samples=8, network=network
    )
