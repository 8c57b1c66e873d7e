"""``natgrad report``: every part of the project on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntk_analysis.cli.app import app, complain, fail, output, progress_bar, work
from ntk_analysis.cli.options import DatasetOption, SeedOption

RESULTS = Path("results")
"""Where records of other runs are looked for."""


@app.command()
def report(
    dataset: DatasetOption = None,
    seed: SeedOption = 0,
    results: Annotated[
        Path | None,
        typer.Option(
            help="folder with results.json files of natgrad reproduce from other runs and devices "
            "[default: results, where it exists]"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="folder of report.html, results.json and figures")
    ] = Path("natgrad-report"),
    fresh: Annotated[bool, typer.Option("--fresh", help="run finished parts again, too")] = False,
) -> None:
    """Write the report: which Fisher approximation keeps the fast convergence, and at what cost.

    One HTML page that needs no network: the verdict, isotropy against width, spectra, predicted
    against trained curves, test accuracy, cost, the checks of the literature that take seconds, and
    results of other devices. Every figure stands with the command that repeats it. Beside it, one
    page a paper: what it claims, the figures in its layout, what we measured. Takes a few
    minutes on two cores. What is finished is kept: after Ctrl-C the same command goes on where it
    ended.

    Exit code: 0; 1 where a check failed or a loss diverged against theory, the page is written all
    the same; 2 on bad arguments; 130 when interrupted.
    """
    # the report pulls in all of the analysis, which the other commands need not wait for
    from ntk_analysis.report import ReportSettings, build_report
    from ntk_analysis.report.build import total_work
    from ntk_analysis.report.page import PAPERS_FOLDER

    if results is not None and not results.is_dir():
        fail(f"--results must be a folder, and {results} is none")
    if results is None and RESULTS.is_dir():
        results = RESULTS
    with work(out, "what was finished is kept"):
        settings = ReportSettings.standard(dataset, seed)
        with progress_bar() as progress:
            task = progress.add_task("starting", total=total_work(settings))
            built = build_report(
                settings,
                out,
                results=results,
                fresh=fresh,
                report=lambda what, done: progress.update(task, description=what, advance=done),
                say=progress.say,
            )
        if built.resumed:
            output.print(f"finished already: {', '.join(built.resumed)} (--fresh reruns)")
        output.print(built.document["answer"])
        for sentence in built.document["sentences"]:
            output.print(f"- {sentence}")
        papers = built.page.parent / PAPERS_FOLDER
        output.print(f"wrote {built.page}, and one page a paper to {papers}")
    if built.failures:
        complain(f"not as expected: {', '.join(built.failures)}")
        raise typer.Exit(1)
