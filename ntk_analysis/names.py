"""Names that a user gives, found or refused with the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """The question that offers the known names nearest to an unknown one; case does not matter.

    Args:
      name: as the user wrote it.
      known: all names.
      most: how many names are offered at most.

    Returns:
      "did you mean 'a' or 'b'? " with the space behind it, or "" where no name is near.
    """
    names = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.strip().lower(), names, n=most, cutoff=0.4)
    return f"did you mean {' or '.join(repr(names[entry]) for entry in near)}? " if near else ""


def find(
    kind: str, name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """The name as it is known; case and underscores do not matter.

    Args:
      kind: what it names, for the message.
      name: as the user wrote it.
      known: all names, in lower case and with hyphens.
      aliases: other names of them.

    Raises:
      ValueError: unknown; the message offers the nearest name.
    """
    names = list(known)
    wanted = name.strip().lower().replace("_", "-")
    wanted = (aliases or {}).get(wanted, wanted)
    if wanted in names:
        return wanted
    hint = did_you_mean(wanted, names)
    raise ValueError(f"unknown {kind} {name!r}; {hint}known are {', '.join(names)}")
