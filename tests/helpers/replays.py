"""Slow checks with what they measured read from their stored records, right and with a fault.

What takes minutes in a check is replaced by its stored outcome; the check itself, which judges it,
runs as it is. One fault a check: the outcome that a wrong program would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]
StandIns = dict[str, Any]


class Replay(NamedTuple):
    """A check without its computation.

    Attributes:
      what: is wrong where something is.
      stand_ins: from the record, and whether there is a fault, to what stands in the place of
        names of the check's module.
    """

    what: str
    stand_ins: Callable[[Record, bool], StandIns]


REPLAYS: dict[str, Replay] = {}
"""By the identifier of the check; ``replays_*.py``, one a paper, fill it."""


def replay(*identifiers: str, what: str) -> Callable[[Any], Any]:
    """Registers how checks are replayed; ``what`` is wrong in them."""

    def register(stand_ins: Any) -> Any:
        REPLAYS.update(dict.fromkeys(identifiers, Replay(what, stand_ins)))
        return stand_ins

    return register


def numbers(values: Any) -> np.ndarray:
    """Numbers of JSON, where None is one that is not finite."""
    return np.array([np.inf if value is None else value for value in values], float)


def measured(record: Record, beginning: str) -> float:
    """The number of the first row that begins so."""
    rows = record["measurements"]
    value = next(row["measured"] for row in rows if row["what"].startswith(beginning))
    return np.inf if value is None else value


def always(value: Any) -> Callable[..., Any]:
    """A function that returns this whatever it is asked."""
    return lambda *args, **options: value
