"""Figures of what happens beyond the first order: after one step, and over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.frame import GREY, INKS, legend, log_ticks, panels, plot
from ntk_analysis.palette import STYLES
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACTIVATIONS = {"tanh": "tanh", "softplus": "softplus", "relu": "ReLU"}
_COURSES = {
    "full": "Gauss-Newton, full batch",
    "batches": "Gauss-Newton, mini-batches",
    "adam": "Adam, mini-batches",
}
_KINDS = {"standard": "standard weights", "ntk": "weights of the NTK"}
_LEFT = r"loss$_1$ / loss$_0$"


@draws("NG-Width-Kink")
def draw_kink(data: dict[str, Any]) -> Figure:
    """What one step leaves in one hidden layer: means of seeds, and the law of ReLU."""
    figure, axes = panels(1, 1, (6.4, 3.6))
    axis, widths, law = axes[0, 0], data["widths"], data["law"]
    for (name, losses), ink in zip(data["losses"].items(), INKS, strict=False):
        dash = "" if name == "relu" else ink.dash
        plot(axis, widths, losses, ink, linestyle=dash, label=_ACTIVATIONS[name])
    means = [law["mean"] / width for width in widths]
    both = [mean + law["spread"] / m**1.5 for mean, m in zip(means, widths, strict=True)]
    axis.plot(widths, both, color=GREY, linewidth=1, label=r"$c/M + d/M^{1.5}$, derived")
    axis.plot(widths, means, color=GREY, linewidth=1, linestyle=":", label=r"$c/M$ alone")
    _width_axis(axis, widths)
    axis.set_ylabel(f"{_LEFT}, mean")
    axis.legend(frameon=False, fontsize="small")
    return figure


@draws("NG-Width-Law")
def draw_law(data: dict[str, Any]) -> Figure:
    """What one step leaves against the width, by activation and structure, with the exponents."""
    figure, axes = panels(1, len(data["curves"]), (9.2, 3.8), sharey=True)
    widths = data["widths"]
    for axis, (activation, curves) in zip(axes[0], data["curves"].items(), strict=True):
        power = 1 if activation == "relu" else 2
        for name, found in curves.items():
            plot(axis, widths, found["losses"], STYLES[name])
        first = min(found["losses"][0] for found in curves.values()) / 2
        law = [first * (widths[0] / width) ** power for width in widths]
        axis.plot(widths, law, color=GREY, linewidth=0.9, linestyle=":")
        lows, highs = zip(*(found["interval"] for found in curves.values()), strict=True)
        axis.set_title(
            f"{_ACTIVATIONS[activation]}, dotted: $M^{{-{power}}}$\n"
            f"p from {min(lows):.2f} to {max(highs):.2f}",
            fontsize="medium",
        )
        _width_axis(axis, widths)
    axes[0, 0].set_ylabel(_LEFT)
    legend(figure, axes[0, 0], columns=4)
    return figure


@draws("NG-Sparse-Networks")
def draw_sparse(data: dict[str, Any]) -> Figure:
    """Accuracy and alignment against N / D, mean and spread of seeds, beside the kernel's."""
    figure, axes = panels(2, len(data["scales"]), (9.2, 6.0), sharex=True, sharey="row")
    ratios = [count / data["dim"] for count in data["counts"]]
    names = {"accuracy": "test accuracy", "alignment": "share of slope on support"}
    for row, (quantity, name) in zip(axes, names.items(), strict=True):
        of_all = np.asarray(data[quantity], float)
        for axis, scale, found in zip(row, data["scales"], of_all, strict=True):
            for method, values, ink in zip(data["methods"], found, INKS, strict=False):
                axis.errorbar(
                    ratios, values.mean(axis=1), values.std(axis=1, ddof=1), color=ink.color,
                    marker=ink.marker, linestyle=ink.dash, capsize=2, label=method,
                )  # fmt: skip
            limit = data["limit"][quantity]
            axis.plot(ratios, limit, color=GREY, linestyle=":", label="kernel of infinite width")
            log_ticks(axis, ratios)
            if quantity == "accuracy":
                axis.set_title(f"NTK weights times {scale:g}", fontsize="medium")
            else:
                axis.set_xlabel("N / D")
        row[0].set_ylabel(name)
    legend(figure, axes[0, 0], columns=3)
    return figure


@draws("NG-Drift-Structures")
def draw_drift(data: dict[str, Any]) -> Figure:
    """Change of the kernel over training, a curve a structure, a panel an activation."""
    figure, axes = panels(1, len(data["curves"]), (9.2, 4.8), sharey=True)
    for axis, (activation, curves) in zip(axes[0], data["curves"].items(), strict=True):
        for name, found in curves.items():
            steps, changes = found["steps"][1:], found["changes"][1:]
            plot(axis, steps, changes, STYLES[name], markersize=4, linewidth=1)
        log_ticks(axis, [1, 3, 10, 30, 100, 300])
        axis.set_yscale("log")
        axis.set_xlabel("steps, to a thousandth of the loss")
        axis.set_title(f"{_ACTIVATIONS[activation]}, M = {data['width']}", fontsize="medium")
    axes[0, 0].set_ylabel(r"$\|K_t - K_0\| / \|K_0\|$")
    legend(figure, axes[0, 0], columns=5, fontsize="small")
    return figure


@draws("NG-Drift-Batches", "NG-Drift-Batches-Digits")
def draw_batches(data: dict[str, Any]) -> Figure:
    """Loss and CKA over training, a column a parametrisation."""
    figure, axes = panels(2, len(data["runs"]), (7.4, 5.0), sharex=True, sharey="row")
    for column, (kind, runs) in zip(axes.T, data["runs"].items(), strict=True):
        for (which, label), ink in zip(_COURSES.items(), INKS, strict=False):
            run = runs[which]
            for axis, quantity in zip(column, ("losses", "cka"), strict=True):
                plot(axis, run["steps"][1:], run[quantity][1:], ink, markersize=4, label=label)
        column[0].set_title(_KINDS[kind], fontsize="medium")
        column[0].set_yscale("log")
        log_ticks(column[1], [1, 10, 100])
        column[1].set_xlabel("steps")
    axes[0, 0].set_ylabel("loss over the first")
    axes[1, 0].set_ylabel("CKA with first kernel")
    legend(figure, axes[0, 0], columns=3, fontsize="small")
    return figure


def _width_axis(axis: Axes, widths: list[int]) -> None:
    log_ticks(axis, widths, base=2)
    axis.set_yscale("log")
    axis.set_xlabel("width M")
