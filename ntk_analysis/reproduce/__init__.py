"""Claims of papers as checks under the identifiers of the catalogue; one package per paper."""

from importlib import import_module

from ntk_analysis.reproduce.registry import (
    Check,
    Measurement,
    MissingDataError,
    Outcome,
    find_checks,
    registered,
)

PAPERS = ("karakida_osawa", "bernacchia", "kerekes", "van_oostrum", "natgrad")
"""Packages in here, each with ``MODULES``, which hold its checks, and ``ORDER``, that of its paper.

An entry of ``ORDER`` stands for every identifier that begins with it.
"""


def load_checks() -> tuple[Check, ...]:
    """Imports the checks of all papers.

    Returns:
      Every registered check, in the order of the papers.
    """
    order: list[str] = []
    for paper in PAPERS:
        package = import_module(f"{__name__}.{paper}")
        for module in package.MODULES:
            import_module(f"{package.__name__}.{module}")
        order.extend(package.ORDER)

    def place(check: Check) -> tuple[int, int]:
        fits = [prefix for prefix in order if check.identifier.startswith(prefix)]
        longest = max(fits, key=len, default="")
        return (order.index(longest) if fits else len(order), len(check.identifier))

    return tuple(sorted(registered(), key=place))


__all__ = [
    "PAPERS",
    "Check",
    "Measurement",
    "MissingDataError",
    "Outcome",
    "find_checks",
    "load_checks",
    "registered",
]
