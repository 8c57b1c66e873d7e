"""Claims of papers as checks under the identifiers of the catalogue; one package per paper."""

from importlib import import_module

from ntk_analysis.names import find
from ntk_analysis.reproduce import bernacchia, karakida_osawa, kerekes, natgrad, van_oostrum
from ntk_analysis.reproduce.papers import Paper
from ntk_analysis.reproduce.registry import (
    Check,
    Measurement,
    MissingDataError,
    Outcome,
    find_checks,
    registered,
)

PAPERS: dict[str, Paper] = {
    package.__name__.rpartition(".")[2]: package.PAPER
    for package in (karakida_osawa, bernacchia, kerekes, van_oostrum, natgrad)
}
"""By the name of the package in here that has its checks, their figures, and ``words.html``."""


def load_checks() -> tuple[Check, ...]:
    """Imports the checks of all papers, and how their figures are drawn.

    Returns:
      Every registered check, in the order of the papers.
    """
    order: list[str] = []
    for name, paper in PAPERS.items():
        for module in paper.modules:
            import_module(f"{__name__}.{name}.{module}")
        order.extend(paper.order)

    def place(check: Check) -> tuple[int, int]:
        fits = [prefix for prefix in order if check.identifier.startswith(prefix)]
        longest = max(fits, key=len, default="")
        return (order.index(longest) if fits else len(order), len(check.identifier))

    return tuple(sorted(registered(), key=place))


def paper_of(identifier: str) -> str | None:
    """The name of the paper that a check belongs to; None for a check of no paper here."""
    prefix = identifier.partition("-")[0]
    return next((name for name, paper in PAPERS.items() if paper.prefix == prefix), None)


def find_paper(prefix: str) -> str:
    """The name of the paper whose checks begin with "KO", say; case does not matter.

    Raises:
      ValueError: there is none; the message says which there are.
    """
    names = {paper.prefix.lower(): name for name, paper in PAPERS.items()}
    return names[find("paper", prefix, names)]


__all__ = [
    "PAPERS",
    "Check",
    "Measurement",
    "MissingDataError",
    "Outcome",
    "Paper",
    "find_checks",
    "find_paper",
    "load_checks",
    "paper_of",
    "registered",
]
