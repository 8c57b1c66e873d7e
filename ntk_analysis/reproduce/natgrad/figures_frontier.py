"""Figures of the isotropy frontier, from the data of its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ntk_analysis.frame import GREY, INKS, legend, log_ticks, panels, plot
from ntk_analysis.palette import STYLES
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POWERS = {
    0.0: "gradient descent",
    0.25: "p = 1/4, Shampoo",
    0.5: "p = 1/2, its square",
    1.0: "p = 1",
}
_ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
_UNDER = ("Exact", "BlockDiagonal", "QuasiDiagonal")  # drawn hollow: others lie on them
_MARKS = {
    "Shampoo 1/4": ("1/4", (14, 0)),
    "Shampoo 1/2": ("1/2", (14, -4)),
    "Shampoo 1": ("1", (10, 5)),
    "blocks of 8": ("8", (0, 11)),
    "blocks of 24": ("24", (4, 11)),
    "blocks of 64": ("64", (0, 11)),
    "A alone": ("A", (11, 0)),
    "B alone": ("B", (-11, 1)),
    "mini-block, outgoing": ("out", (16, -3)),
    "units of rank 10": ("10", (0, 11)),
    "units of rank 40": ("40", (13, -6)),
}
"""What tells the points of one structure apart, and where it stands."""
_CONDITION = r"condition number of $\bar\Theta$"


@draws("NG-Frontier-Shampoo")
def draw_shampoo(data: dict[str, Any]) -> Figure:
    """Condition numbers at infinite width against the number of samples, a curve a power."""
    figure, axes = panels(1, 1, (6.4, 3.6))
    axis, counts = axes[0, 0], data["counts"]
    for found, ink in zip(data["curves"], INKS, strict=False):
        power, values = found["power"], found["conditions"]
        plot(axis, counts, values, ink)
        axis.annotate(
            _POWERS[power],
            (counts[-1], values[-1]),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=ink.color,
        )
        if power < 0.5:
            slope = [values[0] * (count / counts[0]) ** (1 - 2 * power) for count in counts]
            axis.plot(counts, slope, color=GREY, linewidth=0.9, linestyle=":")
    log_ticks(axis, counts)
    axis.set_xlim(counts[0] * 0.9, counts[-1] * 3.4)
    axis.set_yscale("log")
    axis.set_xlabel("samples N")
    axis.set_ylabel(_CONDITION + ", infinite width")
    axis.set_title(r"dotted: $N^{1-2p}$ from the first point on", fontsize="small", color=GREY)
    return figure


@draws("NG-Frontier-Blocks")
def draw_blocks(data: dict[str, Any]) -> Figure:
    """Condition number against the inputs of a block: measured, ridge, free projections."""
    figure, axes = panels(1, len(data["curves"]), (8.6, 3.6), sharey=True)
    sizes = data["sizes"]
    for axis, (activation, found) in zip(axes[0], data["curves"].items(), strict=True):
        axis.plot(sizes, found["ridge"], color=GREY, linestyle="--", label="ridge, predicted")
        look = STYLES["UnitBlocks"]._replace(label="measured")
        plot(axis, sizes, found["measured"], look, linestyle="")
        free, color = found["free"], INKS[0].color
        axis.plot(sizes[: len(free)], free, color=color, linestyle=":", label="free projections")
        axis.axvline(data["samples"], color=GREY, linewidth=0.8)
        axis.annotate(
            f"N = {data['samples']}",
            (data["samples"], 1),
            (4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize="small",
            color=GREY,
        )
        log_ticks(axis, [size for size in sizes if size & (size - 1) == 0])
        log_ticks(axis, [1, 2, 3, 4, 6], "y")
        axis.set_xlabel("inputs of a block")
        axis.set_title(_ACTIVATIONS[activation], fontsize="medium")
    axes[0, 0].set_ylabel(_CONDITION)
    legend(figure, axes[0, 0], columns=3, fontsize="small")
    return figure


@draws("NG-Frontier-Map")
def draw_map(data: dict[str, Any]) -> Figure:
    """Condition number of every structure against numbers stored, and against flops."""
    figure, axes = panels(1, 2, (9.2, 4.8), sharey=True)
    points = data["points"]
    titles = {
        "stored": "numbers stored (none: at the left edge)",
        "flops": "flops of a step over those of gradient descent",
    }
    for axis, (what, title) in zip(axes[0], titles.items(), strict=True):
        edge = min(point[what] for point in points if point[what] > 0) / 10
        for family in dict.fromkeys(point["structure"] for point in points):
            style = STYLES[family]
            own = [point for point in points if point["structure"] == family]
            large = family in _UNDER
            plot(
                axis, [point[what] or edge for point in own], [point["relu"] for point in own],
                style, linewidth=0.8, markersize=11 if large else 7,
                markerfacecolor="none" if large else style.color,
            )  # fmt: skip
            for point in own:
                if point["name"] in _MARKS:
                    text, offset = _MARKS[point["name"]]
                    axis.annotate(
                        text,
                        (point[what], point["relu"]),
                        offset,
                        textcoords="offset points",
                        ha="center",
                        va="center",
                        fontsize="small",
                        color=style.color,
                    )
        axis.set_xscale("log")
        axis.xaxis.minorticks_off()
        log_ticks(axis, [1, 2, 3, 5, 10, 20], "y")
        axis.set_xlabel(title)
    axes[0, 0].set_ylabel(_CONDITION + ", ReLU")
    legend(figure, axes[0, 0], columns=5, fontsize="small")
    return figure


@draws("NG-Frontier-Batches")
def draw_batches(data: dict[str, Any]) -> Figure:
    """Condition number of the mean step against the batch, beside its limits."""
    figure, axes = panels(1, 1, (6.4, 3.6))
    axis, sizes, total = axes[0, 0], data["sizes"], data["samples"]
    for law, name in (
        ([total / n for n in sizes], r"$N/n$"),
        ([1 + (total - n) / n**2 for n in sizes], r"$1 + (N - n)/n^2$"),
    ):
        axis.plot(sizes, law, color=GREY, linewidth=0.9, linestyle=":")
        axis.annotate(
            name, (sizes[0], law[0]), (-8, 0), textcoords="offset points", ha="right",
            va="center", fontsize="small", color=GREY,
        )  # fmt: skip
    for structure, values in data["conditions"].items():
        plot(axis, sizes, values, STYLES[structure])
    log_ticks(axis, sizes)
    axis.set_xlim(sizes[0] * 0.55, sizes[-1] * 1.2)
    log_ticks(axis, [1, 2, 5, 10, 20], "y")
    axis.set_xlabel(f"batch n, of N = {total}")
    axis.set_ylabel("condition number of the mean step")
    axis.legend(frameon=False)
    return figure


@draws("NG-Frontier-Training")
def draw_training(data: dict[str, Any]) -> Figure:
    """Steps to a thousandth of the loss by structure: predicted hollow, measured filled."""
    figure, axes = panels(1, len(data["rows"]), (9.2, 4.4), sharey=True)
    steps: dict[str, float] = {}
    for rows in data["rows"].values():
        for row in rows:
            steps[row["name"]] = steps.get(row["name"], 0) + row["measured"]
    places = {name: place for place, name in enumerate(sorted(steps, key=steps.__getitem__))}
    for axis, (activation, rows) in zip(axes[0], data["rows"].items(), strict=True):
        for row in rows:
            place, style = places[row["name"]], STYLES[row["structure"]]
            axis.plot(
                [row["predicted"], row["measured"]], [place, place], color=GREY, linewidth=0.8
            )
            for key, face in (("predicted", "white"), ("measured", style.color)):
                axis.plot(
                    row[key],
                    place,
                    color=style.color,
                    marker="o",
                    markersize=10 if key == "predicted" else 5,
                    markerfacecolor=face,
                    linestyle="",
                    label=key if place == len(places) - 1 else None,
                )
        log_ticks(axis, [1, 3, 10, 30, 100, 300])
        axis.set_yticks(range(len(places)), list(places))
        axis.set_xlabel("steps to a thousandth of the loss")
        axis.set_title(_ACTIVATIONS[activation], fontsize="medium")
    axes[0, 0].legend(frameon=False, loc="lower right")
    return figure
