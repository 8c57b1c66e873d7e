"""Results of ``natgrad predict`` and ``natgrad isotropy`` as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ntk_analysis.networks import network_words
from ntk_analysis.palette import STYLES
from ntk_analysis.tables import PROPER_NAMES, setting_sentence


def prediction_table(document: dict[str, Any], records: Sequence[dict[str, Any]]) -> Table:
    """Accuracies and losses on test data, a row a structure.

    Args:
      document: what results.json holds.
      records: the structures to show.
    """
    settings, data = document["settings"], document["data"]
    analytic = settings["kernels"] == "analytic"
    where = "the mean output over initialisations" if analytic else "the linearised network"
    table = _table(
        f"{setting_sentence(document)}, N' = {data['num_test']}; {settings['kernels']} kernels",
        f"Trained to the end. Accuracies in %. The first one and the loss 1/(2N') Σ|y - f|² are "
        f"those of {where}.",
    )
    table.add_column("structure", no_wrap=True)
    table.add_column("test\naccuracy", justify="right", no_wrap=True)
    draws = settings["initialisations"]
    if draws:
        table.add_column(f"over {draws} initial-\nisations", justify="right", no_wrap=True)
    if settings["covariance"] == "variance":
        table.add_column("expected\naccuracy", justify="right", no_wrap=True)
    table.add_column("test\nloss", justify="right", no_wrap=True)
    for record in records:
        row = [STYLES[record["structure"]].label, f"{100 * record['accuracy']:.2f}"]
        if draws:
            values = 100 * np.array(record["accuracies"])
            row.append(f"{values.mean():.2f} ± {_spread(values):.2f}")
        if settings["covariance"] == "variance":
            row.append(f"{100 * record['expected_accuracy']:.2f}")
        loss = record["test_loss"]
        row.append("not finite" if loss is None else f"{loss:.4g}")
        table.add_row(*row)
    return table


def isotropy_table(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """Condition number, alpha and deviation: medians over seeds, a row a structure and value.

    Args:
      document: what results.json holds.
      rows: the rows to show.
    """
    settings = document["settings"]
    variable, seeds = settings["variable"], len(settings["seeds"])
    table = _table(
        sweep_sentence(document),
        "α is the mean eigenvalue of Θ̄(x, x), the condition number its largest over its smallest "
        "one, the deviation |Θ̄/α - I|"
        f"{f'. Means over {seeds} seeds, geometric ones of condition numbers' * (seeds > 1)}.",
    )
    table.add_column("structure", no_wrap=True)
    table.add_column(variable.replace("_", "\n"), justify="right", no_wrap=True)
    for name in ("condition\nnumber", "α", "α in\ntheory", "deviation"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for label, structure, value, here in grouped(document, rows):
        numbers = [
            centre(here, "condition_number"),
            *(_mean(here, name) for name in ("alpha", "theoretical_alpha", "deviation")),
        ]
        table.add_row(
            STYLES[structure].label if label != last else "",
            f"{value:g}" if isinstance(value, (int, float)) else str(value),
            *("-" if math.isnan(number) else f"{number:.4g}" for number in numbers),
        )
        last = label
    return table


def grouped(
    document: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> list[tuple[str, str, Any, list[dict[str, Any]]]]:
    """Rows of every seed together: name, class name, value, rows; in the order of the settings."""
    settings = document["settings"]
    groups = []
    for label in dict.fromkeys(row["structure"] for row in rows):
        for value in settings["values"]:
            here = [
                row
                for row in rows
                if row["structure"] == label and row[settings["variable"]] == value
            ]
            if here:
                groups.append((label, here[0]["class"], value, here))
    return groups


def number(row: dict[str, Any], name: str) -> float:
    """An entry of a row: null stands for infinity, or where the row failed for no number."""
    value = row[name]
    if value is not None:
        return float(value)
    infinite = not row["failure"] and name in ("condition_number", "deviation")
    return math.inf if infinite else math.nan


def centre(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The geometric mean; infinite where an entry is."""
    return float(np.exp(np.mean(np.log([number(row, name) for row in rows]))))


def sweep_sentence(document: dict[str, Any]) -> str:
    """Data and network in one line, without what is varied."""
    settings = document["settings"]
    activation, dataset = settings["activation"], settings["dataset"]
    parts = {
        "num_samples": f"N = {settings['num_samples']}",
        "width": f"width {settings['width']}",
        "depth": f"L = {settings['depth']}",
        "activation": PROPER_NAMES.get(activation, activation),
        "damping": f"damping {settings['damping']:g}" if settings["damping"] else "",
    }
    parts.pop(settings["variable"])
    if document["kernels"] == "analytic":
        parts.pop("width", None)
        parts["kernels"] = "analytic kernels"
    if settings.get("network", "mlp") != "mlp":
        parts["network"] = network_words(settings["network"])
    data = "Gaussian inputs" if dataset == "gaussian" else PROPER_NAMES.get(dataset, dataset)
    return ", ".join([data, *(part for part in parts.values() if part)])


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([number(row, name) for row in rows]))


def _spread(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def step_over_gradient(cost: dict[str, Any]) -> float:
    """Flops of a step over those of the gradient in it.

    Args:
      cost: of ``StructureCost``, as results.json has it.
    """
    return float(cost["step_flops"] / (cost["step_flops"] - cost["inversion_flops"]))
