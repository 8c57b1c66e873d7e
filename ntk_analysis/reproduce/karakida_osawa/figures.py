"""Figures of Karakida & Osawa (2020), from the data of their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from natgrad_flax.structures import Style
from ntk_analysis.frame import GREY, INKS, Ink, legend, log_ticks, panels, plot
from ntk_analysis.methods import STRUCTURES
from ntk_analysis.palette import STYLES, tint
from ntk_analysis.reproduce.drawings import draws
from ntk_analysis.tables import PROPER_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = 1e-10
_LOSS = r"training loss $\frac{1}{2N}\sum_n (y_n - f(x_n))^2$"
# of the curves at the right of Figure 1(b); what explodes leaves the panel at the top
_RIGHT_DAMPINGS = (0.0, 1e-1, 1e-3, 1e-5, 1e-8, 1e-12)
_TOP = 1e4
_FAR = 1e30
# names of the entries that are not called after a structure
_STYLES = {"NTK": STYLES["GradientDescent"]._replace(label="Tangent kernel (gradient descent)")}


@draws("KO-Fig1a")
def draw_figure_1a(data: dict[str, Any]) -> Figure:
    """Loss against the step: theory as lines, networks as markers, one colour a structure."""
    figure, axes = panels(1, 1, (8.6, 4.6))
    axis = axes[0, 0]
    seeds: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for curve in data["curves"]:
        seeds.setdefault((curve["structure"], curve["factor"]), []).append(curve)
    sizes = np.linspace(10, 6, len(seeds))
    for ((structure, factor), found), size in zip(seeds.items(), sizes, strict=True):
        style = STYLES[structure]
        color = tint(style.color, factor**0.5)
        over = r"\lambda_{\max}" if structure == "GradientDescent" else r"\alpha"
        _losses(
            axis,
            found[0]["network"],
            found[0]["theory"],
            Ink(color, style.marker, "-"),
            label=rf"{style.label}, $\eta = {factor:g}\,/\,{over}$",
            size=float(size),
        )
        values = np.maximum([curve["network"] for curve in found], _FLOOR)
        axis.fill_between(
            range(values.shape[1]), values.min(axis=0), values.max(axis=0), color=color, alpha=0.3,
            linewidth=0, zorder=1,
        )  # fmt: skip
    _finish_losses(axis, _FLOOR)
    axis.set_title("Lines: theory. Markers: network, $M = 4096$; bands: three seeds", loc="left")
    axis.annotate(
        r"lines at $1\,/\,\alpha$ coincide, but for unit-wise; cut at $10^{-10}$",
        (1, 0),
        (-4, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize="small",
        color=GREY,
    )
    legend(figure, axis)
    return figure


@draws("KO-Fig1a-width")
def draw_width(data: dict[str, Any]) -> Figure:
    """Loss after the one step that the theory needs, by width; one marker a network."""
    figure, axes = panels(1, 1, (6.4, 3.6))
    axis = axes[0, 0]
    widths = np.asarray(data["widths"], float)
    for name, losses in data["first_losses"].items():
        style = _style(name)
        values = np.asarray(losses, float)
        axis.plot(
            np.repeat(widths, values.shape[1]), values.ravel(), style.marker, color=style.color,
            alpha=0.45, markersize=4,
        )  # fmt: skip
        plot(axis, widths, values.mean(axis=1), style, markersize=7)
    log_ticks(axis, data["widths"], base=2)
    axis.set_yscale("log")
    axis.set_xlim(widths.min() / 1.25, widths.max() * 1.25)
    axis.set_xlabel("width $M$")
    axis.set_ylabel("training loss after one step")
    legend(figure, axis)
    return figure


@draws("KO-Fig1b-left")
def draw_figure_1b_left(data: dict[str, Any]) -> Figure:
    """Four layers: loss curves by damping, and where the damped system is singular."""
    figure, axes = panels(1, 2, (9.2, 4.2))
    left, right = axes[0]
    width = max(curve["width"] for curve in data["curves"])
    shown = [curve for curve in data["curves"] if curve["width"] == width]
    # what is drawn first is larger, so that curves which coincide can be seen
    for curve, ink, size in zip(shown, INKS, (11, 6, 7, 7), strict=False):
        label = _damping(curve["damping"])
        _losses(left, curve["network"], curve["theory"], ink, label=label, size=size)
    _finish_losses(left)
    left.set_title(f"As in the paper: $L = 4$, $M = {width}$", loc="left")
    left.legend(title="lines: theory", frameon=True, loc="lower left")
    scan = data["scan"]
    _radius(right, data["radii"])
    right.plot(
        scan["damping"], _numbers(scan["rise"]), INKS[1].marker, color=INKS[1].color, markersize=4,
        label="network",
    )  # fmt: skip
    _finish_dampings(right)
    right.set_title("Largest $loss_t\\,/\\,loss_0$ by damping, $M = 1024$", loc="left")
    right.legend(loc="upper right", frameon=True, fontsize="small")
    return figure


@draws("KO-Fig1b-right")
def draw_figure_1b_right(data: dict[str, Any]) -> Figure:
    """Five layers: loss curves by damping, and the two ranges in which training explodes."""
    figure, axes = panels(1, 2, (9.2, 4.6))
    left, right = axes[0]
    # records of before are of one width
    width = max(curve.get("width", 512) for curve in data["curves"])
    wide = [c for c in data["curves"] if c.get("width", 512) == width]
    narrow = [c for c in data["curves"] if c.get("width", 512) == 512]
    found = {
        c["damping"]: c
        for c in wide
        if (c["depth"], c["precision"], c["solver"]) == (5, "float32", "elimination")
    }
    for damping, ink in zip(_RIGHT_DAMPINGS, INKS, strict=True):
        size = 7.0 if damping else 11.0
        _losses(left, found[damping]["network"], None, ink, label=_damping(damping), size=size)
    start = found[0.0]["network"][0]
    left.plot(data["steps"], [start * 0.25**t for t in data["steps"]], color=GREY, linewidth=1,
              label=r"$0.25^t\,loss_0$", zorder=1)  # fmt: skip
    _finish_losses(left, 1e-9, _TOP)
    left.set_title(f"$L = 5$, float32, $M = {width}$", loc="left")
    left.legend(loc="upper right", frameon=True, fontsize="small", ncols=2)

    _radius(right, data["radii"])
    groups = {
        "$L = 5$, float32": [c for c in narrow if (c["depth"], c["precision"]) == (5, "float32")],
        "$L = 5$, float64": [c for c in narrow if c["precision"] == "float64"],
        "$L = 4$, float32": [c for c in narrow if c["depth"] == 4],
    }
    for (label, curves), ink, size in zip(groups.items(), INKS[1:], (7, 12, 6), strict=False):
        damped = [c for c in curves if c["damping"] > 0]
        rises = [_rise(c["network"]) for c in damped]
        right.plot(
            [c["damping"] for c in damped], np.minimum(rises, _TOP), ink.marker,
            color=ink.color, markersize=size, markeredgecolor="white", label=f"network, {label}",
            clip_on=False, zorder=3,
        )  # fmt: skip
    scan = data["scan"]
    right.plot(
        scan["damping"], np.minimum(_numbers(scan["rise"]["elimination"]), _TOP), ".",
        color=INKS[1].color, markersize=4, clip_on=False,
    )  # fmt: skip
    _finish_dampings(right)
    right.set_title("Largest $loss_t\\,/\\,loss_0$ by damping, $M = 512$", loc="left")
    right.legend(loc="upper left", bbox_to_anchor=(0, 0.9), frameon=True, fontsize="small")
    return figure


@draws("KO-Fig2-left", "KO-Fig2-left-small", "KO-Fig2-center", "KO-Fig2-right", "KO-Fig2-kfac")
def draw_figure_2(data: dict[str, Any]) -> Figure:
    """Test accuracy by structure: mean and standard deviation over initialisations."""
    figure, axes = panels(1, 1, (7.6, 3.4))
    axis = axes[0, 0]
    table = data["accuracy"]
    for place, (name, accuracy) in enumerate(table.items()):
        style = _style(name.split(",")[0])
        mean, std = 100 * accuracy["mean"], 100 * accuracy["std"]
        axis.errorbar(
            place, mean, yerr=std, fmt=style.marker, color=style.color, capsize=5, markersize=9
        )
        axis.annotate(
            f"{mean:.2f}", (place, mean), (10, 0), textcoords="offset points", va="center",
            fontsize="small",
        )  # fmt: skip
    names = [name.split(",") for name in table]
    labels = ["\n".join([_style(name).label, *more]) for name, *more in names]
    axis.set_xticks(range(len(table)), labels)
    axis.set_xlim(-0.5, len(table) - 0.3)
    means = [100 * accuracy["mean"] for accuracy in table.values()]
    # a scale on which one point of accuracy can be seen, however close the means are
    axis.set_ylim(min(means) - 1, max(means) + 1)
    axis.set_ylabel("test accuracy in %")
    axis.grid(visible=False, axis="x")
    samples = f"$N = {data['num_train']}$, $N' = {data['num_test']}$"
    axis.set_title(f"{PROPER_NAMES[data['data']]}, {samples}", loc="left")
    return figure


@draws("KO-Fig3")
def draw_figure_3(data: dict[str, Any]) -> Figure:
    """Condition number against the width, with the standard deviation over seeds."""
    figure, axes = panels(1, 1, (7.4, 4.2))
    axis = axes[0, 0]
    for curve in data["curves"]:
        style = _style(curve["structure"])
        axis.errorbar(
            data["widths"], curve["mean"], yerr=curve["spread"], marker=style.marker,
            color=style.color, label=style.label, capsize=3, markersize=7,
        )  # fmt: skip
    axis.axhline(1, color=GREY, linewidth=1, zorder=1)
    log_ticks(axis, data["widths"], base=2)
    axis.set_yscale("log")
    axis.set_xlabel("width $M$")
    axis.set_ylabel(r"condition number of $\bar\Theta$")
    legend(figure, axis)
    return figure


@draws("KO-Thm5.1-training")
def draw_unit_wise(data: dict[str, Any]) -> Figure:
    """Training beside Eq. 24, and condition numbers over the width, by damping."""
    figure, axes = panels(1, 2, (9.2, 4.6))
    left, right = axes[0]
    shown = [curve for curve in data["curves"] if curve["factor"] < 1]
    _losses(left, [], shown[0]["theory"], Ink(GREY, "", "-"), label="")
    for curve, ink in zip(shown, INKS, strict=False):
        name = "ReLU" if curve["activation"] == "relu" else "tanh"
        label = rf"{name}, $\rho =$ {_typeset(curve['damping'])}"
        _losses(left, curve["network"], None, ink._replace(dash=" "), label=label)
    _finish_losses(left)
    left.set_title(r"$\eta = 0.5\,/\,\alpha$, $M = 1024$. Grey: Eq. 24", loc="left")
    left.legend(frameon=True, fontsize="small", loc="lower left")
    widths = data["widths"]
    for (name, values), ink in zip(
        data["conditions"].items(), (Ink(GREY, "", "-"), *INKS), strict=False
    ):
        label = name if name == "tangent kernel" else rf"$\rho =$ {_typeset(name)}"
        right.plot(
            widths, values, ink.dash, color=ink.color, marker=ink.marker, markersize=7, label=label,
            **({} if ink.marker else {"linewidth": 7, "alpha": 0.4}),
        )  # fmt: skip
    log_ticks(right, widths, base=2)
    right.set_yscale("log")
    right.set_ylim(0.8, 3000)
    right.set_xlabel("width $M$")
    right.set_ylabel(r"condition number of $\bar\Theta$")
    right.set_title("tanh, $N = 30$", loc="left")
    right.legend(frameon=True, fontsize="small", loc="upper left", ncols=2)
    return figure


@draws("KO-SecD-wide")
def draw_margins(data: dict[str, Any]) -> Figure:
    """Margins of some samples of a network as markers, on the lines of the law."""
    figure, axes = panels(1, 1, (6.4, 3.6))
    axis = axes[0, 0]
    for curve, ink in zip(data["curves"], INKS, strict=False):
        axis.plot(data["time"], curve["theory"], "-", color=ink.color, linewidth=1.6)
        axis.plot(data["time"], curve["network"], ink.marker, color=ink.color, markersize=6)
    axis.set_xlabel("time $t$")
    axis.set_ylabel("margin $z$ of a sample")
    axis.set_title(r"Lines: $e^z + 1 = e^t (e^{z(0)} + 1)$. Markers: network", loc="left")
    return figure


def _typeset(damping: str) -> str:
    """A damping as mathematics."""
    for plain, formula in (("M^(-1/12)", "$M^{-1/12}$"), ("1/M^2", "$1/M^2$"), ("1/M", "$1/M$")):
        if damping.startswith(plain):
            return damping.replace(plain, formula).replace(" of a block's diagonal", ", relative")
    return damping.replace(" of a block's diagonal", ", relative")


def _style(name: str) -> Style:
    """Of a structure by its name on the command line."""
    return _STYLES.get(name) or STRUCTURES[name].style


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Numbers of JSON, where None is one that is not finite."""
    return np.asarray([np.inf if value is None else value for value in values], float)


def _rise(losses: Sequence[float | None]) -> float:
    """The largest loss after training has begun, over the loss before."""
    found = _numbers(losses)
    return float(found[1:].max() / found[0])


def _damping(value: float) -> str:
    """The label of a curve."""
    if value == 0:
        return r"$\rho = 0$"
    return rf"$\rho = 10^{{{round(np.log10(value))}}}$"


def _losses(
    axis: Axes,
    network: Sequence[float | None],
    theory: Sequence[float] | None,
    ink: Ink,
    *,
    label: str,
    size: float = 7.0,
) -> None:
    """One network as markers, on the line of its theory, or joined where there is none."""
    # what is no longer finite leaves the panel at the top
    line = np.minimum(_numbers(network if theory is None else theory), _FAR)
    # a theory that ends at zero is drawn down to the floor and no further
    line[1:][line[:-1] <= _FLOOR] = np.nan
    axis.plot(np.maximum(line, _FLOOR), ink.dash, color=ink.color, linewidth=1.6, zorder=2)
    values = _numbers(network)
    shown = np.isfinite(values) & (values > _FLOOR)
    axis.plot(
        np.where(shown, values, np.nan), ink.marker,
        color=ink.color, markersize=size, markeredgecolor="white", markeredgewidth=0.7,
        label=label, zorder=3,
    )  # fmt: skip


def _finish_losses(axis: Axes, low: float | None = None, high: float | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.set_xlabel("step $t$")
    axis.set_ylabel(_LOSS)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _radius(axis: Axes, radii: dict[str, Any]) -> None:
    """The spectral radius of the linearised network, and the resonances as ticks below it."""
    axis.plot(
        radii["damping"], _numbers(radii["radius"]), color=INKS[0].color, linewidth=1.4, zorder=2,
        label=r"spectral radius of $I - \eta\bar\Theta$",
    )  # fmt: skip
    axis.plot(
        radii["resonances"], np.full(len(radii["resonances"]), 0.03), "|", color=GREY,
        markersize=8, transform=axis.get_xaxis_transform(), label="resonances",
    )  # fmt: skip


def _finish_dampings(axis: Axes) -> None:
    axis.axhline(1, color=GREY, linewidth=1, zorder=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(None, _TOP)
    axis.set_xlabel(r"damping $\rho$")
    axis.set_ylabel("above 1: diverges; top edge: $10^4$ or more")
