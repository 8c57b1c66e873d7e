"""The frame of every figure of a paper's page: theme, panels and colours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
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


@contextmanager
def theme() -> Iterator[None]:
    """Matplotlib's settings for the figures that are made and saved inside."""
    # these take seconds to import, which other commands should not cost
    import matplotlib as mpl
    import seaborn as sns

    style = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper", font_scale=1.1)}
    style |= {"grid.color": "#e6e6e6", "grid.linewidth": 0.8, "svg.hashsalt": "natgrad"}
    with mpl.rc_context(style):
        yield


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
