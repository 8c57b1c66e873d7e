"""The leaderboard as one HTML page that needs nothing else, beside the trials' files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from benchmarks.leaderboard import board as boards
from benchmarks.leaderboard.figures import curve, looks, rounded
from ntk_analysis.files import replace_file

FILE_NAME = "leaderboard.html"
_FOLDER = Path(__file__).parent
_COMMAND = "{key}"


def write(
    records: Iterable[dict[str, Any]],
    out: Path,
    *,
    workloads: Sequence[str] = (),
    trials: str = "trials",
    command: str = "",
) -> Path:
    """Writes the page.

    Args:
      records: of trials, as ``board.build`` takes them.
      out: the file, which ends in .html, or a folder, where it becomes ``leaderboard.html``.
      workloads: see ``board.build``.
      trials: the folder of the trials' files as seen from the page, for its links.
      command: that makes the leaderboard anew; `python -m benchmarks.leaderboard run` by default.

    Returns:
      The file.

    Raises:
      ValueError: as ``board.build``.
      OSError: the file cannot be written.
    """
    records = list(records)
    text = render(boards.build(records, workloads), records, trials=trials, command=command)
    path = Path(out)
    if path.suffix != ".html":
        path /= FILE_NAME
    replace_file(path, text.encode())
    return path


def render(
    board: dict[str, Any],
    records: Iterable[dict[str, Any]],
    *,
    trials: str = "trials",
    command: str = "",
) -> str:
    """The page as text.

    Args:
      board: as ``board.build`` gives it.
      records: that it was built of, for the curves.
      trials: see ``write``.
      command: see ``write``.
    """
    rows = [row for device in board["devices"] for row in device["rows"]]
    shown = {cell["shown"] for row in rows for cell in row["cells"]}
    curves = {record["key"]: curve(record) for record in records if record["key"] in shown}
    styles = looks(rows)
    data = _compact(board, curves) | {
        "looks": {
            name: {"index": index, "dash": look.dash, "marker": look.marker, "open": look.open}
            for index, (name, look) in enumerate(styles.items())
        },
        "trials": trials.rstrip("/"),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("template.html").render(
        board=board,
        first=board["devices"][0],
        looks=list(styles.values()),
        data=script_json(data),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        scripts=[
            Markup((_FOLDER / name).read_text(encoding="utf-8"))
            for name in ("page_charts.js", "page.js", "page_figures.js")
        ],
        command=command or "python -m benchmarks.leaderboard run",
    )


def script_json(value: Any) -> Markup:
    """JSON that no text in it can end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _compact(board: dict[str, Any], curves: dict[str, Any]) -> dict[str, Any]:
    """The board with curves, in few bytes: lists for trials, each command's pattern only once."""
    patterns: dict[str, int] = {}

    def pattern(trial: dict[str, Any]) -> int:
        text = trial["command"].replace(trial["key"], _COMMAND)
        return patterns.setdefault(text, len(patterns))

    def cell(entry: dict[str, Any]) -> dict[str, Any]:
        return {
            **entry,
            "trials": [
                [t["key"], t["seed"], t["status"], t["seconds"], t["training"], t["steps"],
                 t["compile"], t["preparation"], pattern(t), t["learning_rate"]]
                for t in entry["trials"]
            ],
            "tuned_on": [
                [t["key"], t["seed"], t["learning_rate"], t["status"], t["best"]]
                for t in entry["tuned_on"]
            ],
            "curve": curves.get(entry["shown"]),
        }  # fmt: skip

    def measure(entry: dict[str, Any] | None) -> dict[str, Any] | None:
        return entry and {**entry, "command": pattern(entry)}

    devices = [
        {
            **device,
            "rows": [{**row, "cells": list(map(cell, row["cells"]))} for row in device["rows"]],
            "structures": [
                {**row, "measures": list(map(measure, row["measures"]))}
                for row in device["structures"]
            ],
        }
        for device in board["devices"]
    ]
    return {**rounded({**board, "devices": devices}), "commands": list(patterns)}
