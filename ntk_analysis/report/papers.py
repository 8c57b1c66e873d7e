"""Writes the page of every paper: teaching text, then each check with figure and verdict."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from markupsafe import Markup

from ntk_analysis import frame, palette, reproduce
from ntk_analysis.files import replace_file, save_figure
from ntk_analysis.report.comparison import NOT_RUN, counted, remarks
from ntk_analysis.report.page import PAGE_NAME, PAPERS_FOLDER, templates
from ntk_analysis.reproduce import PAPERS, Check, Paper, paper_of
from ntk_analysis.reproduce.drawings import DRAWINGS, Drawing
from ntk_analysis.reproduce.registry import KINDS
from ntk_analysis.reproduce.runner import FINISHED
from ntk_analysis.results import content_hash

_TEMPLATE = "paper.html"


class Drawn(NamedTuple):
    """The figure of a check.

    Attributes:
      svg: its file, or None where it could not be drawn.
      problem: why not; "" otherwise.
    """

    svg: Path | None
    problem: str


def write_papers(
    records: Mapping[str, dict[str, Any]],
    checks: Iterable[Check],
    out: Path,
    further: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes one page a paper, and its figures as PNG and SVG below ``papers/figures``.

    A figure is drawn again only where its data or its drawing have changed. One that cannot be
    drawn is left out, and the page says why.

    Args:
      records: of ``merge_checks``; those of no paper here are left out.
      checks: the catalogue; what no record is of is shown as not run.
      out: the folder of the results; where it has a report.html, the pages link to it.
      further: addresses of other pages that they link to, as seen from theirs, by title.

    Returns:
      The pages, in ``out/papers``.

    Raises:
      OSError: the folder cannot be written to.
    """
    catalogue = {check.identifier: check for check in checks}
    folder = out / PAPERS_FOLDER
    drawn = {
        name: draw(name, DRAWINGS[name], record.get("data", {}), folder / "figures")
        for name, record in records.items()
        if name in DRAWINGS and record["verdict"] in FINISHED
    }
    links = {"The report": f"../{PAGE_NAME}"} if (out / PAGE_NAME).is_file() else {}
    links.update(further or {})
    pages = []
    for name, paper in PAPERS.items():
        own = [i for i in dict.fromkeys([*catalogue, *records]) if paper_of(i) == name]
        entries = [_entry(i, records.get(i), catalogue.get(i)) for i in own]
        path = folder / f"{name}.html"
        replace_file(path, _render(name, paper, entries, drawn, links).encode())
        pages.append(path)
    return pages


def draw(identifier: str, drawing: Drawing, data: dict[str, Any], folder: Path) -> Drawn:
    """The figure of one check, as PNG and SVG.

    Args:
      identifier: of the check; the files are called after it, with "-" for "/".
      drawing: makes the figure.
      data: of the record.
      folder: of the files.

    Raises:
      OSError: the folder cannot be written to.
    """
    if not data:
        return Drawn(None, "its record holds no data of the figure")
    name = identifier.replace("/", "-")
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    print_ = content_hash([data, *map(inspect.getsource, drawing_sources(drawing))])
    if png.is_file() and _is_whole(svg, print_):
        return Drawn(svg, "")
    with frame.theme():
        try:
            figure = drawing(data)
            # what does not fit together is found by the layout, which comes with the drawing
            figure.draw_without_rendering()
        except Exception as error:
            return Drawn(None, f"{type(error).__name__}: {error}")
        save_figure(figure, png, svg, description=print_)
    return Drawn(svg, "")


def drawing_sources(drawing: Drawing) -> tuple[ModuleType, ...]:
    """The modules that decide how a figure looks."""
    # a partial belongs to functools, the function in it to a module of drawings
    module = inspect.getmodule(getattr(drawing, "func", drawing))
    assert module is not None
    return module, frame, palette


def _is_whole(svg: Path, print_: str) -> bool:
    """Whether a figure of this print is there to its end."""
    if not svg.is_file():
        return False
    content = svg.read_bytes()
    return print_.encode() in content and content.rstrip().endswith(b"</svg>")


def _entry(identifier: str, record: dict[str, Any] | None, check: Check | None) -> dict[str, Any]:
    """What the page shows of a check: its record, or what the catalogue says of it."""
    if record is not None:
        return {**record, "identifier": identifier}
    assert check is not None
    return {
        **check.words,
        "identifier": identifier,
        "setting": check.setting,
        "verdict": NOT_RUN,
        "evidence": "",
        "reason": "",
        "measurements": [],
        "notes": [],
        "fast": check.fast,
    }


def _render(
    name: str,
    paper: Paper,
    entries: Sequence[dict[str, Any]],
    drawn: Mapping[str, Drawn],
    links: Mapping[str, str],
) -> str:
    text = (files(reproduce) / name / "words.html").read_text(encoding="utf-8")
    return (
        templates()
        .get_template(_TEMPLATE)
        .render(
            here=name,
            paper=paper,
            papers=PAPERS,
            text=Markup(text),
            checks=entries,
            drawn=drawn,
            counts=counted(entries),
            origins=Counter(entry["origin"] for entry in entries),
            remarks=remarks({entry["identifier"]: entry for entry in entries}),
            kinds=KINDS,
            links=links,
        )
    )
