"""Draws the figures of the report, for wide and for narrow screens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntk_analysis.figures import draw_dynamics
from ntk_analysis.figures_theory import draw_isotropy, draw_prediction
from ntk_analysis.report import phone

FINITE = "accuracy at finite width"
"""The name of this part in results.json."""


@dataclass(frozen=True)
class Drawn:
    """One figure in both shapes.

    Attributes:
      wide: SVG file for wide screens and paper.
      narrow: SVG file for phones.
    """

    wide: Path
    narrow: Path


def draw_figures(document: dict[str, Any], out: Path) -> dict[str, Drawn]:
    """Draws every figure of a report, for wide and for narrow screens.

    Args:
      document: what results.json of the report holds.
      out: the folder.

    Returns:
      The figures by name; "rates" only where a structure was trained at several learning rates.
    """
    parts, narrow = document["parts"], out / "narrow"
    training, sweep, limit, finite = (
        parts[name] for name in ("training", "isotropy", "accuracy", FINITE)
    )
    records = list(training["methods"].values())
    largest = [r for r in records if r["factor"] == max(_factors(records, r["structure"]))]
    wide = {
        path.stem: path
        for path in (
            *draw_dynamics(training, records, out),
            *draw_isotropy(sweep, list(sweep["methods"].values()), out),
            *draw_prediction(limit, list(limit["methods"].values()), out),
        )
        if path.suffix == ".svg"
    }
    found = {
        "loss": Drawn(wide["loss"], phone.draw_training(largest, narrow / "loss.svg")),
        "condition_number": Drawn(
            wide["condition_number"],
            phone.draw_condition_numbers(sweep, narrow / "condition_number.svg"),
        ),
        "spectra": Drawn(wide["spectra"], phone.draw_spectra(sweep, narrow / "spectra.svg")),
        "cost": Drawn(wide["cost"], phone.draw_costs(sweep, narrow / "cost.svg")),
        "accuracy": Drawn(
            wide["accuracy"],
            phone.draw_accuracies(
                _limit_accuracies(limit), limit["data"]["num_test"], narrow / "accuracy.svg"
            )[0],
        ),
    }
    if "learning_rates" in wide:
        several = [r for r in records if len(_factors(records, r["structure"])) > 1]
        shown = [r for r in records if r["structure"] == "GradientDescent"] + several
        found["rates"] = Drawn(
            wide["learning_rates"], phone.draw_rates(shown, narrow / "learning_rates.svg")
        )
    if finite:
        groups, samples = _finite_accuracies(finite), finite[0]["data"]["num_test"]
        found["finite"] = Drawn(
            phone.draw_accuracies(groups, samples, out / "finite_accuracy.svg", narrow=False)[0],
            phone.draw_accuracies(groups, samples, narrow / "finite_accuracy.svg")[0],
        )
    return found


def _factors(records: list[dict[str, Any]], structure: str) -> list[float]:
    return [r["factor"] for r in records if r["structure"] == structure]


def _limit_accuracies(limit: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return [(r["structure"], r["accuracies"] or [r["accuracy"]]) for r in limit["methods"].values()]


def _finite_accuracies(finite: list[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    return [
        (record["structure"], [document["methods"][name]["accuracy"] for document in finite])
        for name, record in finite[0]["methods"].items()
    ]
