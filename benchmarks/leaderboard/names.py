"""Names that a user gives, found or refused with the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def find(kind: str, name: str, known: Iterable[str]) -> str:
    """The name as it is known; case and underscores do not matter.

    Args:
      kind: what it names, for the message.
      name: as the user wrote it.
      known: all names.

    Raises:
      ValueError: unknown; the message offers the nearest name.
    """
    names = list(known)
    wanted = name.strip().lower().replace("_", "-")
    if wanted in names:
        return wanted
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {kind} {name!r}; {hint}known are {', '.join(names)}")
