"""The four panels of Figure 1 of Bernacchia et al. (2018)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ntk_analysis.report.papers.frame import GREY, INKS, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_ERROR = "log$_{10}$(test error)"
RMSE = "test error (RMSE per pixel)"


def draw_training(data: dict[str, Any], title: str, quantity: str) -> Figure:
    """Test error against examples, and below it against seconds, as the columns of the figure.

    Args:
      data: "natural" and "sgd" with the lists "examples", "seconds" and "errors", and for panel D
        "plain", natural gradient with the constants of the others; "rate" of SGD; "minimum", the
        least achievable error, or None.
      title: of the column.
      quantity: what the errors are.
    """
    figure, axes = panels(2, 1, (5.4, 6.0), sharey=True)
    natural, sgd = data["natural"], data["sgd"]
    curves = [
        (sgd, f"SGD, learning rate {data['rate']:g}", GREY, "-"),
        (natural, "natural gradient", INKS[1].color, INKS[1].dash),
    ]
    if data.get("plain"):
        name = "the same, output variance and $\\lambda_0$ = 1"
        curves.append((data["plain"], name, INKS[4].color, INKS[3].dash))
    for axis, key, label, scale in (
        (axes[0, 0], "examples", "training examples (×10³)", 1e-3),
        (axes[1, 0], "seconds", "wall-clock time of training [s]", 1.0),
    ):
        if data["minimum"] is not None:
            axis.axhline(data["minimum"], color="#9a9a9a", linestyle=":", label="min. achievable")
        for curve, name, color, dash in curves:
            places = [scale * value for value in curve[key]]
            axis.plot(places, curve["errors"], color=color, linestyle=dash, label=name)
        axis.set_xlabel(label)
        axis.set_ylabel(quantity)
        axis.set_xlim(left=0)
    # beyond the examples of natural gradient SGD went on for the sake of the clock alone
    axes[0, 0].set_xlim(right=natural["examples"][-1] / 1000)
    axes[0, 0].set_title(title)
    axes[0, 0].legend(frameon=False)
    return figure


DRAWINGS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "BE-Fig1A": partial(draw_training, title="A  linear (square)", quantity=LOG_ERROR),
    "BE-Fig1B": partial(draw_training, title="B  linear (non-square)", quantity=LOG_ERROR),
    "BE-Fig1C": partial(draw_training, title="C  linear (bottleneck)", quantity=LOG_ERROR),
    "BE-Fig1D": partial(draw_training, title="D  nonlinear (MNIST autoencoder)", quantity=RMSE),
}
