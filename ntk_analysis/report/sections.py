"""The figures of the report with what is to be seen in them, and how to repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ntk_analysis.methods import default_dampings
from ntk_analysis.palette import STYLES
from ntk_analysis.report.commands import dynamics_command, isotropy_command, prediction_command
from ntk_analysis.report.drawing import FINITE, Drawn
from ntk_analysis.report.settings import ReportSettings
from ntk_analysis.tables import setting_sentence
from ntk_analysis.tables_theory import step_over_gradient, sweep_sentence


@dataclass(frozen=True)
class Figure:
    """A figure with its words.

    Attributes:
      drawn: its files.
      alt: what it shows, for those who do not see it.
      caption: what is to be seen.
      setting: sizes and data.
      commands: what repeats it.
    """

    drawn: Drawn
    alt: str
    caption: str
    setting: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      anchor: its name in links.
      title: its heading.
      lead: what the question of this part is.
      figures: at least one.
      notes: what a reader should know.
    """

    anchor: str
    title: str
    lead: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()


def sections(
    document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]
) -> list[Section]:
    """The sections with figures, in the order of the page.

    Args:
      document: what results.json of the report holds.
      settings: of the report.
      drawn: of ``draw_figures``.
    """
    return [
        _isotropy(document, settings, drawn),
        _spectra(document, settings, drawn),
        _training(document, settings, drawn),
        _accuracy(document, settings, drawn),
        _cost(document, settings, drawn),
    ]


def _isotropy(
    document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]
) -> Section:
    figure = Figure(
        drawn["condition_number"],
        "Condition number of the coefficient matrix at initialisation against the width of the "
        "hidden layers, one curve a structure, both axes logarithmic",
        "A condition number of 1 means isotropic: every direction of function space is trained at "
        "the same speed. Structures that are isotropic in theory lie on the bottom line as soon "
        "as the layers are as wide as there are samples; the unit-wise one comes closer as the "
        "width grows; what stays above does not approach 1.",
        f"{_sweep_words(document, settings)}; line: geometric mean, band: range over "
        f"{len(settings.sweep.sweep.seeds)} seeds of inputs and parameters.",
        (isotropy_command(settings.sweep),),
    )
    lead = (
        "Θ̄(x, x) = J G⁻¹ Jᵀ / N, with G the approximate Fisher, says how a step moves the outputs "
        "on the training samples. Natural gradient is fast where it is α times the identity."
    )
    return Section("isotropy", "Isotropy against width", lead, (figure,), _conditions(document))


def _spectra(
    document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]
) -> Section:
    figure = Figure(
        drawn["spectra"],
        "Eigenvalues of the coefficient matrix over their mean, from the largest to the smallest, "
        "one curve a structure, logarithmic",
        "A flat line at 1 is an isotropic Fisher. A steep one means that some directions of "
        "function space wait: with one learning rate for all, the smallest eigenvalue decides how "
        "long training takes.",
        f"{_point_words(document, settings)}.",
        (isotropy_command(settings.sweep),),
    )
    lead = "The condition number is two eigenvalues; these are all of them."
    return Section("spectra", "Spectra", lead, (figure,))


def _training(
    document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]
) -> Section:
    training = document["parts"]["training"]
    command = (dynamics_command(settings.training),)
    sentence = (
        f"{setting_sentence(training)}; σ_w² = {settings.training.weight_variance:g}, "
        f"σ_b² = {settings.training.bias_variance:g}; trained in {settings.training.dtype}, seed "
        f"{settings.training.seed}; theory in float64."
    )
    figures = [
        Figure(
            drawn["loss"],
            "Loss per step of every structure on training and test data: theory as lines, the "
            "network as markers",
            "Lines: the linearised network, computed from the kernels at initialisation. Markers: "
            "the network itself. An isotropic structure with η = 1/α reaches zero in one step in "
            "theory; what the network has left after it is its distance from its linearisation, "
            "which shrinks with the width.",
            sentence,
            command,
        )
    ]
    if "learning_rates" in drawn:
        figures.append(
            Figure(
                drawn["learning_rates"],
                "Loss per step of the block-diagonal structure at three learning rates, and of "
                "gradient descent",
                "At η = c/α the residual shrinks by the factor 1 − c a step, in every direction: "
                "straight lines on this scale. Gradient descent has a different speed in each "
                "direction, so its curve bends.",
                sentence,
                command,
            )
        )
    lead = "Does the network really train as the theory says?"
    notes = tuple(
        f"{label}: {note}" for note, label in _notes(training["methods"].values()).items()
    )
    return Section("training", "Predicted against trained curves", lead, tuple(figures), notes)


def _accuracy(
    document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]
) -> Section:
    limit = document["parts"]["accuracy"]
    draws = settings.limit.initialisations
    figures = [
        Figure(
            drawn["accuracy"],
            "Test accuracy of the infinitely wide network for the structures that have a limit",
            "Structures end at different functions, which fit the training samples equally well; "
            f"here is how they predict. {_differences(limit)}",
            f"{setting_sentence(limit)}, N' = {limit['data']['num_test']}; analytic kernels of "
            f"infinite width, f₀ of {draws} networks of the given widths.",
            (prediction_command(settings.limit),),
        )
    ]
    finite = document["parts"][FINITE]
    if "finite_accuracy" in drawn:
        figures.append(
            Figure(
                drawn["finite_accuracy"],
                "Test accuracy at finite width for every structure, one dot a network",
                "All structures, at finite width, where linearised training ends. Small dots: one "
                "network each; marker: their mean. Gradient descent ends where the exact natural "
                "gradient does, only much later.",
                f"{setting_sentence(finite[0])}, N' = {finite[0]['data']['num_test']}; empirical "
                f"kernels, {len(finite)} seeds; "
                + "; ".join(f"{who} with a {kind} of {x}" for kind, x, who in default_dampings())
                + ".",
                tuple(prediction_command(part) for part in settings.finite),
            )
        )
    lead = "Does the choice of the Fisher change what is learned?"
    notes = tuple(f"{label}: {note}" for note, label in _notes(limit["methods"].values()).items())
    return Section("accuracy", "Test accuracy by structure", lead, tuple(figures), notes)


def _cost(
    document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]
) -> Section:
    figure = Figure(
        drawn["cost"],
        "Condition number beside the share of Fisher entries that a structure keeps, and beside "
        "the arithmetic of one step, one marker a structure",
        "Lower is more isotropic, further left is cheaper; the best corner is at the bottom left. "
        "Entries are what an implementation stores that forms G. The arithmetic is that of this "
        "project, which solves in sample space and forms no G: over that of a gradient, it runs "
        f"from {_cost_range(document)}.",
        f"{_point_words(document, settings)}. Flops are those of this project's solves, "
        "counted in their programs and not timed.",
        (isotropy_command(settings.sweep),),
    )
    lead = "What does isotropy cost?"
    return Section("cost", "Cost against isotropy", lead, (figure,))


def _sweep_words(document: dict[str, Any], settings: ReportSettings) -> str:
    sweep = settings.sweep.sweep
    dimension = "" if sweep.num_inputs is None else f", input dimension {sweep.num_inputs}"
    return (
        f"{sweep_sentence(document['parts']['isotropy'])}{dimension}, "
        f"σ_w² = {sweep.weight_variance:g}, σ_b² = {sweep.bias_variance:g}, no damping"
    )


def _point_words(document: dict[str, Any], settings: ReportSettings) -> str:
    sweep = settings.sweep.sweep
    return f"{_sweep_words(document, settings)}; width {sweep.values[-1]}, seed {sweep.seeds[0]}"


def _conditions(document: dict[str, Any]) -> tuple[str, ...]:
    """At which widths the conditions of the theory fail, and with which structures."""
    places: dict[str, dict[int, None]] = {}
    failures: dict[str, dict[int, None]] = {}
    for row in document["parts"]["isotropy"]["methods"].values():
        label = STYLES[row["class"]].label
        if row["failed_conditions"]:
            places.setdefault(label, {})[row["width"]] = None
        if row["failure"]:
            failures.setdefault(label, {})[row["width"]] = None
    notes = [
        "The theory asks for samples that are linearly independent in every layer, which some "
        f"networks are too narrow for: {_at_widths(places)}. There the pseudo-inverse leaves a "
        "condition number above 1; the table that the command prints says how far."
        if places
        else "",
        f"Without a number: {_at_widths(failures)}." if failures else "",
    ]
    return tuple(filter(None, notes))


def _at_widths(places: dict[str, dict[int, None]]) -> str:
    return "; ".join(
        f"{label} at M = {', '.join(map(str, widths))}" for label, widths in places.items()
    )


def _notes(records: Any) -> dict[str, str]:
    """Notes of records, each with the labels that it is about."""
    about: dict[str, list[str]] = {}
    for record in records:
        for note in record["notes"]:
            about.setdefault(note, []).append(STYLES[record["structure"]].label)
    return {note: ", ".join(dict.fromkeys(labels)) for note, labels in about.items()}


def _cost_range(document: dict[str, Any]) -> str:
    """The cheapest and the dearest step over the gradient."""
    costs = {
        STYLES[row["class"]].label: step_over_gradient(row["cost"])
        for row in document["parts"]["isotropy"]["methods"].values()
        if row.get("cost") and row["class"] != "GradientDescent"
    }
    low, high = min(costs, key=lambda k: costs[k]), max(costs, key=lambda k: costs[k])
    return f"{costs[low]:.2f} ({low}) to {costs[high]:.2f} ({high})"


def _differences(limit: dict[str, Any]) -> str:
    """How far accuracies are from that of the exact Fisher, beside the spread over networks."""
    means = {
        name: 100 * sum(record["accuracies"]) / len(record["accuracies"])
        for name, record in limit["methods"].items()
        if record["accuracies"]
    }
    if "exact" not in means or len(means) < 2:
        return ""
    parts = [
        f"{STYLES[limit['methods'][name]['structure']].label} {mean - means['exact']:+.1f}"
        for name, mean in means.items()
        if name != "exact"
    ]
    return (
        "Mean accuracy over initialisations, in points against the exact Fisher "
        f"({means['exact']:.1f} %): {', '.join(parts)}."
    ).replace("-0.0", "0.0")
