"""The registry of figures: how that of a check is drawn from the data of its record."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = Callable[[dict[str, Any]], "Figure"]
_Function = TypeVar("_Function", bound=Callable[..., "Figure"])

DRAWINGS: dict[str, Drawing] = {}
"""By the identifier of the check; ``load_checks`` fills it."""
_NUMBERS: dict[str, str] = {}


def figure_number(identifier: str) -> str:
    """The number of the paper's figure, such as "1a"; "" for a check of something else."""
    found = re.search(r"-Fig(\w+)", identifier)
    return found[1] if found else _NUMBERS.get(identifier, "")


def draws(*identifiers: str, number: str = "", **options: Any) -> Callable[[_Function], _Function]:
    """Registers a function as the drawing of checks.

    Args:
      identifiers: of the checks.
      number: of the paper's figure, where the identifier does not say it.
      options: what the function gets beside the data.

    Raises:
      ValueError: the figure of a check is drawn already.
    """
    for identifier in identifiers:
        if identifier in DRAWINGS:
            raise ValueError(f"the figure of {identifier} is registered twice")

    def register(function: _Function) -> _Function:
        DRAWINGS.update(dict.fromkeys(identifiers, partial(function, **options)))
        _NUMBERS.update(dict.fromkeys(identifiers, number))
        return function

    return register
