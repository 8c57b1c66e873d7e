"""Figures of van Oostrum et al. (2022), from the data of their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.frame import GREY, INKS, panels
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (8.2, 4.4)


@draws("VO-Ex1", number="3, 4")
def draw_example_1(data: dict[str, Any]) -> Figure:
    """The plane in two parametrisations, of which each is folded flat along an axis."""
    return _projections(
        data,
        {
            "phi": r"$\varphi(s, t) = (s, t^3)$, equal steps of $t$",
            "psi": r"$\psi(s, t) = (-t^3, s)$, the same",
        },
        {"phi": r"natural gradient with $\varphi$", "psi": r"natural gradient with $\psi$"},
        linewidth=0.6,
    )


@draws("VO-Ex2", number="5")
def draw_example_2(data: dict[str, Any]) -> Figure:
    """The curve that crosses itself, and the natural gradients of its two passages."""
    return _projections(
        data,
        {"phi": r"$\varphi(x) = (\sin 2x, \sin x)$"},
        {
            "phi": r"natural gradient with $\varphi$ at $x = 0$",
            "psi": r"with $\psi = \varphi \circ f$ at $\theta = 0$, so $x = \pi$",
        },
    )


@draws("VO-A3")
def draw_appendix_3(data: dict[str, Any]) -> Figure:
    """The parameter space: all solutions of G y = grad, and the two that are the shortest."""
    figure, axes = panels(1, 1, _SIZE)
    axis = axes[0, 0]
    line = np.asarray(data["solutions"], float)
    label = r"all $y$ with $G y = \nabla_\xi L$: one gradient on the model"
    axis.plot(*line.T, color=GREY, linewidth=1.4, label=label)
    _arrow(axis, data["phi"], INKS[0].color, r"$y_\Xi$: least $|y|$")
    _arrow(axis, data["psi"], INKS[1].color, r"$y_\Theta$: least $|F^{-T} y|$")
    _finish(axis, (r"$y_1$", r"$y_2$"))
    return figure


_TITLES = {
    "theta": r"$\Theta$, coloured by $\psi = \varphi \circ f$",
    "xi": r"$\Xi$, coloured by $\varphi$",
    "model": r"$\mathcal{M}$ in $\mathcal{Z}$, levels of $\mathcal{L}$",
}
_SYMBOLS = {
    "y_Theta": r"$y_\Theta$",
    "y_Xi": r"$y_\Xi$",
    "df y_Theta": r"$df\,(y_\Theta)$",
    "gradient": r"gradient of $\mathcal{L}$",
    "natural": "natural gradient",
}


@draws("VO-Eq2", number="1", spaces=("xi", "model"))
@draws("VO-Thm2", number="2", spaces=("theta", "xi", "model"))
@draws("VO-Sec3.2", number="6", spaces=("theta", "xi", "model"), vectors=True)
def draw_spaces(data: dict[str, Any], spaces: Sequence[str], vectors: bool = False) -> Figure:
    """Figs. 1, 2 and 6: parameters on lines in the colour of the point of the model they give.

    Args:
      data: "reach" of all axes, and for every space "point", "vectors" and what is in it.
      spaces: which are drawn, the model last.
      vectors: whether the vectors on the parameter spaces are, too.
    """
    figure, axes = panels(1, len(spaces), (3.1 * len(spaces), 3.5))
    reach = data["reach"]
    marks = np.linspace(-reach, reach, len(data["xi"]["place"]))
    for axis, name in zip(axes[0], spaces, strict=True):
        space = data[name]
        if name == "model":
            axis.contour(marks, marks, space["objective"], 9, colors="#c8c8c8", linewidths=0.7)
            curve = np.asarray(space["curve"], float).T
            axis.scatter(*curve, c=curve[0], cmap="viridis", vmin=-reach, vmax=reach, s=14)
        else:
            levels = np.linspace(-reach, reach, 17)
            axis.contour(marks, marks, space["place"], levels, cmap="viridis", linewidths=1.1)
        drawn = space["vectors"].items() if vectors or name == "model" else ()
        for (symbol, vector), ink in zip(drawn, (INKS[1], INKS[3]), strict=False):
            _arrow(axis, vector, ink.color, _SYMBOLS[symbol], space["point"])
        axis.plot(*space["point"], "o", color="black", markersize=5, zorder=5)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=_TITLES[name])
        axis.grid(False)
        if drawn:
            axis.legend(loc="lower left", fontsize="small", handlelength=1.2)
    return figure


def _projections(
    data: dict[str, Any], curves: dict[str, str], vectors: dict[str, str], linewidth: float = 1.4
) -> Figure:
    """Curves through the origin, the gradient there, and its projections on their tangents.

    Args:
      data: "gradient", and for each parametrisation "tangent", "vector" and, if drawn, "curve".
      curves: labels by parametrisation.
      vectors: labels by parametrisation.
      linewidth: of the curves.
    """
    figure, axes = panels(1, 1, _SIZE)
    axis = axes[0, 0]
    for (name, label), dash in zip(curves.items(), ("-", "--"), strict=False):
        points = np.asarray(data[name]["curve"], float)
        axis.plot(*points.T, dash, color=GREY, linewidth=linewidth, label=label)
    gradient = data["gradient"]
    _arrow(axis, gradient, "#8c8c8c", "gradient of the plane")
    for (name, label), ink in zip(vectors.items(), INKS, strict=False):
        vector, tangent = data[name]["vector"], data[name]["tangent"]
        axis.axline((0, 0), tangent, color=ink.color, linewidth=0.9, linestyle=":")
        _arrow(axis, vector, ink.color, label)
        # what the projection leaves out
        axis.plot(*np.transpose([gradient, vector]), color=ink.color, linewidth=0.8, alpha=0.6)
    _finish(axis, ("$x$", "$y$"))
    return figure


def _arrow(
    axis: Axes, vector: Sequence[float], color: str, label: str, start: Sequence[float] = (0, 0)
) -> None:
    """A vector."""
    x, y = vector
    axis.quiver(
        *start, x, y, angles="xy", scale_units="xy", scale=1, color=color, width=0.009, zorder=4,
        label=label,
    )  # fmt: skip
    # arrows do not count for the limits of the axes
    axis.plot(x, y, alpha=0)


def _finish(axis: Axes, names: tuple[str, str]) -> None:
    axis.plot(0, 0, "o", color="black", markersize=5, zorder=5)
    axis.set_aspect("equal")
    axis.margins(0.1)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    # beside the plane, which is as wide as it is high
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
