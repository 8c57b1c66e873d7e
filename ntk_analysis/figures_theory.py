"""Figures of ``natgrad predict`` and ``natgrad isotropy``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntk_analysis.coordinates import CoordinateCheck
from ntk_analysis.files import save_figure
from ntk_analysis.frame import NARROW, row_axis, sheet
from ntk_analysis.palette import STYLES, tint
from ntk_analysis.tables import setting_sentence
from ntk_analysis.tables_theory import grouped, number, step_over_gradient, sweep_sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKER_SIZE = 8.0
_MARKER_SIZES = (11.0, 6.5)  # from the first structure, drawn at the bottom, to the last
_SAME_CURVE = 0.01  # in decades
_EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.7}
_NAMES = {
    "width": "width M of the hidden layers",
    "depth": "depth L",
    "num_samples": "number of samples N",
    "damping": r"damping $\rho$",
    "activation": "",
}
_LOGARITHMIC = ("width", "num_samples")


def draw_prediction(
    document: dict[str, Any], records: Sequence[dict[str, Any]], out: Path, narrow: bool = False
) -> list[Path]:
    """Draws ``accuracy``: test accuracies, a row a structure, as PNG and SVG.

    Args:
      document: what results.json holds.
      records: the structures to show.
      out: the folder.
      narrow: for a narrow screen, as SVG alone.

    Returns:
      The files.
    """
    from matplotlib.lines import Line2D

    with sheet((NARROW if narrow else 8.2, 1.7 + 0.55 * len(records)), narrow) as figure:
        axis = figure.subplots()
        several = any(record["accuracies"] for record in records)
        law = any(record["expected_accuracy"] is not None for record in records)
        # the outputs' mean above, drawn initialisations below, so that they do not hide each other
        lane = 0.16 if several else 0.0
        for place, record in enumerate(records):
            style = STYLES[record["structure"]]
            draws = 100 * np.array(record["accuracies"])
            if len(draws):
                axis.plot(
                    draws, np.full(len(draws), place + lane), "o", color=tint(style.color, 0.55),
                    markersize=5, markeredgewidth=0, zorder=2,
                )  # fmt: skip
                deviation = draws.std(ddof=1) if len(draws) > 1 else 0
                axis.errorbar(
                    draws.mean(), place + lane, xerr=deviation, color=style.color, capsize=5,
                    elinewidth=2, capthick=2, zorder=3,
                )  # fmt: skip
            axis.plot(
                100 * record["accuracy"], place - lane, style.marker, color=style.color,
                markersize=_MARKER_SIZE + 1, zorder=4, **_EDGE,
            )  # fmt: skip
            if record["expected_accuracy"] is not None:
                axis.plot(
                    100 * record["expected_accuracy"], place + lane, "|", color="#111111",
                    markersize=17, markeredgewidth=1.6, zorder=5,
                )  # fmt: skip
        labels = [STYLES[record["structure"]].label for record in records]
        row_axis(axis, labels, f"accuracy in % on {document['data']['num_test']} test samples")
        analytic = document["settings"]["kernels"] == "analytic"
        handles = [
            Line2D([], [], color="#555555", marker="s", linestyle="none",
                   markersize=_MARKER_SIZE + 1, **_EDGE,
                   label="the mean output" if analytic else "the linearised network")
        ]  # fmt: skip
        if several:
            handles += [
                Line2D([], [], color="#b0b0b0", marker="o", linestyle="none", markersize=4,
                       label="one initialisation"),
                Line2D([], [], color="#555555", linewidth=2, label="mean ± std of these"),
            ]  # fmt: skip
        if law:
            handles.append(
                Line2D([], [], color="#111111", marker="|", linestyle="none", markersize=14,
                       markeredgewidth=1.6, label="expected accuracy")
            )  # fmt: skip
        title = f"Trained to the end, {document['settings']['kernels']} kernels"
        title = f"{title}\n{setting_sentence(document)}"
        return _finish(figure, handles, title, "", out / "accuracy", narrow)


def draw_isotropy(
    document: dict[str, Any], rows: Sequence[dict[str, Any]], out: Path, narrow: bool = False
) -> list[Path]:
    """Draws all figures of ``natgrad isotropy``, as PNG and SVG.

    Args:
      document: what results.json holds.
      rows: the rows to show.
      out: the folder.
      narrow: for a narrow screen, as SVG alone.

    Returns:
      The files: ``condition_number`` against the variable, ``spectra`` and ``cost`` of one network.
    """
    files = _draw_condition_numbers(document, rows, out / "condition_number", narrow)
    shown = [row for row in rows if row.get("eigenvalues")]
    if shown:
        files += _draw_spectra(document, shown, out / "spectra", narrow)
    if any(row["cost"] for row in shown):
        files += _draw_costs(document, shown, out / "cost", narrow)
    return files


def _draw_condition_numbers(
    document: dict[str, Any], rows: Sequence[dict[str, Any]], stem: Path, narrow: bool
) -> list[Path]:
    settings = document["settings"]
    variable, values, seeds = (settings[name] for name in ("variable", "values", "seeds"))
    numeric = variable in ("width", "depth", "num_samples")
    places = {v: float(v) if numeric else float(i) for i, v in enumerate(values)}
    with sheet((NARROW if narrow else 8.2, 4.8), narrow) as figure:
        axis = figure.subplots()
        hidden = False
        curves: dict[str, NDArray[np.float64]] = {}
        for _, structure, value, here in grouped(document, rows):
            found = np.array([number(row, "condition_number") for row in here])
            curve = curves.setdefault(structure, np.full((len(values), 3), np.nan))
            if np.isfinite(found).all():
                middle = np.exp(np.mean(np.log(found)))
                curve[values.index(value)] = middle, found.min(), found.max()
            else:
                hidden = True
        middles = [curve[:, 0] for curve in curves.values()]
        sizes = np.linspace(*_MARKER_SIZES, max(len(curves), 2))
        x = np.array(list(places.values()))
        for index, (structure, curve) in enumerate(curves.items()):
            style = STYLES[structure]
            middle, low, high = curve.T
            # categories have no order that a line could follow
            axis.plot(
                x, middle, color=style.color, marker=style.marker,
                linestyle="none" if variable == "activation" else "-",
                linewidth=_line_width(middles, index), markersize=sizes[index],
                label=style.label, zorder=2 + index / 100, **_EDGE,
            )  # fmt: skip
            if variable == "activation":
                axis.vlines(x, low, high, color=style.color, linewidth=1.8, zorder=1.9)
            else:
                axis.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
        if variable in _LOGARITHMIC:
            axis.set_xscale("log", base=2)
        axis.set_xticks(list(places.values()), [_text(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(_NAMES[variable])
        axis.set_ylabel(r"condition number of $\overline{\Theta}(x, x)$")
        spread = f"; mean and range over {len(seeds)} seeds" if len(seeds) > 1 else ""
        title = f"Isotropy at initialisation{spread}\n{sweep_sentence(document)}"
        note = "Where a point is missing, the matrix is singular or not to be had."
        handles = axis.get_legend_handles_labels()[0]
        return _finish(figure, handles, title, note if hidden else "", stem, narrow)


def _draw_spectra(
    document: dict[str, Any], shown: Sequence[dict[str, Any]], stem: Path, narrow: bool
) -> list[Path]:
    with sheet((NARROW if narrow else 8.2, 4.8), narrow) as figure:
        axis = figure.subplots()
        hidden = False
        spectra = [np.sort(np.array(row["eigenvalues"]) / row["alpha"])[::-1] for row in shown]
        for place, (row, values) in enumerate(zip(shown, spectra, strict=True)):
            style = STYLES[row["class"]]
            hidden |= bool((values <= 0).any())
            step = max(1, len(values) // 8)
            axis.plot(
                np.arange(1, len(values) + 1), np.where(values > 0, values, np.nan),
                color=style.color, marker=style.marker,
                # apart from each other where spectra coincide
                markevery=(place * step // len(shown), step),
                linewidth=_line_width(spectra, place), markersize=_MARKER_SIZE - 1,
                label=style.label, zorder=2 + place / 100, **_EDGE,
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("eigenvalues, largest first")
        axis.set_ylabel(r"eigenvalue of $\overline{\Theta}(x, x)$ / their mean")
        title = f"Spectra at initialisation, {_point(document, shown)}\n{sweep_sentence(document)}"
        note = "Eigenvalues of 0 and less are not shown." if hidden else ""
        handles = axis.get_legend_handles_labels()[0]
        return _finish(figure, handles, title, note, stem, narrow)


def _draw_costs(
    document: dict[str, Any], shown: Sequence[dict[str, Any]], stem: Path, narrow: bool
) -> list[Path]:
    with sheet((NARROW, 6.8) if narrow else (10, 4.6), narrow) as figure:
        axes = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True)
        known = [row for row in shown if row["cost"]]
        finite = [row for row in known if np.isfinite(number(row, "condition_number"))]
        sizes = np.linspace(_MARKER_SIZES[0] + 3, _MARKER_SIZES[1] + 1, max(len(finite), 2))
        for row, size in zip(finite, sizes, strict=False):
            style, cost = STYLES[row["class"]], row["cost"]
            costs = (cost["fraction_of_exact"], step_over_gradient(cost))
            for axis, x in zip(axes, costs, strict=True):
                axis.plot(
                    x, row["condition_number"], style.marker, color=style.color, label=style.label,
                    markersize=size, zorder=3, **_EDGE,
                )  # fmt: skip
        axes[0].set_xscale("log")
        for axis in axes:
            axis.set_yscale("log")
            axis.margins(0.12)
        for axis in axes if narrow else axes[:1]:
            axis.set_ylabel(r"condition number of $\overline{\Theta}(x, x)$")
        axes[0].set_xlabel(r"non-zeros of G / $P^2$")
        axes[1].set_xlabel("flops of one step / flops of a gradient")
        params = finite[0]["cost"]["num_params"] if finite else 0
        title = f"Cost and isotropy, {_point(document, shown)}, P = {params:,}"
        title = f"{title}\n{sweep_sentence(document)}"
        note = (
            "Structures with a singular matrix are not shown." if len(finite) < len(known) else ""
        )
        handles = axes[0].get_legend_handles_labels()[0]
        return _finish(figure, handles, title, note, stem, narrow)


def draw_coordinates(check: CoordinateCheck, stem: Path, title: str) -> list[Path]:
    """Draws how far the layers moved at the last step against the width, a line a layer.

    Args:
      check: of ``coordinate_check``.
      stem: of the files, which end with .png and .svg.
      title: above the figure.

    Returns:
      The files.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    with sheet((6.8, 4.0)) as figure:
        axis = figure.subplots()
        curves = check.changes[:, -1]
        for layer, curve in enumerate(curves.T):
            slope = check.exponents[layer]
            law = f": $M^{{{round(slope, 2) + 0.0:.2f}}}$" if np.isfinite(slope) else ""
            axis.loglog(
                check.widths, curve, "o-", label=f"layer {layer + 1}{law}", markersize=_MARKER_SIZE,
                color=colormaps["viridis"](0.85 * layer / max(curves.shape[1] - 1, 1)), **_EDGE,
            )  # fmt: skip
        low, high = axis.get_ylim()
        # a decade at least, so that noise does not look like a trend
        spread = max(1.0, (10 * low / high) ** 0.5)
        axis.set_ylim(low / spread, high * spread)
        axis.xaxis.set_major_locator(FixedLocator(list(check.widths)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(_NAMES["width"])
        axis.set_ylabel(f"RMS change of pre-activations, step {check.changes.shape[1]}")
        axis.set_title(title, fontsize="medium")
        figure.legend(loc="outside right center", frameon=False)
        return save_figure(figure, stem.with_suffix(".png"), stem.with_suffix(".svg"))


def _finish(
    figure: Figure, handles: Sequence[Any], title: str, note: str, stem: Path, narrow: bool
) -> list[Path]:
    """Adds the legend, title and note, and saves; a narrow page says these in its own text."""
    if narrow:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        return save_figure(figure, stem.with_suffix(".svg"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize="medium")
    if note:
        figure.supxlabel(note, fontsize="small", color="#555555")
    return save_figure(figure, stem.with_suffix(".png"), stem.with_suffix(".svg"))


def _line_width(curves: Sequence[NDArray[np.float64]], index: int) -> float:
    """Wider by a step for each later curve that coincides with this one."""
    return 1.8 + 2.2 * sum(_coincide(curves[index], other) for other in curves[index + 1 :])


def _coincide(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    if not ((first > 0) & (second > 0)).all():
        return False
    return bool(np.max(np.abs(np.log10(first / second))) < _SAME_CURVE)


def _point(document: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    variable = document["settings"]["variable"]
    value = _text(shown[0][variable])
    return f"{variable.replace('_', ' ')} {value}, seed {shown[0]['seed']}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
