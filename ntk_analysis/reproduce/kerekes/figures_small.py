"""Figures 2, 3 and 6 of Kerekes et al. (2021), in their layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.frame import GREY, INKS, Ink, panels, plot
from ntk_analysis.palette import tint
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REACH = 3.2  # of the plane of Fig. 2, in the units of the data
_TARGETS = {
    "l_2": (r"$\ell_2$ max margin", "--"),
    "l_1/2": (r"$\ell_{1/2}$ max margin", ":"),
    "flow": ("limit of natural-gradient flow", "-."),
}
_PANELS = (("EGD", 1), ("EGD", 4), ("NGD", 1), ("NGD", 4))
_SHOWN_PATHS = 12


@draws("KE-Fig2")
def draw_separators(data: dict[str, Any]) -> Figure:
    """Fig. 2: separators over the points in panels A to D, and below them their angles."""
    figure, axes = panels(2, 4, (9.2, 5.4), height_ratios=(1.25, 1))
    for index, (method, depth) in enumerate(_PANELS):
        runs = [run for run in data["runs"] if run["method"] == method]
        own = [run for run in runs if run["depth"] == depth]
        parametrisation = "direct" if depth == 1 else f"L = {depth} diagonal"
        axes[0, index].set_title(f"{'ABCD'[index]}: {parametrisation}, {method}", fontsize="medium")
        _draw_plane(axes[0, index], data, own[0])
        # the paper has no panel for L = 2, which goes the same way
        others = [run for run in runs if run["depth"] == 2] if index == 3 else []
        _draw_angles(axes[1, index], data["targets"], own, others)
        axes[1, index].set_ylim(-3, 90 if method == "EGD" else 30)
    axes[0, 0].set_ylabel("$x_2$")
    axes[1, 0].set_ylabel(r"angle of $\beta$ (degrees)")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 3].get_lines()[-1:]]
    labels = [*axes[0, 0].get_legend_handles_labels()[1], "the same with L = 2 (D)"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_plane(axis: Axes, data: dict[str, Any], run: dict[str, Any]) -> None:
    points, labels = np.array(data["points"]), np.array(data["labels"])
    ink = INKS[2]
    angles = np.array(run["angles"])
    kept = np.linspace(0, len(angles) - 1, _SHOWN_PATHS).round().astype(int)
    for place, degrees in zip(np.linspace(0.1, 0.6, len(kept)), angles[kept], strict=True):
        _draw_separator(axis, degrees, color=tint(ink.color, place), linewidth=1.0, zorder=1)
    _draw_separator(
        axis, angles[-1], color=ink.color, linewidth=2.6, zorder=2, label="separator, light to dark"
    )
    for name, (label, dash) in _TARGETS.items():
        _draw_separator(
            axis, data["targets"][name], color=GREY, linestyle=dash, zorder=3, label=label
        )
    for value, mark in ((1, INKS[0]), (-1, INKS[1])):
        axis.plot(
            *points[labels == value].T,
            linestyle="none",
            marker=mark.marker,
            color=mark.color,
            markersize=5,
            markeredgecolor="white",
            label=f"y = {value:+d}",
            zorder=4,
        )
    axis.set(xlim=(-_REACH, _REACH), ylim=(-_REACH, _REACH), aspect="equal", xlabel="$x_1$")


def _draw_separator(axis: Axes, degrees: float, **style: Any) -> None:
    """The line through the origin on which x . beta = 0."""
    across = np.radians(degrees + 90)
    ends = 2 * _REACH * np.array([-1, 1])
    axis.plot(ends * np.cos(across), ends * np.sin(across), **style)


def _draw_angles(
    axis: Axes,
    targets: dict[str, float],
    own: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> None:
    for name, (_, dash) in _TARGETS.items():
        axis.axhline(targets[name], color=GREY, linestyle=dash, linewidth=1.2)
    for run in own:
        axis.plot(run["times"], run["angles"], color=INKS[2].color, linewidth=3)
    for run in others:
        axis.plot(run["times"], run["angles"], color="black", linestyle=(0, (1, 3)))
    axis.set(xscale="log", xlabel="time")


@draws("KE-Fig3")
def draw_kernels(data: dict[str, Any]) -> Figure:
    """Fig. 3: how every entry moves, by depth (rows) and method (columns); one scale a row.

    The scale ends at the largest entry that was not observed: the observed one would hide the rest.
    """
    titles = {
        "EGF": "EGF\ngradient flow",
        "EGD": "EGD\ngradient step",
        "NGF": "NGF\nnatural flow",
        "NGD": "NGD\nnatural step",
    }
    row, column = data["entry"]
    figure, axes = panels(len(data["maps"]), len(titles), (9.2, 9.4), sharex=True, sharey=True)
    for line, (depth, maps) in zip(axes, data["maps"].items(), strict=True):
        unobserved = np.abs([maps[name] for name in titles])
        unobserved[:, row, column] = 0
        limit = float(np.max(unobserved)) or 1.0
        for axis, (name, title) in zip(line, titles.items(), strict=True):
            image = axis.imshow(maps[name], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.grid(False)
            axis.set(xticks=(0, column, len(maps[name][0]) - 1))
            axis.set(yticks=(0, row, len(maps[name]) - 1))
            if axis in axes[0]:
                axis.set_title(title)
        line[0].set_ylabel(f"L = {depth}\nrow i")
        label = rf"$k_{{ij,{row}{column}}}$"
        figure.colorbar(image, ax=line, label=label, fraction=0.05, pad=0.02, extend="both")
    for axis in axes[-1]:
        axis.set_xlabel("column j")
    figure.supxlabel(
        "A row's scale ends at its largest unobserved entry; the observed one can lie beyond.",
        fontsize="small",
        color=GREY,
    )
    return figure


@draws("KE-Fig6")
def draw_accuracies(data: dict[str, Any]) -> Figure:
    """Fig. 6: test accuracy over the number of samples; on the right, what the start decides."""
    figure, axes = panels(1, 2, (9.2, 4.2), width_ratios=(2.2, 1), sharey=True)
    left, right = axes[0]
    natural, *euclidean = data["curves"]
    for found, ink in zip(euclidean, INKS, strict=False):
        _draw_curve(left, found, ink)
    _draw_curve(left, natural, Ink("black", "X", ":"))
    theory = np.array(data["theory"])
    left.plot(*theory.T, color=GREY, linewidth=5, alpha=0.3, label="NGD, theory for N < D")
    left.axvline(data["dim"], color=GREY, linewidth=1, linestyle=(0, (4, 4)))
    left.annotate(" N = D", (data["dim"], 0.99), va="top", color=GREY)
    left.set(xlabel="training samples N", ylabel="test accuracy", ylim=(0.48, 1.0))
    left.legend(loc="lower right", frameon=True)
    _draw_starts(right, data["starts"])
    return figure


def _draw_curve(axis: Axes, found: dict[str, Any], ink: Ink) -> None:
    """The mean over seeds as a line, every seed as a faint point."""
    numbers, values = found["numbers"], np.array(found["accuracies"])
    plot(axis, numbers, values.mean(axis=1), ink, markersize=6, label=found["name"])
    plot(axis, numbers, values, ink, linestyle="none", markersize=3, alpha=0.4)


def _draw_starts(axis: Axes, starts: list[dict[str, Any]]) -> None:
    """Accuracies from the usual weights beside those from other ones."""
    for place, start in enumerate(starts):
        pairs = ((-0.15, start["both_signs"], INKS[0]), (0.15, start["accuracies"], INKS[1]))
        for shift, values, ink in pairs:
            where, dot = place + shift, ink._replace(dash="none")
            label = None
            if place == 0:
                label = "N(0, 0.3²), as on the left" if shift < 0 else "the start below"
            plot(axis, [where] * len(values), values, dot, markersize=3, alpha=0.4)
            plot(axis, where, np.mean(values), dot, markersize=8, label=label)
    ticks = [f"{start['name']}\nN = {start['num']}\n{start['label']}" for start in starts]
    axis.set_xticks(range(len(ticks)), ticks, fontsize="x-small")
    axis.set_xlim(-0.5, len(ticks) - 0.5)
    axis.set_title("what the start decides", fontsize="medium")
    axis.legend(loc="lower left", fontsize="small")
