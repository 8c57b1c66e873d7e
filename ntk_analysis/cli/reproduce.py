"""``natgrad reproduce``: measure what the papers claim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntk_analysis.cli.app import app, complain, fail, output, progress_bar, say_resumed, work
from ntk_analysis.cli.report import RESULTS
from ntk_analysis.results import FILE_NAME


@app.command()
def reproduce(
    identifiers: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="checks, as in: KO-Fig1a KO-Thm4.1"),
    ] = None,
    list_them: Annotated[
        bool,
        typer.Option("--list", help="list them: which figure, how long, which data; run nothing"),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="every check")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="those that take seconds")] = False,
    paper: Annotated[
        str | None, typer.Option(help="those of one paper, by what its checks begin with: KO")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="those with a figure on the page of their paper")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of results.json and pages")] = Path(
        "natgrad-reproduce"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="run finished checks again, too")] = False,
    jobs: Annotated[
        int, typer.Option(help="processes that run checks side by side, the longest first")
    ] = 1,
) -> None:
    """Check the claims of the papers: figures, theorems, equations, one identifier each.

    Prints what was expected beside what was measured and writes results.json, after every check:
    after Ctrl-C, or with more checks, the same command goes on where it ended. A check that passed
    or failed is run again only where the source or a version has changed, or with --fresh. At the
    end, all that results.json holds becomes one HTML page a paper, with its figures.

    Exit code: 0, also where checks were skipped for want of data; 1 where a check failed or ended
    in an error; 2 on bad arguments; 130 when interrupted.
    """
    # the checks pull in all of the analysis, which the other commands need not wait for
    from ntk_analysis.report.comparison import HERE, Source, merge_checks, newest_seconds
    from ntk_analysis.report.page import PAPERS_FOLDER
    from ntk_analysis.report.papers import write_papers
    from ntk_analysis.reproduce import find_checks, find_paper, load_checks, paper_of
    from ntk_analysis.reproduce.drawings import DRAWINGS
    from ntk_analysis.reproduce.runner import run_checks
    from ntk_analysis.reproduce.tables import check_table, remarks, result_table

    known = load_checks()
    narrowed = paper is not None or figures
    if bool(identifiers) + everything + fast > 1:
        fail("give identifiers, --fast or --all, but only one of them")
    if identifiers and narrowed:
        fail("--paper and --figures choose checks, and so do identifiers: give one or the other")
    with work(None if list_them else out, "finished checks are kept"):
        if not (identifiers or everything or fast or narrowed or list_them):
            fail(
                "say which checks to run: identifiers (--list shows them), --paper, --figures, "
                "--fast or --all"
            )
        chosen = None if paper is None else find_paper(paper)
        checks = (
            find_checks(identifiers)
            if identifiers
            else tuple(
                check
                for check in known
                if (check.fast or not fast)
                and (chosen is None or paper_of(check.identifier) == chosen)
                and (check.identifier in DRAWINGS or not figures)
            )
        )
        if list_them:
            output.print(check_table(checks, DRAWINGS, newest_seconds((RESULTS, out))))
            return
        if not checks:
            fail("no check is of all that was asked for: leave out one of the options")
        if jobs > 1:
            seconds = newest_seconds((RESULTS, out))
            checks = tuple(sorted(checks, key=lambda check: -seconds.get(check.identifier, 0)))
        with progress_bar() as progress:
            task = progress.add_task("starting", total=len(checks))
            result = run_checks(
                checks,
                out,
                fresh,
                lambda what, done: progress.update(task, description=what, advance=done),
                progress.say,
                jobs,
            )
            progress.update(task, description="writing the pages of the papers")
            own = Source(FILE_NAME, result.document).judged(known, HERE)
            records = merge_checks(own, (), [check.identifier for check in known])
            write_papers(records, known, out)
        say_resumed(result, f"of {len(checks)} checks")
        output.print(result_table(result.records))
        for remark in remarks(result.records):
            output.print(remark)
        counts = {v: result.with_verdict(v) for v in ("passed", "failed", "skipped", "error")}
        summary = ", ".join(f"{len(names)} {verdict}" for verdict, names in counts.items() if names)
        output.print(
            f"{summary}; wrote {FILE_NAME} to {out}, and one page a paper to {out / PAPERS_FOLDER}"
        )
    wrong = [*counts["failed"], *counts["error"]]
    if wrong:
        complain(f"not as expected: {', '.join(wrong)}")
        raise typer.Exit(1)
