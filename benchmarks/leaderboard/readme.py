"""The short table of the leaderboard in a README, between two markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.leaderboard.tables import markdown

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
      ValueError: the markers are not there, not once each, or not in this order.
      OSError: the file cannot be read or written.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path.name} must have one line {BEGIN} and after it one line {END}, between which "
            "the table goes; put them where it should stand"
        )
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = f"{head}{BEGIN}\n{section(board, command)}\n{END}{tail}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


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
            f"{device['verdict']['answer']}\n\n{markdown(device)}\n\n"
            "Seconds to the target, compilation included, medians over seeds; = is a tie. "
            f"Measured by `{command}`; {device['name']}, "
            f"JAX {device['environment']['jax']}, {device['date'][:10]}."
        )
    return "\n\n".join(parts) or f"No results yet; `{command}` makes them."
