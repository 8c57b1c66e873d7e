"""Figures of the project's own results on ConvNets, from the data of their checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ntk_analysis.frame import GREY, INKS, legend, log_ticks, panels, plot
from ntk_analysis.palette import STYLES
from ntk_analysis.reproduce.drawings import draws

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {
    "mlp": "fully connected",
    "conv-flatten": "ConvNet, flatten",
    "conv-average": "ConvNet, average pooling",
}


@draws("NG-Conv-First")
def draw_first(data: dict[str, Any]) -> Figure:
    """Deviation from isotropy against the number of channels: of the whole, of the first layer."""
    figure, axes = panels(1, 2, (8.6, 3.6), sharey=True)
    titles = {"whole": "all layers", "first_layer": "first layer alone"}
    for axis, (part, title) in zip(axes[0], titles.items(), strict=True):
        for name in data["first_layer"]:
            plot(axis, data["channels"], data[part][name], STYLES[name])
        log_ticks(axis, data["channels"], base=2)
        axis.set_yscale("log")
        axis.set_xlabel("channels of each convolution")
        axis.set_title(title, fontsize="medium")
    worst = max(max(data["whole"][name]) for name in ("Exact", "BlockDiagonal"))
    axes[0, 0].set_ylabel(r"$\|\bar\Theta / \alpha - I\|$")
    axes[0, 0].annotate(
        f"exact, block-diagonal: {worst:.0e} at most",
        (0, 0),
        (4, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize="small",
        color=GREY,
    )
    axes[0, 1].legend(frameon=False)
    return figure


@draws("NG-Conv-Digits")
def draw_digits(data: dict[str, Any]) -> Figure:
    """Gradient descent on the three limits, beside the one step of an isotropic Fisher."""
    figure, axes = panels(1, 1, (7.4, 3.6))
    axis = axes[0, 0]
    for (name, network), ink in zip(data["networks"].items(), INKS, strict=False):
        losses = network["gradient_descent"]
        label = f"{_NAMES[name]} (condition number {network['condition_number']:.0f})"
        steps = range(len(losses))
        axis.plot(steps, losses, color=ink.color, linestyle=ink.dash, label=label)
    axis.axvline(1, color=GREY, linewidth=1, linestyle=":", label="natural gradient: done")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(left=0)
    axis.set_yscale("log")
    axis.set_xlabel(r"steps of gradient descent at $1/\lambda_{\max}$")
    axis.set_ylabel("training loss, infinite width")
    axis.legend(loc="lower left", framealpha=1, edgecolor="none", fontsize="small")
    return figure


@draws("NG-Conv-Training")
def draw_training(data: dict[str, Any]) -> Figure:
    """Losses of finite networks at the learning rate of theory, a panel a network."""
    figure, axes = panels(1, len(data["losses"]), (9.2, 3.4), sharey=True)
    for axis, (network, runs) in zip(axes[0], data["losses"].items(), strict=True):
        narrow, wide = data["widths"][network]
        for name, losses in runs.items():
            for values, dash, label in zip(losses, ":-", (None, STYLES[name].label), strict=True):
                plot(axis, range(len(values)), values, STYLES[name], linestyle=dash, label=label)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(f"{_NAMES[network]}\n{narrow} (dotted), {wide}", fontsize="medium")
    axes[0, 0].set_ylabel("training loss")
    legend(figure, axes[0, 0], columns=3)
    return figure
