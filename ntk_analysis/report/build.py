"""Runs the parts of a report, one after the other, and writes the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntk_analysis.experiment import run_dynamics, work_units
from ntk_analysis.files import replace_file
from ntk_analysis.isotropy_run import IsotropySettings, run_isotropy
from ntk_analysis.prediction_run import PredictionSettings, run_prediction
from ntk_analysis.report.comparison import (
    HERE,
    STALE,
    Source,
    counted,
    merge_checks,
    read_sources,
    side_by_side,
    without_data,
)
from ntk_analysis.report.drawing import FINITE, draw_figures
from ntk_analysis.report.page import PAGE_NAME, render
from ntk_analysis.report.papers import write_papers
from ntk_analysis.report.settings import ReportSettings
from ntk_analysis.report.verdict import answer, sentences, summary_rows
from ntk_analysis.reproduce import Check, find_checks, load_checks
from ntk_analysis.reproduce.runner import run_checks
from ntk_analysis.results import (
    DIGESTS,
    FILE_NAME,
    Say,
    environment,
    now,
    plain,
    read_document,
    write_json,
)

COMMAND = "natgrad report"
OWN = "this report"

Report = Callable[[str, int], object]
"""Called with what is being done now, and how many units of work have been finished since."""


@dataclass(frozen=True)
class Built:
    """A finished report.

    Attributes:
      page: the HTML file.
      document: what results.json holds.
      resumed: parts of which an earlier run had finished something.
    """

    page: Path
    document: dict[str, Any]
    resumed: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """Checks of this source that failed or raised, methods that diverged against theory."""
        checks = [
            name
            for name, record in self.document["checks"].items()
            if record["verdict"] in ("failed", "error") and record["evidence"] != STALE
        ]
        curves = self.document["parts"]["training"]["methods"].values()
        return checks + [r["label"] for r in curves if r["unexpected_divergence"]]


def selected_checks(settings: ReportSettings) -> tuple[Check, ...]:
    """The checks that a report runs.

    Raises:
      ValueError: an identifier is unknown.
    """
    known = load_checks()
    if settings.checks is None:
        return tuple(check for check in known if check.fast)
    return find_checks(settings.checks)


def total_work(settings: ReportSettings) -> int:
    """How many units of work ``build_report`` reports in all."""
    return (
        work_units(settings.training)
        + len(settings.network.rows)
        + len(settings.sweep.rows)
        + sum(len(part.structures) for part in (settings.limit, *settings.finite))
        + len(selected_checks(settings))
    )


def build_report(
    settings: ReportSettings,
    out: Path,
    *,
    results: Path | None = None,
    fresh: bool = False,
    report: Report = lambda what, done: None,
    say: Say = lambda sentence: None,
) -> Built:
    """Runs what is missing and writes report.html, results.json, figures, and one page a paper.

    Every part keeps its own results.json in a folder below ``out``; what these hold for the same
    settings, data and versions is not run again.

    Args:
      settings: of the parts.
      out: folder of the report.
      results: folder with documents of ``natgrad reproduce`` from other runs and devices, or None.
      fresh: run everything again all the same.
      report: told about the progress.
      say: told what becomes of earlier results that are not taken over, with their part.

    Raises:
      ValueError: data that are not to be had, an unknown check, or a folder that holds something
        else.
      OSError: the folder cannot be written to.
      KeyboardInterrupt: as it came; what was finished is kept.
    """
    read_document(out / FILE_NAME, COMMAND)
    checks = selected_checks(settings)
    resumed: list[str] = []

    def note(part: str, names: tuple[str, ...]) -> None:
        if names:
            resumed.append(part)

    def tell(part: str) -> dict[str, Any]:
        return {
            "report": lambda what, done: report(f"{part}: {what}", done),
            "say": lambda sentence: say(f"{part}: {sentence}"),
        }

    trained = run_dynamics(settings.training, out / "training", fresh=fresh, **tell("training"))
    note("training", trained.resumed)

    def measure(name: str, part: IsotropySettings) -> dict[str, Any]:
        found = run_isotropy(part, out / name, fresh=fresh, **tell(name))
        note(name, found.resumed)
        return _only(found.document, found.selected)

    def predict(name: str, part: PredictionSettings) -> dict[str, Any]:
        found = run_prediction(part, out / name, fresh=fresh, **tell(name))
        note(name, found.resumed)
        return _only(found.document, found.selected)

    network = measure("network", settings.network)
    sweep = measure("isotropy", settings.sweep)
    limit = predict("accuracy", settings.limit)
    finite = [predict(f"accuracy-seed-{part.seed}", part) for part in settings.finite]
    checked = run_checks(checks, out / "checks", fresh, **tell("checks"))
    note("checks", checked.resumed)

    report("drawing and writing", 0)
    training = _only(trained.document, tuple(r["label"] for r in trained.records))
    catalogue = load_checks()
    own = Source(OWN, {**checked.document, "checks": checked.records}).judged(catalogue, HERE)
    sources, notes = read_sources(results, catalogue)
    merged = merge_checks(own, sources, [check.identifier for check in catalogue])
    devices, compared = side_by_side([own, *sources])
    rows = summary_rows(training, network, finite)
    document = plain(
        {
            "command": COMMAND,
            "date": now(),
            "environment": environment(),
            "answer": answer(rows),
            "sentences": sentences(rows, training, merged),
            "summary": rows,
            "parts": {
                "training": training,
                "network": network,
                "isotropy": sweep,
                "accuracy": limit,
                FINITE: finite,
            },
            "checks": {name: without_data(record) for name, record in merged.items()},
            "check_counts": counted(merged.values()),
            "devices": devices,
            "side_by_side": compared,
            "sources": [
                {
                    "name": source.name,
                    "device": source.device,
                    "date": source.date,
                    "versions": source.versions,
                    "checks": len(source.checks),
                }
                for source in (own, *sources)
            ],
            "source_notes": notes,
        }
    )
    figures = draw_figures(document, out / "figures")
    page = out / PAGE_NAME
    write_json(out / FILE_NAME, document)
    replace_file(page, render(document, settings, figures).encode())
    write_papers(merged, catalogue, out)
    return Built(page, document, tuple(resumed))


def _only(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A document with the records of this run only; its file may hold others."""
    kept = {key: value for key, value in document.items() if key != DIGESTS}
    return {**kept, "methods": {name: document["methods"][name] for name in names}}
