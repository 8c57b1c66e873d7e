"""One colour, marker and name for each structure, in every figure of the project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from natgrad_flax import Structure
from natgrad_flax.structures import STRUCTURES, Style
from natgrad_flax.structures.style import style_of_class
from ntk_analysis.gradient_descent import GradientDescent


class _Styles(dict[str, Style]):
    def __missing__(self, name: str) -> Style:
        """That of a class of somebody else's; made of the name where there is no such class."""
        found = (cls.style for cls in _subclasses(Structure) if cls.__name__ == name)
        return next(found, style_of_class(name))


def _subclasses(cls: Any) -> Iterator[type[Structure]]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


_CLASSES: tuple[type[Structure], ...] = (GradientDescent, *STRUCTURES)
STYLES = _Styles((cls.__name__, cls.style) for cls in _CLASSES)
"""Styles by the class name of the structure; whatever the name, there is one."""


def tint(color: str, strength: float) -> str:
    """A colour mixed with white: 1 leaves it as it is, 0 is white; both as "#rrggbb"."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(255 - strength * (255 - part)) for part in parts]
    return "#" + "".join(f"{part:02x}" for part in mixed)
