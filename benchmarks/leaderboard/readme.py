"""The short table of the leaderboard in a README, between two markers."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from benchmarks.leaderboard import tables
from benchmarks.leaderboard.reading import read_file
from benchmarks.leaderboard.texts import markdown
from ntk_analysis.files import replace_file

BEGIN = "<!-- leaderboard: begin -->"
END = "<!-- leaderboard: end -->"
COMMAND = "make leaderboard"


def update(path: Path, board: dict[str, Any], *, command: str = COMMAND) -> bool:
    """Puts the board between the markers of a README; the rest of the file stays as it is.

    Args:
      path: of the README.
      board: as ``board.build`` gives it.
      command: that makes the leaderboard, for the reader.

    Returns:
      Whether the file changed.

    Raises:
      ValueError: as ``around``.
      OSError: the file cannot be read or written; it stays as it was.
    """
    head, old, tail = around(path)
    # as the file has them, whose other lines stay as they are
    newline = "\r\n" if "\r\n" in head + tail else "\n"
    new = f"\n{section(board, command)}\n".replace("\n", newline)
    if new != old:
        # of a link, what it leads to
        place = Path(os.path.realpath(path))
        mode = stat.S_IMODE(place.stat().st_mode)
        replace_file(place, f"{head}{new}{tail}".encode())
        place.chmod(mode)
    return new != old


def around(path: Path) -> tuple[str, str, str]:
    """A README in three parts: to the end of the first marker, between the two, and the rest.

    Raises:
      ValueError: no text file; or the markers are not there, not once each, or not in this order.
      OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8; name a Markdown file") from None
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path.name} must have one line {BEGIN} and after it one line {END}, between which "
            "the table goes; put them where it should stand"
        )
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:begin], text[begin:end], text[end:]


def section(board: dict[str, Any], command: str = COMMAND) -> str:
    """The Markdown of all devices that have a ranking.

    Args:
      board: as ``board.build`` gives it.
      command: that makes the leaderboard.
    """
    parts = []
    for device in board["devices"]:
        if not device["rows"]:
            continue
        parts.append(
            f"{markdown(device['verdict']['answer'])}\n\n{tables.markdown(device)}\n\n"
            "Seconds to the target, compilation included, medians over seeds; = is a tie. "
            f"Measured by `{command}`; {markdown(device['name'])}, "
            f"JAX {markdown(device['environment']['jax'])}, {markdown(device['date'][:10])}."
        )
    return "\n\n".join(parts) or f"No results yet; `{command}` makes them."
