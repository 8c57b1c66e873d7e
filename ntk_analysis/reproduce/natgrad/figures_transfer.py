"""Figure of what a narrow network says of the rate and the damping of a wide one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_analysis.frame import INKS, Ink, panels
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {"standard": "standard", "mup": "muP"}  # the last one stands at the bottom


@draws("NG-MuP-Transfer")
def draw_transfer(data: dict[str, Any]) -> Figure:
    """Loss against rate and damping, a curve a width, a row a parametrisation."""
    rows = data["panels"]
    columns = list(rows["mup"])
    inks = dict(zip(sorted(_widths(data)), INKS, strict=False))
    figure, axes = panels(2, len(columns) + 1, (9.2, 4.8), sharex="col", sharey=True)
    for line, (kind, row) in zip(axes, rows.items(), strict=True):
        sweeps = [*map(row.get, columns), data["dampings"][kind]]
        for axis, sweep, name in zip(line, sweeps, [*columns, "K-FAC"], strict=True):
            _draw_sweep(axis, sweep, inks)
            axis.set_title(f"{name}, {_KINDS[kind]}", fontsize="small")
            if kind == "mup":
                axis.set_xlabel(sweep["what"], fontsize="small")
        line[0].set_ylabel(f"loss after {data['steps']} steps")
    axes[0, 0].set_ylim(3e-7, 10)
    handles = {
        text: handle
        for axis in axes.flat
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    names = sorted(handles, key=lambda text: int(text.split()[2]))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        title="marks: the smallest loss; beyond the end of a curve it diverges",
        title_fontsize="small",
    )
    return figure


def _widths(data: dict[str, Any]) -> set[int]:
    sweeps = [sweep for row in data["panels"].values() for sweep in row.values()]
    return {width for sweep in sweeps for width in sweep["widths"]}


def _draw_sweep(axis: Axes, sweep: dict[str, Any], inks: dict[int, Ink]) -> None:
    """A curve a width, with a mark at its smallest loss."""
    grid = np.array(sweep["grid"], float)
    for width, losses in zip(sweep["widths"], sweep["losses"], strict=True):
        ink, values = inks[width], np.array(losses, float)
        best = int(np.nanargmin(values))
        axis.plot(grid, values, color=ink.color, linestyle=ink.dash, linewidth=1)
        axis.plot(
            grid[best],
            values[best],
            color=ink.color,
            marker=ink.marker,
            linestyle="",
            label=f"M = {width}",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.tick_params(labelsize="x-small")
