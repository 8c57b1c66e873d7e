"""One colour, marker and name for each structure, in every figure of the project."""

from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    """How a structure is drawn.

    Attributes:
      label: its name in figures and tables.
      color: told apart under the common colour-vision deficiencies (Okabe & Ito 2008).
      marker: a Matplotlib marker, so that colour is never the only difference.
    """

    label: str
    color: str
    marker: str


STYLES: dict[str, Style] = {
    "GradientDescent": Style("Gradient descent", "#4d4d4d", "o"),
    "Exact": Style("Exact", "#0072B2", "s"),
    "BlockDiagonal": Style("Block-diagonal", "#D55E00", "D"),
    "BlockTriDiagonal": Style("Block tri-diagonal", "#009E73", "^"),
    "KFAC": Style("K-FAC", "#CC79A7", "v"),
    "EKFAC": Style("EKFAC", "#661100", "*"),
    "UnitWise": Style("Unit-wise", "#E69F00", "P"),
    "Diagonal": Style("Diagonal", "#56B4E9", "X"),
    "QuasiDiagonal": Style("Quasi-diagonal", "#8C6D1F", "p"),
    "LayerWise": Style("Layer-wise", "#6A3D9A", "h"),
}
"""Styles by the class name of the structure."""


def tint(color: str, strength: float) -> str:
    """A colour mixed with white: 1 leaves it as it is, 0 is white; both as "#rrggbb"."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(255 - strength * (255 - part)) for part in parts]
    return "#" + "".join(f"{part:02x}" for part in mixed)
