"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from natgrad_datasets import DatasetStatus
from rich import box
from rich.table import Table
from rich.text import Text

from ntk_analysis.networks import network_words
from ntk_analysis.palette import STYLES

_SHOWN_STEPS = (1, 2)
_NEGLIGIBLE = 1e-20
PROPER_NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "gelu": "GELU",
}


def dynamics_table(document: dict[str, Any], records: Sequence[dict[str, Any]]) -> Table:
    """Losses after the first steps and at the end, theory above network.

    Args:
      document: what results.json holds.
      records: the methods to show.
    """
    steps = document["settings"]["steps"]
    shown = [("train", step) for step in _SHOWN_STEPS if step < steps]
    shown += [("train", steps), ("test", steps)]
    table = Table(
        title=setting_sentence(document),
        caption="Loss 1/(2N) Σ|y - f|² of the linearised network (upper line: theory, from the "
        "kernels at initialisation) and of the network (lower line).",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    table.add_column("learning\nrate η", justify="right", no_wrap=True)
    for part, step in shown:
        table.add_column(f"{part}\nstep {step}", justify="right", no_wrap=True)
    table.add_column("ms a\nstep", justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            method_label(record),
            f"{record['learning_rate']:.3g}",
            *(_pair(record, f"{part}_loss", step) for part, step in shown),
            f"{1e3 * record['seconds_per_step']:.1f}",
        )
    return table


def dataset_table(rows: Sequence[DatasetStatus]) -> Table:
    """The data sets and their state on this machine."""
    table = Table(
        title="Data sets",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("name", no_wrap=True)
    for name in ("train", "test"):
        table.add_column(f"{name}\nsamples", justify="right", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("classes", justify="right", no_wrap=True)
    table.add_column("state on this machine", overflow="fold")
    for row in rows:
        size = f" ({row.size_bytes / 1e6:.1f} MB)" if row.size_bytes else ""
        state = f"{row.found}{size}\nchecksums: {row.checksum}\nlicence: {row.licence}\n"
        table.add_row(
            row.name,
            f"{row.num_train:,}",
            f"{row.num_test:,}",
            "×".join(map(str, row.shape)),
            str(row.num_classes),
            Text(state),
        )
    return table


def method_label(record: dict[str, Any]) -> str:
    """The name of a method, with the factor of its learning rate."""
    label = STYLES[record["structure"]].label
    return label if record["factor"] == 1 else f"{label}, c = {record['factor']:g}"


def setting_sentence(document: dict[str, Any]) -> str:
    """Data and network in one line."""
    data, settings = document["data"], document["settings"]
    inputs = "×".join(map(str, data.get("sample_shape", [data["input_dim"]])))
    classes = " vs ".join(data["class_names"])
    if len(data["classes"]) > 2:
        classes = f"{len(data['classes'])} classes"
    name = PROPER_NAMES.get(data["name"], data["name"])
    activation = PROPER_NAMES.get(settings["activation"], settings["activation"])
    widths = "-".join(map(str, (inputs, *settings["widths"], data["output_dim"])))
    network = network_words(settings.get("network", "mlp"))
    return f"{name}, {classes}, N = {data['num_train']}; {activation} {network} {widths}"


def _pair(record: dict[str, Any], which: str, step: int) -> str:
    return "\n".join(_loss(record[part][which][step]) for part in ("theory", "network"))


def _loss(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.1e}" if value >= _NEGLIGIBLE else f"<{_NEGLIGIBLE:.0e}"
