"""The pages that ``natgrad reproduce`` writes of each paper, from the stored records."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ntk_analysis.report.comparison import (
    HERE,
    STALE,
    Source,
    counted,
    merge_checks,
    read_sources,
)
from ntk_analysis.report.page import PAPERS_FOLDER
from ntk_analysis.report.papers import write_papers
from ntk_analysis.report.typeset import typeset
from ntk_analysis.reproduce import PAPERS, load_checks, paper_of
from ntk_analysis.reproduce.registry import KINDS

ROOT = Path(__file__).parents[2]
SITE = {
    "Documentation": "../papers.html",
    "Theory": "../index.html",
    "Benchmarks": "../../benchmarks/index.html",
}
"""Pages of the site that a paper's page links to."""


@cache
def records() -> dict[str, dict[str, Any]]:
    """The newest record of each check in ``results/``."""
    checks = load_checks()
    sources, _ = read_sources(ROOT / "results", checks)
    return merge_checks(Source(HERE, {"checks": {}}), sources, [c.identifier for c in checks])


def table() -> str:
    """A row a paper: its claims, and what the stored records say of them."""
    found = records()
    columns = ("paper", "claims", "passed", "failed", "of another version", "not run")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, paper in PAPERS.items():
        own = [check for check in load_checks() if paper_of(check.identifier) == name]
        stored = [found[c.identifier] for c in own if c.identifier in found]
        counts = counted(stored)
        numbers = (len(own), counts["passed"], counts["failed"], counts[STALE])
        title = f"[{paper.citation}]({PAPERS_FOLDER}/{name}.html)"
        lines.append(f"| {' | '.join(map(str, (title, *numbers, len(own) - len(stored))))} |")
    return "\n".join(lines)


def remarks() -> str:
    """What is to be said of single claims, by its kind."""
    lines: list[str] = []
    for kind, meaning in KINDS.items():
        of_kind = [check for check in load_checks() if check.kind == kind]
        if of_kind:
            lines += ["", f"**{kind.capitalize()}**: the claim {meaning}.", ""]
            lines += [f"- `{c.identifier}`, {_plain(c.title)}: {_plain(c.remark)}" for c in of_kind]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Formulas as the pages of the papers set them; nothing is left that Markdown would take."""
    marks = {ord(mark): f"&#{ord(mark)};" for mark in "*_[]\\`|"}
    return str(typeset(text)).translate(marks)


def write(out: Path) -> Path:
    """Writes the pages with their figures below a folder, which keeps what has not changed.

    Returns:
      The folder of the pages.
    """
    write_papers(records(), load_checks(), out, SITE)
    return out / PAPERS_FOLDER
