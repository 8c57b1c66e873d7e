"""Figures of training curves: theory as lines, networks as markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntk_analysis.files import save_figure
from ntk_analysis.frame import NARROW, sheet
from ntk_analysis.palette import STYLES, tint
from ntk_analysis.tables import method_label, setting_sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLOOR = 1e-10
_SAME_CURVE = 0.02  # in decades
_LINE_WIDTH = 1.8
_COVERED_WIDTH = 2.2
_MARKER_SIZES = (11.0, 6.5)  # from the first method, drawn at the bottom, to the last


def draw_dynamics(
    document: dict[str, Any], records: Sequence[dict[str, Any]], out: Path, narrow: bool = False
) -> list[Path]:
    """Draws all figures of ``natgrad dynamics``, as PNG and SVG.

    Args:
      document: what results.json holds.
      records: the methods to show.
      out: the folder.
      narrow: for a narrow screen, as SVG alone: training losses, in ``loss`` a panel a structure.

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
    top = list(largest.values())
    if narrow:
        files = [_draw_each(top, out / "loss.svg")]
    else:
        files = _draw(document, top, out / "loss", title)
    several = [name for name in largest if sum(r["structure"] == name for r in records) > 1]
    if several:
        shown = [r for r in records if r["structure"] in ("GradientDescent", *several)]
        shown.sort(key=lambda r: (r["structure"] in several, r["structure"], r["factor"]))
        title = r"Learning rates $\eta = c\,/\,\alpha$; in theory, residual $\propto (1-c)^t$"
        if narrow:
            files.append(_draw_together(shown, out / "learning_rates.svg"))
        else:
            files += _draw(document, shown, out / "learning_rates", title)
    return files


def _draw(
    document: dict[str, Any], records: Sequence[dict[str, Any]], stem: Path, title: str
) -> list[Path]:
    with sheet((12, 4.8)) as figure:
        axes = figure.subplots(1, 2)
        hidden = False
        for axis, part, sign in zip(axes, ("train", "test"), ("", "'"), strict=True):
            hidden |= _draw_panel(axis, records, f"{part}_loss")
            name = "training" if part == "train" else "test"
            axis.set_title(f"{name} loss, N{sign} = {document['data'][f'num_{part}']}")
        axes[0].set_ylabel(r"$\frac{1}{2N}\sum_n |y_n - f(x_n)|^2$")
        figure.legend(handles=_handles(records), loc="outside right center", frameon=False)
        figure.suptitle(f"{title}\n{setting_sentence(document)}", fontsize="medium")
        if hidden:
            figure.supxlabel(
                r"Curves that reach the bottom edge lie at or below $10^{-10}$ from there on. "
                "Coinciding curves are drawn inside each other.",
                fontsize="small",
                color="#555555",
            )
        return save_figure(figure, stem.with_suffix(".png"), stem.with_suffix(".svg"))


def _draw_each(records: Sequence[dict[str, Any]], out: Path) -> Path:
    """A panel a method; gradient descent stands in every one for comparison."""
    rows = (len(records) + 1) // 2
    descent = [r for r in records if r["structure"] == "GradientDescent"]
    with sheet((NARROW, 0.5 + 1.55 * rows), narrow=True) as figure:
        axes = list(figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat)
        for axis, record in zip(axes, records, strict=False):
            if descent and record is not descent[0]:
                axis.plot(_drawn_theory(descent[0], "train_loss"), color="#b8b8b8", linewidth=1.2)
            _draw_panel(axis, [record], "train_loss", _MARKER_SIZES[::-1])
            axis.set_xlabel("")
            axis.set_title(method_label(record), fontsize="small")
        if len(records) < len(axes):
            axes[-1].set_axis_off()
            # where there is a panel above it
            for axis in axes[-3:-2]:
                axis.tick_params(labelbottom=True)
        figure.supxlabel("step", fontsize="medium")
        figure.supylabel("training loss", fontsize="medium")
        return save_figure(figure, out)[0]


def _draw_together(records: Sequence[dict[str, Any]], out: Path) -> Path:
    """One panel, the legend below."""
    with sheet((NARROW, 4.6), narrow=True) as figure:
        axis = figure.subplots()
        _draw_panel(axis, records, "train_loss")
        axis.set_ylabel("training loss")
        # without those of theory and network, which the text of the page tells apart
        handles = _handles(records)[-len(records) :]
        figure.legend(handles=handles, loc="outside lower center", frameon=False)
        return save_figure(figure, out)[0]


def _draw_panel(
    axis: Axes,
    records: Sequence[dict[str, Any]],
    which: str,
    marker_sizes: tuple[float, float] = _MARKER_SIZES,
) -> bool:
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
    sizes = np.linspace(*marker_sizes, max(len(records), 2))
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


def _handles(records: Sequence[dict[str, Any]]) -> list[Any]:
    """Of the legend."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color="#222222", linewidth=_LINE_WIDTH, label="theory (linearised network)"),
        Line2D([], [], color="#222222", linestyle="none", marker="o", label="network"),
        Line2D([], [], linestyle="none", label=""),
        *(
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
        ),
    ]


def _legend_label(record: dict[str, Any]) -> str:
    over = r"\alpha" if record["learning_rate_rule"] == "1/alpha" else r"\lambda_{\max}"
    return rf"{STYLES[record['structure']].label}, $\eta = {record['factor']:g}\,/\,{over}$"
