"""The frame of figures: theme, panels, colours, and what many of them have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from natgrad_flax.structures import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


class Ink(NamedTuple):
    """How one curve of a figure is drawn; colours as in ``ntk_analysis.palette``."""

    color: str
    marker: str
    dash: str


INKS = (
    Ink("#0072B2", "o", "-"),
    Ink("#D55E00", "s", "--"),
    Ink("#009E73", "^", "-."),
    Ink("#CC79A7", "D", ":"),
    Ink("#E69F00", "v", "-"),
    Ink("#56B4E9", "P", "--"),
)
"""For curves that are no structure of ours; told apart in grey and in colour-vision deficiency."""

GREY = "#4d4d4d"
"""Of theory, targets and gradient descent."""

NARROW = 4.3
"""Inches, of a figure for a narrow screen: on 390 pixels letters of 10 points are 11 high."""
_PAD = 0.12


@contextmanager
def theme(context: str = "paper", scale: float = 1.1) -> Iterator[None]:
    """Matplotlib's settings for the figures that are made and saved inside.

    Args:
      context: Seaborn's name for the sizes of lines and letters.
      scale: of the letters.
    """
    # these take seconds to import, which other commands should not cost
    import matplotlib as mpl
    import seaborn as sns

    style = {**sns.axes_style("whitegrid"), **sns.plotting_context(context, font_scale=scale)}
    style |= {"grid.color": "#e6e6e6", "grid.linewidth": 0.8, "svg.hashsalt": "natgrad"}
    with mpl.rc_context(style):
        yield


@contextmanager
def sheet(size: tuple[float, float], narrow: bool = False) -> Iterator[Figure]:
    """An empty figure of a command, and its theme for what is drawn and saved inside.

    Args:
      size: width and height in inches.
      narrow: whether it is for a narrow screen, where letters are larger beside the figure.
    """
    with theme() if narrow else theme("notebook", 0.9):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
        # the last label of an axis may stand out over the end of a narrow one
        figure.set_layout_engine("constrained", **({"w_pad": _PAD} if narrow else {}))
        yield figure


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A figure of equal panels, laid out so that nothing overlaps.

    Args:
      rows: of panels.
      columns: of panels.
      size: width and height in inches; a page is 9.2 wide.
      options: of ``Figure.subplots``, such as ``sharex``.

    Returns:
      The figure and its axes, of shape (rows, columns).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def plot(axis: Axes, x: Any, y: Any, look: Ink | Style, **options: Any) -> None:
    """A curve in an ink, or that of a structure in its style, under its name.

    Args:
      axis: it is drawn in.
      x: places.
      y: values.
      look: of the curve.
      options: of ``Axes.plot``, which come before those of the look.
    """
    own = {"linestyle": look.dash} if isinstance(look, Ink) else {"label": look.label}
    axis.plot(x, y, **{"color": look.color, "marker": look.marker, **own, **options})


def log_ticks(axis: Axes, ticks: Sequence[float], which: str = "x", base: int = 10) -> None:
    """A logarithmic axis with a tick at each of some numbers, and none between them."""
    from matplotlib.ticker import NullLocator

    getattr(axis, f"set_{which}scale")("log", base=base)
    getattr(axis, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(axis, f"{which}axis").set_minor_locator(NullLocator())


def row_axis(axis: Axes, labels: Sequence[str], what: str) -> None:
    """A row a label, the first one on top, and what is drawn along them."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.08)
    axis.ticklabel_format(axis="x", useOffset=False)
    axis.set_xlabel(what)


def legend(figure: Figure, axis: Axes, columns: int = 0, **options: Any) -> None:
    """One legend of all panels: what an axis shows, below them in columns, else at the right."""
    place = {"loc": "outside lower center", "ncols": columns}
    options = (place if columns else {"loc": "outside right center"}) | options
    figure.legend(*axis.get_legend_handles_labels(), **{"frameon": False, **options})
