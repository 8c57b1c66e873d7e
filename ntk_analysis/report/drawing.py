"""Draws the figures of the report, for wide and for narrow screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntk_analysis.figures import draw_dynamics
from ntk_analysis.figures_theory import draw_isotropy, draw_prediction
from ntk_analysis.files import save_figure
from ntk_analysis.frame import NARROW, row_axis, sheet
from ntk_analysis.palette import STYLES, tint

FINITE = "accuracy at finite width"
"""The name of this part in results.json."""


@dataclass(frozen=True)
class Drawn:
    """One figure in both shapes.

    Attributes:
      wide: SVG file for wide screens and paper.
      narrow: SVG file for phones.
    """

    wide: Path
    narrow: Path


def draw_figures(document: dict[str, Any], out: Path) -> dict[str, Drawn]:
    """Draws every figure of a report, for wide and for narrow screens.

    Args:
      document: what results.json of the report holds.
      out: the folder.

    Returns:
      The figures by the names of their files; "learning_rates" only where a structure was trained
      at several.
    """
    wide, narrow = _draw(document, out, False), _draw(document, out / "narrow", True)
    return {name: Drawn(wide[name], narrow[name]) for name in wide}


def _draw(document: dict[str, Any], out: Path, narrow: bool) -> dict[str, Path]:
    """SVG files in one shape, by name; a wide figure is beside it as PNG."""
    parts = document["parts"]
    training, sweep, limit, finite = (
        parts[name] for name in ("training", "isotropy", "accuracy", FINITE)
    )
    files = [
        *draw_dynamics(training, list(training["methods"].values()), out, narrow),
        *draw_isotropy(sweep, list(sweep["methods"].values()), out, narrow),
        *draw_prediction(limit, list(limit["methods"].values()), out, narrow),
        *(_draw_accuracies(finite, out / "finite_accuracy.svg", narrow) if finite else ()),
    ]
    return {path.stem: path for path in files if path.suffix == ".svg"}


def _draw_accuracies(finite: Sequence[dict[str, Any]], out: Path, narrow: bool) -> list[Path]:
    """Test accuracies, a row a structure: every network as a dot, their mean as the marker."""
    records = finite[0]["methods"]
    with sheet((NARROW if narrow else 8.2, 0.9 + 0.42 * len(records)), narrow=True) as figure:
        axis = figure.subplots()
        for place, (name, record) in enumerate(records.items()):
            style = STYLES[record["structure"]]
            values = 100 * np.array([one["methods"][name]["accuracy"] for one in finite])
            offsets = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
            axis.plot(
                values, place + offsets, "o", color=tint(style.color, 0.45), markersize=4,
                markeredgewidth=0,
            )  # fmt: skip
            axis.plot(
                values.mean(), place, style.marker, color=style.color, markersize=9,
                markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
        labels = [STYLES[record["structure"]].label for record in records.values()]
        row_axis(axis, labels, f"accuracy in % on {finite[0]['data']['num_test']} test samples")
        return save_figure(figure, out, *([] if narrow else [out.with_suffix(".png")]))
