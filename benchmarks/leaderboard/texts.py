"""Text of records, which may come from other machines, as terminals and Markdown may show it."""

from __future__ import annotations

import html
import re

from rich.text import Text

_MARKUP = re.compile(r"[\\`*_~#\[\]|]")


def printable(text: object) -> str:
    """Text on one line without characters that steer a terminal or turn its reading order."""
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in str(text)
    )


def terminal(text: object) -> Text:
    """Text for a table on a terminal, which would take a plain string for Rich's markup."""
    return Text(printable(text))


def markdown(text: object) -> str:
    """Text that stays text in Markdown: no tag, link, image, emphasis, or end of a table's cell."""
    # an entity means its sign nowhere but in text, so no HTML comment can end a section either
    return _MARKUP.sub(r"\\\g<0>", html.escape(printable(text), quote=False))
