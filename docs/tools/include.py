"""Sections of README.md and other files of the project on pages of the site, written once.

A line ``<!-- include: README.md#any-flax-model -->`` of a page stands for that section, without its
heading; without ``#...`` for the whole file below its title, and with ``alone`` at the end for the
section without those below it.
"""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_LINE = re.compile(r"^<!-- include: ([\w./-]+?)(?:#([\w-]+))?( alone)? -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


class Section(NamedTuple):
    """A heading of a file and what stands below it."""

    level: int
    slug: str
    title: str
    body: str


@cache
def sections(file: str) -> list[Section]:
    """The sections of a Markdown file of the project, each up to the next heading of any level."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found: list[Section] = []
    # headings inside of code are comments
    for number, part in enumerate(_FENCE.split(text)):
        if number % 2:
            found[-1] = found[-1]._replace(body=found[-1].body + part)
            continue
        head, *rest = re.split(r"^(#+) (.*)$", part, flags=re.MULTILINE)
        if found:
            found[-1] = found[-1]._replace(body=found[-1].body + head)
        for marks, title, body in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            found.append(Section(len(marks), slug(title), title, body))
    return found


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and Markdown make it."""
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


def taken(file: str, start: str | None, alone: bool) -> list[Section]:
    """What a line of inclusion stands for, its own heading first.

    Raises:
      ValueError: the file has no such section.
    """
    found = sections(file)
    if start is None:
        return found
    places = [i for i, section in enumerate(found) if section.slug == start]
    if not places:
        raise ValueError(f"{file} has no section #{start}, which a page of docs/ includes")
    first = places[0]
    end = first + 1
    while not alone and end < len(found) and found[end].level > found[first].level:
        end += 1
    return found[first:end]


def expand(page: str, text: str) -> str:
    """A page with what its lines of inclusion stand for, and links that lead to pages of the site.

    Args:
      page: where it is below docs/, such as "guides/models.md".
      text: its Markdown.

    Raises:
      ValueError: a line names a section that is not there.
    """

    def section_text(line: re.Match[str]) -> str:
        file, start, alone = line.groups()
        first, *below = taken(file, start, bool(alone))
        parts = [first.body]
        for section in below:
            marks = "#" * (section.level - first.level + 1)
            parts.append(f"{marks} {section.title}{section.body}")
        return _LINK.sub(lambda link: _link(page, file, link), "".join(parts)).strip("\n")

    return _LINE.sub(section_text, text)


def _link(page: str, file: str, link: re.Match[str]) -> str:
    path, anchor = link[1], link[2]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path)) if path else file
    if target.startswith("docs/"):
        place, anchor = target.removeprefix("docs/"), None
    else:
        place, anchor = home(target, anchor)
    relative = posixpath.relpath(place, posixpath.dirname(page) or ".") if place != page else ""
    return f"]({relative}{'#' + anchor if anchor else ''})"


def home(file: str, anchor: str | None) -> tuple[str, str | None]:
    """The page that shows a section of a file, and the anchor there, None for its top.

    Raises:
      ValueError: no page does.
    """
    whole = None
    for source in sorted(DOCS.rglob("*.md")):
        page = source.relative_to(DOCS).as_posix()
        for included, start, alone in _LINE.findall(source.read_text(encoding="utf-8")):
            if included != file:
                continue
            shown = taken(file, start or None, bool(alone))
            if anchor is None and not start:
                return page, None
            for number, section in enumerate(shown):
                if section.slug == anchor:
                    return page, anchor if number else None
            whole = whole or page
    if anchor is None and whole is not None:
        return whole, None
    raise ValueError(f"no page of docs/ includes {file}{'#' + anchor if anchor else ''}")
