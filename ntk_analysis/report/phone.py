"""The figures of the report once more for narrow screens: one column, legends below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.files import save_figure
from ntk_analysis.palette import STYLES, tint
from ntk_analysis.tables import method_label
from ntk_analysis.tables_theory import grouped, number, step_over_gradient

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.3  # inches: text of 10 points is 11 pixels high on a screen of 390
_FLOOR = 1e-10
_PAD = 0.12  # inches
_EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6}


def draw_training(records: Sequence[dict[str, Any]], out: Path) -> Path:
    """Training loss, a panel a method: theory as a line, the network as markers.

    Args:
      records: the methods to show; gradient descent stands in every panel for comparison.
      out: the SVG file.
    """
    rows = (len(records) + 1) // 2
    descent = [r for r in records if r["structure"] == "GradientDescent"]
    with _figure((_WIDTH, 0.5 + 1.55 * rows)) as figure:
        axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat
        for axis, record in zip(axes, records, strict=False):
            if descent and record is not descent[0]:
                values = np.array(descent[0]["theory"]["train_loss"], float)
                axis.plot(values, color="#b8b8b8", linewidth=1.2, zorder=1)
            _curve(axis, record, tint(STYLES[record["structure"]].color, 1))
            axis.set_title(method_label(record), fontsize="small")
        for axis in list(axes)[len(records) :]:
            axis.set_axis_off()
        figure.supxlabel("step", fontsize="medium")
        figure.supylabel("training loss", fontsize="medium")
        return _save(figure, out)


def draw_rates(records: Sequence[dict[str, Any]], out: Path) -> Path:
    """Training loss of one structure at several learning rates, in one panel.

    Args:
      records: its methods and gradient descent.
      out: the SVG file.
    """
    top = max(record["factor"] for record in records)
    with _figure((_WIDTH, 4.2)) as figure:
        axis = figure.subplots()
        for record in records:
            strength = 1 if record["structure"] == "GradientDescent" else record["factor"] / top
            color = tint(STYLES[record["structure"]].color, strength**0.5)
            _curve(axis, record, color, method_label(record))
        axis.set_xlabel("step")
        axis.set_ylabel("training loss")
        _legend(figure, axis)
        return _save(figure, out)


def draw_condition_numbers(document: dict[str, Any], out: Path) -> Path:
    """Condition number against the width, mean and range over seeds.

    Args:
      document: results of ``run_isotropy``.
      out: the SVG file.
    """
    rows = list(document["methods"].values())
    with _figure((_WIDTH, 4.6)) as figure:
        axis = figure.subplots()
        for name in dict.fromkeys(row["structure"] for row in rows):
            points = []
            for label, structure, value, here in grouped(document, rows):
                found = np.array([number(row, "condition_number") for row in here])
                if label == name and np.isfinite(found).all():
                    style = STYLES[structure]
                    middle = np.exp(np.mean(np.log(found)))
                    points.append((value, middle, found.min(), found.max()))
            if points:
                x, middle, low, high = np.array(points, float).T
                axis.plot(
                    x, middle, color=style.color, marker=style.marker, label=style.label, **_EDGE
                )
                axis.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        values = document["settings"]["values"]
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel("width M of the hidden layers")
        axis.set_ylabel(r"condition number of $\overline{\Theta}(x, x)$")
        _legend(figure, axis)
        return _save(figure, out)


def draw_spectra(document: dict[str, Any], out: Path) -> Path:
    """Eigenvalues over their mean, largest first.

    Args:
      document: results of ``run_isotropy``.
      out: the SVG file.
    """
    with _figure((_WIDTH, 4.6)) as figure:
        axis = figure.subplots()
        for row in document["methods"].values():
            if not row.get("eigenvalues"):
                continue
            style = STYLES[row["class"]]
            values = np.sort(np.array(row["eigenvalues"]) / row["alpha"])[::-1]
            index, positive = np.arange(1, len(values) + 1), values > 0
            axis.plot(
                index[positive], values[positive], color=style.color, marker=style.marker,
                markevery=max(1, len(values) // 8), label=style.label, **_EDGE,
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("eigenvalues, largest first")
        axis.set_ylabel(r"eigenvalue of $\overline{\Theta}(x, x)$ / mean")
        _legend(figure, axis)
        return _save(figure, out)


def draw_costs(document: dict[str, Any], out: Path) -> Path:
    """Condition number beside non-zeros of the Fisher and the arithmetic of a step.

    Args:
      document: results of ``run_isotropy``.
      out: the SVG file.
    """
    with _figure((_WIDTH, 6.4)) as figure:
        axes = figure.subplots(2, 1)
        for row in document["methods"].values():
            if not row.get("cost") or not np.isfinite(number(row, "condition_number")):
                continue
            style, cost = STYLES[row["class"]], row["cost"]
            places = (cost["fraction_of_exact"], step_over_gradient(cost))
            for axis, x in zip(axes, places, strict=True):
                axis.plot(
                    x, row["condition_number"], style.marker, color=style.color, markersize=9,
                    label=style.label, clip_on=False, **_EDGE,
                )  # fmt: skip
        axes[0].set_xscale("log")
        axes[0].set_xlabel(r"non-zeros of G / $P^2$")
        axes[1].set_xlabel("flops of one step / flops of a gradient")
        for axis in axes:
            axis.set_ylabel(r"condition number of $\overline{\Theta}(x, x)$")
            axis.set_yscale("log")
            axis.margins(0.1)
        _legend(figure, axes[0], below=True)
        return _save(figure, out)


def draw_accuracies(
    groups: Sequence[tuple[str, Sequence[float]]], samples: int, out: Path, *, narrow: bool = True
) -> list[Path]:
    """Test accuracies, a row a structure: every network as a dot, their mean as the marker.

    Args:
      groups: class name of a structure and its accuracies.
      samples: how many test samples.
      out: the SVG file; a PNG file goes beside it where the figure is a wide one.
      narrow: whether it is for a narrow screen.
    """
    width = _WIDTH if narrow else 8.2
    with _figure((width, 0.9 + 0.42 * len(groups))) as figure:
        axis = figure.subplots()
        for place, (structure, accuracies) in enumerate(groups):
            style, values = STYLES[structure], 100 * np.array(accuracies)
            offsets = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
            axis.plot(
                values, place + offsets, "o", color=tint(style.color, 0.45), markersize=4,
                markeredgewidth=0,
            )  # fmt: skip
            axis.plot(values.mean(), place, style.marker, color=style.color, markersize=9, **_EDGE)
        axis.set_yticks(range(len(groups)), [STYLES[name].label for name, _ in groups])
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.08)
        axis.ticklabel_format(axis="x", useOffset=False)
        axis.set_xlabel(f"accuracy in % on {samples} test samples")
        return _save_all(figure, out, narrow)


def _curve(axis: Axes, record: dict[str, Any], color: str, label: str = "") -> None:
    from matplotlib.ticker import MaxNLocator

    theory = np.maximum(np.array(record["theory"]["train_loss"], float), _FLOOR)
    theory[1:][theory[:-1] <= _FLOOR] = np.nan
    network = np.array(record["network"]["train_loss"], float)
    axis.plot(theory, color=color, linewidth=1.6, zorder=2)
    axis.plot(
        np.where(network >= _FLOOR, network, np.nan), linestyle="none", color=color,
        marker=STYLES[record["structure"]].marker, markersize=6, label=label, zorder=3, **_EDGE,
    )  # fmt: skip
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axis: Axes, *, below: bool = True) -> None:
    handles, labels = axis.get_legend_handles_labels()
    place = (
        {"loc": "outside lower center", "ncols": 2} if below else {"loc": "outside right center"}
    )
    figure.legend(handles, labels, frameon=False, **place)


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Figure]:
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.figure import Figure

    style = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper", font_scale=1.1)}
    style |= {"grid.color": "#e6e6e6", "grid.linewidth": 0.8, "svg.hashsalt": "natgrad"}
    with mpl.rc_context(style):
        figure = Figure(figsize=size)
        # the last label of an axis may stand out over its end
        figure.set_layout_engine("constrained", w_pad=_PAD)
        yield figure


def _save(figure: Figure, out: Path) -> Path:
    return save_figure(figure, out)[0]


def _save_all(figure: Figure, out: Path, narrow: bool) -> list[Path]:
    return save_figure(figure, out, *([] if narrow else [out.with_suffix(".png")]))
