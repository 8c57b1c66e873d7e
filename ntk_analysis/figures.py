"""Figures of training curves: theory as lines, networks as markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntk_analysis.files import save_figure
from ntk_analysis.palette import STYLES, tint
from ntk_analysis.tables import setting_sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = 1e-10
_SAME_CURVE = 0.02  # in decades
_LINE_WIDTH = 1.8
_COVERED_WIDTH = 2.2
_MARKER_SIZES = (11.0, 6.5)  # from the first method, drawn at the bottom, to the last


def draw_dynamics(
    document: dict[str, Any], records: Sequence[dict[str, Any]], out: Path
) -> list[Path]:
    """Draws all figures of ``natgrad dynamics``, as PNG and SVG.

    Args:
      document: what results.json holds.
      records: the methods to show.
      out: the folder.

    Returns:
      The files: ``loss`` with every structure at its largest learning rate, and
      ``learning_rates`` where a structure was trained at several.
    """
    largest: dict[str, dict[str, Any]] = {}
    for record in records:
        other = largest.setdefault(record["structure"], record)
        if record["factor"] > other["factor"]:
            largest[record["structure"]] = record
    title = "Natural-gradient training: network beside kernel theory"
    files = _draw(document, list(largest.values()), out / "loss", title)
    several = [name for name in largest if sum(r["structure"] == name for r in records) > 1]
    if several:
        shown = [r for r in records if r["structure"] in ("GradientDescent", *several)]
        shown.sort(key=lambda r: (r["structure"] in several, r["structure"], r["factor"]))
        title = r"Learning rates $\eta = c\,/\,\alpha$; in theory, residual $\propto (1-c)^t$"
        files += _draw(document, shown, out / "learning_rates", title)
    return files


def _draw(
    document: dict[str, Any], records: Sequence[dict[str, Any]], stem: Path, title: str
) -> list[Path]:
    # these take seconds to import, which other commands should not cost
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.figure import Figure

    style = {**sns.axes_style("whitegrid"), **sns.plotting_context("notebook", font_scale=0.9)}
    style |= {"grid.color": "#e6e6e6", "grid.linewidth": 0.8, "svg.hashsalt": "natgrad"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        axes = figure.subplots(1, 2)
        hidden = False
        for axis, part, sign in zip(axes, ("train", "test"), ("", "'"), strict=True):
            hidden |= _draw_panel(axis, records, f"{part}_loss")
            name = "training" if part == "train" else "test"
            axis.set_title(f"{name} loss, N{sign} = {document['data'][f'num_{part}']}")
        axes[0].set_ylabel(r"$\frac{1}{2N}\sum_n |y_n - f(x_n)|^2$")
        _add_legend(figure, records)
        figure.suptitle(f"{title}\n{setting_sentence(document)}", fontsize="medium")
        if hidden:
            figure.supxlabel(
                r"Curves that reach the bottom edge lie at or below $10^{-10}$ from there on. "
                "Coinciding curves are drawn inside each other.",
                fontsize="small",
                color="#555555",
            )
        return save_figure(figure, stem.with_suffix(".png"), stem.with_suffix(".svg"))


def _draw_panel(axis: Axes, records: Sequence[dict[str, Any]], which: str) -> bool:
    """Draws a panel; returns whether values below the floor were left out."""
    from matplotlib.ticker import MaxNLocator

    lines = [_drawn_theory(record, which) for record in records]
    networks = [np.array(record["network"][which], float) for record in records]
    hidden = any((line <= _FLOOR).any() for line in lines)
    for index, (record, line) in enumerate(zip(records, lines, strict=True)):
        covering = sum(_coincide(line, other) for other in lines[index + 1 :])
        axis.plot(
            np.arange(len(line)),
            line,
            color=_color(record, records),
            linewidth=_LINE_WIDTH + _COVERED_WIDTH * covering,
            solid_joinstyle="round",
            zorder=2,
        )
    sizes = np.linspace(_MARKER_SIZES[0], _MARKER_SIZES[1], max(len(records), 2))
    for record, values, size in zip(records, networks, sizes, strict=False):
        shown = np.where(values >= _FLOOR, values, np.nan)
        hidden |= bool((values < _FLOOR).any())
        axis.plot(
            np.arange(len(values)),
            shown,
            linestyle="none",
            marker=STYLES[record["structure"]].marker,
            color=_color(record, records),
            markeredgecolor="white",
            markeredgewidth=0.7,
            markersize=size,
            zorder=3,
        )
    axis.set_yscale("log")
    if hidden:
        axis.set_ylim(bottom=_FLOOR)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return hidden


def _drawn_theory(record: dict[str, Any], which: str) -> NDArray[np.float64]:
    """The curve down to the floor; nothing after it, for a curve that stays there."""
    curve = np.array(record["theory"][which], float)
    drawn = np.maximum(curve, _FLOOR)
    below = np.flatnonzero(curve > _FLOOR)
    last = below[-1] + 1 if below.size else 0
    drawn[last + 1 :] = np.nan
    return drawn


def _coincide(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    same_end = np.array_equal(np.isnan(first), np.isnan(second))
    return same_end and bool(np.nanmax(np.abs(np.log10(first / second))) < _SAME_CURVE)


def _color(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The colour of the structure, lighter for its smaller learning rates."""
    top = max(r["factor"] for r in records if r["structure"] == record["structure"])
    return tint(STYLES[record["structure"]].color, (record["factor"] / top) ** 0.5)


def _add_legend(figure: Figure, records: Sequence[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#222222", linewidth=_LINE_WIDTH, label="theory (linearised network)"),
        Line2D([], [], color="#222222", linestyle="none", marker="o", label="network"),
        Line2D([], [], linestyle="none", label=""),
    ]
    handles += [
        Line2D(
            [],
            [],
            color=_color(record, records),
            marker=STYLES[record["structure"]].marker,
            markeredgecolor="white",
            markeredgewidth=0.7,
            markersize=_MARKER_SIZES[1] + 1.5,
            linewidth=_LINE_WIDTH,
            label=_legend_label(record),
        )
        for record in records
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _legend_label(record: dict[str, Any]) -> str:
    over = r"\alpha" if record["learning_rate_rule"] == "1/alpha" else r"\lambda_{\max}"
    return rf"{STYLES[record['structure']].label}, $\eta = {record['factor']:g}\,/\,{over}$"
