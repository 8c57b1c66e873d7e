"""The four panels of Figure 1 of Bernacchia et al. (2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.frame import GREY, INKS, Ink, panels, plot
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_ERROR = "log$_{10}$(test error)"
RMSE = "test error (RMSE per pixel)"
_SHOWN = (Ink(GREY, "", "-"), INKS[1], INKS[2], INKS[0])
"""SGD, and the kinds of natural gradient."""


@draws("BE-Fig1A", title="A  linear (square)", quantity=LOG_ERROR)
@draws("BE-Fig1B", title="B  linear (non-square)", quantity=LOG_ERROR)
@draws("BE-Fig1C", title="C  linear (bottleneck)", quantity=LOG_ERROR)
@draws("BE-Fig1D", title="D  nonlinear (MNIST autoencoder)", quantity=RMSE)
def draw_training(data: dict[str, Any], title: str, quantity: str) -> Figure:
    """Test error against examples, and below it against seconds, as the columns of the figure.

    The line is the median over the seeds, and the band reaches from the least to the largest.

    Args:
      data: "panels", each with a "title" and "curves", which have a "name" and "runs", one a seed,
        of the lists "examples", "seconds" and "errors"; "minimum", the least achievable error, or
        None.
      title: of the figure.
      quantity: what the errors are.
    """
    shown = data["panels"]
    size = (5.4, 6.0) if len(shown) == 1 else (9.2, 5.8)
    figure, axes = panels(2, len(shown), size, sharey=True)
    for column, panel in zip(axes.T, shown, strict=True):
        for axis, key, label, scale in (
            (column[0], "examples", "training examples (×10³)", 1e-3),
            (column[1], "seconds", "wall-clock time of training [s]", 1.0),
        ):
            if data["minimum"] is not None:
                axis.axhline(data["minimum"], color="#9a9a9a", linestyle=":", label="the noise")
            for runs, ink in zip(panel["curves"], _SHOWN, strict=False):
                _draw_runs(axis, runs, key, scale, ink)
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
        # beyond the examples of natural gradient SGD went on for the sake of the clock alone
        last = panel["curves"][-1]["runs"][0]["examples"][-1] / 1000
        column[0].set_xlim(right=last)
        column[0].set_title(panel["title"], fontsize="medium")
        column[0].legend(frameon=False, fontsize="small")
    for axis in axes[:, 0]:
        axis.set_ylabel(quantity)
    figure.suptitle(title, fontsize="medium")
    return figure


def _draw_runs(axis: Axes, found: dict[str, Any], key: str, scale: float, ink: Ink) -> None:
    """Median and range over the runs that have got so far."""
    length = min(len(run[key]) for run in found["runs"])
    places, errors = (
        np.array([run[name][:length] for run in found["runs"]]) for name in (key, "errors")
    )
    where = scale * np.median(places, axis=0)
    axis.plot(where, np.median(errors, axis=0), ink.dash, color=ink.color, label=found["name"])
    ends = errors.min(axis=0), errors.max(axis=0)
    axis.fill_between(where, *ends, color=ink.color, alpha=0.18, linewidth=0)


@draws("BE-Cost")
def draw_costs(data: dict[str, Any]) -> Figure:
    """Flops of a step over the width of the layers, and what the same variants learn.

    Args:
      data: "widths", "flops" over those of SGD by name, and "curves" as ``draw_training``.
    """
    figure, ((left, right),) = panels(1, 2, (9.2, 3.8))
    for (name, values), runs, ink in zip(data["flops"].items(), data["curves"], INKS, strict=False):
        plot(left, data["widths"], values, ink, label=name)
        _draw_runs(right, runs, "examples", 1e-3, ink)
    left.set(xlabel="units in a layer", ylabel="flops of a step over those of SGD", xscale="log")
    left.set_xticks(data["widths"], map(str, data["widths"]), minor=False)
    left.minorticks_off()
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize="small")
    right.axhline(-6, color="#9a9a9a", linestyle=":")
    right.set(xlabel="training examples (×10³)", ylabel=LOG_ERROR)
    return figure
