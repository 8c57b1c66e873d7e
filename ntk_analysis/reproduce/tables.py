"""Checks and their results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ntk_analysis.reproduce.registry import KINDS, Check

_SETTING = "setting: of the paper, in part, or ours where the paper states none"
_COLOURS = {"passed": "green", "failed": "red", "error": "red", "skipped": "yellow"}


def check_table(checks: Iterable[Check]) -> Table:
    """What there is to run."""
    table = _table(
        "Checks",
        f"{_SETTING}. fast: seconds. remark: the claim "
        + "; ".join(f"{meaning} ({kind})" for kind, meaning in KINDS.items()),
    )
    table.add_column("check", no_wrap=True)
    table.add_column("what it checks")
    table.add_column("setting", no_wrap=True)
    table.add_column("fast", no_wrap=True)
    table.add_column("remark")
    for check in checks:
        table.add_row(
            check.identifier,
            Text(check.title),
            check.origin,
            "fast" if check.fast else "",
            check.kind,
        )
    return table


def result_table(records: dict[str, dict[str, Any]]) -> Table:
    """Every measurement beside what was expected.

    Args:
      records: by identifier, as results.json has them.
    """
    table = _table("Reproduction", _SETTING)
    table.add_column("what", ratio=1)
    table.add_column("expected")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for identifier, record in records.items():
        heading = Text(f"{identifier}: {record['title']}", style="bold")
        heading.append(
            f" (setting: {record['origin']}, {record['seconds']:.1f} s)", style="not bold dim"
        )
        table.add_row(heading)
        for m in record["measurements"]:
            verdict = "passed" if m["passed"] else "failed"
            table.add_row(
                Text(f"  {m['what']}"),
                Text(m["expected"]),
                number(m["measured"]),
                Text(verdict, style=_COLOURS[verdict]),
            )
        if record["reason"]:
            verdict = record["verdict"]
            table.add_row(
                Text(f"  {record['reason']}"), "", "", Text(verdict, style=_COLOURS[verdict])
            )
        table.add_section()
    return table


def remarks(records: dict[str, dict[str, Any]]) -> list[str]:
    """Remarks on claims, then notes, a sentence each with the check that it belongs to."""
    found = [f"{r['kind']}, {name}: {r['remark']}" for name, r in records.items() if r["remark"]]
    notes = [f"note, {name}: {note}" for name, r in records.items() for note in r["notes"]]
    return found + notes


def number(value: float | None) -> str:
    """A measured value; None is how JSON has one that is not finite."""
    if value is None:
        return "not finite"
    return f"{value:.4g}"


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
