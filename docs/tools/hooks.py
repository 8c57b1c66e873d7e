"""What happens when MkDocs builds the site: see ``mkdocs.yml``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import mathjax
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs.tools import api, gallery, history, include, papers  # noqa: E402 - found from the root only

BUILT = ROOT / ".docs"
MATHJAX = Path(mathjax.__file__).parent / "static" / "mathjax"
MARKS = {
    "<!-- api -->": api.table,
    "<!-- gallery -->": gallery.table,
    "<!-- history -->": lambda: history.told(bool(history.build(BUILT / "asv"))),
    "<!-- papers -->": papers.table,
    "<!-- remarks -->": papers.remarks,
}
"""Lines of pages that are written when the site is built."""
log = logging.getLogger("mkdocs.natgrad")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of reference, gallery, papers and asv, and MathJax with its fonts."""
    for place in api.PAGES:
        files.append(File.generated(config, place, content=api.write(place)))
    folder = BUILT / "gallery"
    for script in gallery.build(folder):
        log.info("example %s", script.stem)
    for path in sorted([*folder.glob("*.md"), *folder.glob("*.png")]):
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    written = papers.write(BUILT)
    for path in sorted(p for p in written.rglob("*") if p.suffix in (".html", ".svg")):
        place = f"theory/papers/{path.relative_to(written).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for path in history.build(BUILT / "asv"):
        place = f"benchmarks/history/{path.relative_to(BUILT / 'asv').as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    es5 = MATHJAX / "es5"
    fonts = (es5 / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff")
    for path in (MATHJAX / "LICENSE", es5 / "tex-chtml.js", *fonts):
        place = path.relative_to(es5 if es5 in path.parents else MATHJAX).as_posix()
        files.append(File.generated(config, f"assets/mathjax/{place}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Puts in what a page includes, and what the records of the checks say."""
    text = include.expand(page.file.src_uri, markdown)
    for mark, written in MARKS.items():
        if mark in text:
            text = text.replace(mark, written())
    return text


def on_post_build(config: Any) -> None:
    """Raises where a public name is on no page, as one without a docstring would be."""
    for place in api.PAGES:
        html = Path(config.site_dir, place).with_suffix(".html").read_text(encoding="utf-8")
        for name in api.names_of(place):
            if f'id="{name}"' not in html:
                raise PluginError(f"{place} lacks {name}: it has no docstring")
