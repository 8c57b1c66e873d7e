"""How a structure is called and drawn: said once, by its class."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

# of structures that choose none: other colours and markers than those of this package
_COLORS = ("#882255", "#44AA99", "#332288", "#999933", "#AA4499", "#117733")
_MARKERS = ("<", ">", "8", "d")


class Style(NamedTuple):
    """How a structure is called and drawn.

    Attributes:
      label: its name in figures and tables.
      color: "#rrggbb", told apart under the common colour-vision deficiencies (Okabe & Ito 2008).
      marker: a Matplotlib marker, so that colour is never the only difference.
      command: its name on command lines and in results, lower case with hyphens; "" for a
        structure that needs arguments, and so has none.
      short: its name in narrow columns.
      aliases: other names that a command takes.
    """

    label: str
    color: str
    marker: str
    command: str
    short: str
    aliases: tuple[str, ...] = ()


def styled(
    label: str,
    color: str = "",
    marker: str = "",
    *,
    command: str | None = None,
    short: str = "",
    aliases: Sequence[str] = (),
) -> Style:
    """A style; what is left out is made of the label, the same in every process.

    Args:
      label: as in ``Style``.
      color: as in ``Style``.
      marker: as in ``Style``.
      command: as in ``Style``; the label in lower case with hyphens unless given.
      short: as in ``Style``; the command unless given.
      aliases: as in ``Style``; the label and the short name always belong to them.
    """
    plain = label.lower().replace(" ", "-")
    command = plain if command is None else command
    number = zlib.crc32(label.encode())
    others = dict.fromkeys((plain, short.lower(), *aliases))
    return Style(
        label,
        color or _COLORS[number % len(_COLORS)],
        marker or _MARKERS[number // len(_COLORS) % len(_MARKERS)],
        command,
        short or command,
        tuple(name for name in others if name and name != command),
    )


def style_of_class(name: str) -> Style:
    """The style of a class that says nothing of itself: "BlockDiagonal" becomes "Block diagonal".

    Args:
      name: of the class.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z_]+", name)
    first, *rest = words or [name]
    return styled(" ".join([first, *(w if w.isupper() else w.lower() for w in rest)]))
