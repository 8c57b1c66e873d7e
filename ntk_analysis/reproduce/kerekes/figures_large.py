"""Figures 4 and 5 of Kerekes et al. (2021) in their layout, from what the checks measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.frame import GREY, INKS, Ink, legend, panels, plot
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DEPTHS = {f"EGD, L = {depth}": INKS[depth - 1] for depth in (1, 2, 3, 4)}
_BLACK = "#222222"
_SPARSE = {
    **_DEPTHS,
    "NGD, train Fisher": Ink(_BLACK, "X", "-"),
    "NGD, full-rank solver": Ink(_BLACK, "d", ":"),
    "NGD, population Fisher": Ink(_BLACK, "P", "--"),
}
_SOLVED = {
    "NGD, train Fisher": "NGD, train Fisher, least norm",
    "NGD, full-rank solver": "NGD, train Fisher, full-rank solver",
}
_COMPLETED = {
    **_DEPTHS,
    "NGD, L = 2": Ink(_BLACK, "X", ":"),
    "least nuclear norm": Ink(GREY, "", "--"),
}
_FLOOR = 1e-7


def _line(axis: Axes, x: Any, y: Any, ink: Ink, **options: Any) -> None:
    """A curve with white edges around its markers."""
    plot(axis, x, y, ink, markersize=5, markeredgecolor="white", markeredgewidth=0.5, **options)


@draws("KE-Fig4", "KE-Fig4-quick")
def draw_sparse_classification(data: dict[str, Any]) -> Figure:
    """Fig. 4: test accuracy over N, logits over the time, coefficients.

    Args:
      data: of KE-Fig4 or KE-Fig4-quick.
    """
    figure, ((left, middle, right),) = panels(1, 3, (9.2, 3.9))
    _accuracies(left, data)
    _logits(middle, data["logits"])
    _coefficients(figure, right, data)
    return figure


def _accuracies(axis: Axes, data: dict[str, Any]) -> None:
    for name, ink in _SPARSE.items():
        # records of earlier versions have no full-rank solver
        if name in data["accuracy"]:
            _line(axis, data["counts"], data["accuracy"][name], ink, label=_SOLVED.get(name, name))
    axis.plot(
        data["counts"],
        data["accuracy"]["limit of NGD"],
        color=GREY,
        linewidth=4,
        alpha=0.3,
        zorder=1,
        label="theory of the train Fisher",
    )
    axis.axvline(data["dim"], color=GREY, linewidth=0.8)
    axis.text(data["dim"], 0.99, " N = D", transform=axis.get_xaxis_transform(), va="top")
    axis.set(xlabel="training samples N", ylabel="test accuracy")
    # above the curves, where the panel has none at small N
    axis.set_ylim(0.45, 1.0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=1, fontsize="small")


def _logits(axis: Axes, data: dict[str, Any]) -> None:
    times = np.array(data["times"])
    for values in np.array(data["elsewhere"]).T:
        rising = values[-1] > 0
        axis.plot(times, values, color=INKS[0 if rising else 1].color, linewidth=0.7, alpha=0.5)
    for values in np.array(data["from_zero"]).T:
        rising = values[-1] > 0
        ink = INKS[0 if rising else 1]
        axis.plot(times, values, color=ink.color, marker=ink.marker, markersize=4, linestyle="none")
    theory = np.log(2 * np.exp(times) - 1)
    for sign in (1, -1):
        axis.plot(times, sign * theory, color=GREY, linestyle="--", linewidth=1)
    handles = [
        _handle("y = +1, NGD from 0", color=INKS[0].color, marker=INKS[0].marker, linestyle=""),
        _handle("y = -1, NGD from 0", color=INKS[1].color, marker=INKS[1].marker, linestyle=""),
        _handle(r"$\pm\log(2e^t - 1)$", color=GREY, linestyle="--"),
        _handle("flow from random coefficients", color=GREY, linewidth=0.7),
    ]
    axis.set(xlabel=r"time $t$ = step size $\times$ steps", ylabel="logits of training samples")
    axis.set_title(f"N = {data['num_samples']}", fontsize="medium")
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.24), fontsize="small")


def _handle(label: str, **style: Any) -> Any:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, markersize=4, **style)


def _coefficients(figure: Figure, whole: Axes, data: dict[str, Any]) -> None:
    """One strip a method, in the place of the third panel."""
    place: Any = whole.get_subplotspec()
    rows = len(data["coefficients"])
    grid = place.subgridspec(rows, 1)
    whole.remove()
    strips = [figure.add_subplot(grid[row]) for row in range(rows)]
    for axis, (name, values) in zip(strips, data["coefficients"].items(), strict=True):
        number, ink = np.arange(1, len(values) + 1), _SPARSE[name]
        axis.vlines(number, 0, values, color=ink.color, linewidth=0.6)
        axis.axhline(0, color=GREY, linewidth=0.5)
        axis.axvspan(0, data["num_relevant"] + 0.5, color=GREY, alpha=0.15, linewidth=0)
        axis.set_title(f"{name}: off / on {data['sparsity'][name]:.2f}", fontsize="small")
        axis.set_xlim(0, len(values) + 1)
        axis.tick_params(labelsize="x-small", labelbottom=axis is strips[-1])
    strips[-1].set_xlabel(f"index of the input, N = {data['counts'][-1]}")
    strips[len(strips) // 2].set_ylabel(r"$\beta$ over its mean relevant size")


@draws("KE-Fig5")
def draw_completion(data: dict[str, Any]) -> Figure:
    """Fig. 5: error and effective rank over observations; error over initial products.

    Args:
      data: of KE-Fig5.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, ((left, middle, right),) = panels(1, 3, (9.2, 3.6))
    for name, ink in _COMPLETED.items():
        found = data["curves"][name]
        _line(left, data["counts"], found["error"], ink, label=name)
        _line(middle, data["counts"], found["rank"], ink)
        if name in data["spread"]:
            rows = np.array(data["spread"][name])
            ends = rows.min(axis=0), rows.max(axis=0)
            left.fill_between(data["counts"], *ends, color=ink.color, alpha=0.2, linewidth=0)
    middle.axhline(data["target_rank"], color=GREY, linewidth=4, alpha=0.3)
    middle.annotate(
        "the matrix itself",
        (data["counts"][-1], data["target_rank"]),
        xytext=(0, -5),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize="small",
        color=GREY,
    )
    left.set(xlabel="observed entries m", ylabel="mean squared error, all entries", yscale="log")
    left.set_ylim(bottom=_FLOOR)
    middle.set(xlabel="observed entries m", ylabel="effective rank", yscale="log")
    middle.set_ylim(bottom=0.75 * data["target_rank"])
    middle.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    middle.yaxis.set_major_formatter("{x:g}")
    middle.yaxis.set_minor_formatter(NullFormatter())
    for name, errors in data["collapsed"].items():
        _line(right, data["gaussians"], errors, _DEPTHS[f"EGD, {name}"])
    right.set(
        xlabel="Gaussians in each initial factor",
        ylabel="mean squared error, all entries",
        yscale="log",
        xticks=data["gaussians"],
    )
    right.set_title(f"m = {data['shown']}", fontsize="medium")
    legend(figure, left, columns=3, frameon=True)
    return figure


@draws("KE-Fig5-NGD")
def draw_natural_completion(data: dict[str, Any]) -> Figure:
    """Observed entries of natural-gradient runs, and how far the others move.

    Args:
      data: of KE-Fig5-NGD.
    """
    figure, ((left, right),) = panels(1, 2, (9.2, 3.6))
    for index, (name, run) in enumerate(data["joint"].items()):
        moved = np.array(run["moved"])
        _line(left, run["times"], run["observed"], INKS[index], label=name)
        _line(right, run["times"], np.where(moved > 0, moved, np.nan), INKS[index])
    for index, (name, run) in enumerate(data["truncated"].items(), start=3):
        _line(left, run["times"], run["observed"], INKS[index], label=f"{name}, 1/L split*")
        _line(right, run["times"], [None, *run["moved"][1:]], INKS[index])
    first = next(iter(data["joint"].values()))
    times, time = np.array(first["times"]), r"time $t$ = step size $\times$ steps"
    theory = first["observed"][0] * np.exp(-2 * times)
    left.plot(times, theory, color=GREY, linewidth=4, alpha=0.3, label=r"theory, $e^{-2t}$")
    left.set(xlabel=time, ylabel="observed: mean squared error", yscale="log")
    right.set(xlabel=time, ylabel="unobserved: have moved by (rms)", yscale="log")
    right.set_xlim(left.get_xlim())
    right.set_ylim(1e-4, 1)
    remarks = ["L = 1 does not move them"]
    for name, end in data["split"].items():
        if end is not None:
            remarks.append(f"{name}, 1/L split: entries above $10^6$ by t = {end:.2g}")
    remarks.append("* small singular values left out")
    right.text(0.04, 0.96, "\n".join(remarks), transform=right.transAxes, va="top")
    legend(figure, left, columns=3, frameon=True)
    return figure
