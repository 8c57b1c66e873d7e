"""Checks and their results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ntk_analysis.reproduce.drawings import figure_number
from ntk_analysis.reproduce.registry import KINDS, Check

_SETTING = "setting: of the paper, in part, or ours where the paper states none"
_COLOURS = {"passed": "green", "failed": "red", "error": "red", "skipped": "yellow"}


def check_table(
    checks: Iterable[Check], drawn: Collection[str], seconds: Mapping[str, float]
) -> Table:
    """What there is to run.

    Args:
      checks: one row each.
      drawn: identifiers of those whose page has a figure.
      seconds: that a check took, by identifier, where it is known.
    """
    table = _table(
        "Checks",
        f"figure: its number in the paper; drawn: a figure of ours. {_SETTING}. data: what has to "
        "be on this machine. seconds: of the newest record. remark: the claim "
        + "; ".join(f"{meaning} ({kind})" for kind, meaning in KINDS.items()),
    )
    table.add_column("check", no_wrap=True)
    table.add_column("what it checks")
    table.add_column("figure", no_wrap=True)
    for name in ("setting", "data"):
        table.add_column(name)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("fast", no_wrap=True)
    table.add_column("remark")
    for check in checks:
        name = check.identifier
        table.add_row(
            name,
            Text(check.title),
            figure_number(name) or ("drawn" if name in drawn else ""),
            check.origin,
            ", ".join(required_data(check)),
            f"{seconds[name]:.1f}" if name in seconds else "",
            "fast" if check.fast else "",
            check.kind,
        )
    return table


def required_data(check: Check) -> tuple[str, ...]:
    """Data sets that have to be on this machine, as the setting of a check names them."""
    return tuple(name for name in ("MNIST", "CIFAR-10") if name in check.setting)


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
