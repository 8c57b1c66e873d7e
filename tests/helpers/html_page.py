"""HTML as the tests of the pages look at it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects addresses, identifiers and alternatives."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.addresses, self.ids, self.images = [], [], [], []
        self.html = html
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.addresses += [found[n] for n in ("src", "srcset", "href") if n in found]
        self.ids += [found["id"]] if "id" in found else []
        self.images += [found.get("alt", "")] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def section(self, identifier: str) -> str:
        """The part of one check."""
        start = self.html.index(f'<section class="check" id="{identifier}">')
        return self.html[start : self.html.index("</section>", start)]
