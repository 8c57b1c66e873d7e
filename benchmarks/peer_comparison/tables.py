"""The comparison as a document, and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peer_comparison.measure import Agreement, Pace

FASTER = 5.0
"""Our K-FAC step is to be at least as many times as fast as a peer's."""


def agreement_record(peer: str, entry: Agreement) -> dict[str, Any]:
    """One row of the comparison of quantities, as JSON has it."""
    return {
        "peer": peer,
        "example": entry.example,
        "quantity": entry.comparison.quantity,
        "theirs": entry.comparison.theirs,
        "convention": entry.comparison.convention,
        "difference": entry.difference,
        "tolerance": entry.tolerance,
        "agrees": entry.holds,
    }


def pace_record(peer: str, entry: Pace) -> dict[str, Any]:
    """One row of the comparison of times, as JSON has it."""
    return {
        "peer": peer,
        "example": entry.example,
        "ours": entry.ours,
        "theirs": entry.theirs,
        "ours_busy": entry.ours_busy,
        "theirs_busy": entry.theirs_busy,
        "ratio": entry.ratio,
        "busy_ratio": entry.busy_ratio,
        "target": FASTER,
    }


def markdown(document: dict[str, Any]) -> str:
    """The document of a run as tables: times, quantities by their largest difference, what is not.

    Args:
      document: with the lists "paces", "agreements" and "skipped".
    """
    parts = []
    if document["paces"]:
        head = (
            "network, N=128 where not said", "peer", "its step, ms", "ours, ms", "times as fast",
            "by processor time", "target",
        )  # fmt: skip
        rows = [
            (
                entry["example"], entry["peer"], _milliseconds(entry["theirs"]),
                _milliseconds(entry["ours"]), f"{entry['ratio']:.1f}",
                f"{entry['busy_ratio']:.1f}", f"{entry['target']:g}",
            )
            for entry in document["paces"]
        ]  # fmt: skip
        parts.append(_table(head, rows, numbers=5))
    if document["agreements"]:
        head = ("peer", "quantity", "theirs", "networks", "difference", "at most", "convention")
        parts.append(_table(head, _by_quantity(document["agreements"]), numbers=0))
    parts += [f"{entry['peer']}: {entry['reason']}" for entry in document["skipped"]]
    return "\n\n".join(parts)


def _by_quantity(agreements: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for entry in agreements:
        key = entry["peer"], entry["quantity"], entry["tolerance"]
        groups.setdefault(key, []).append(entry)
    return [
        (
            peer, f"`{quantity}`", f"`{group[0]['theirs']}`",
            "; ".join(entry["example"] for entry in group),
            f"{max(entry['difference'] for entry in group):.1e}"
            + ("" if all(entry["agrees"] for entry in group) else " (apart)"),
            f"{tolerance:g}", group[0]["convention"] or "the same",
        )
        for (peer, quantity, tolerance), group in groups.items()
    ]  # fmt: skip


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A Markdown table whose last columns, as many as ``numbers``, are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
