"""The board as rows of text: on a terminal and in Markdown."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.leaderboard import texts
from benchmarks.leaderboard.board import FIRST_ORDER
from benchmarks.leaderboard.rows import CLOCKS


def entries(device: dict[str, Any], clock: str = "seconds") -> list[dict[str, Any]]:
    """The board of a device as text, the best first.

    Args:
      device: one of the board's devices.
      clock: that ranks and times are by, one of ``rows.CLOCKS``.

    Returns:
      For each contestant ``contestant``, ``title``, ``family``, ``rank``, ``score``, ``interval``,
      ``speed_up`` and ``times``, a list entry a workload; "–" for what there is not.

    Raises:
      ValueError: there is no such clock.
    """
    if clock not in CLOCKS:
        raise ValueError(f"there is no clock {clock!r}; clocks are {', '.join(CLOCKS)}")
    result = []
    for row in device["rows"]:
        scores = row["scores"].get(clock)
        factor = scores and scores["speed_up"]
        result.append(
            {
                "contestant": row["contestant"] + " (refuted)" * row["refuted"],
                "title": row["title"], "family": row["family"],
                "rank": scores["rank"] if scores else "–",
                "place": scores["place"] if scores else len(device["rows"]) + 1,
                "score": f"{scores['score']:.2f}" if scores else "–",
                "interval": f"{scores['low']:.2f} to {scores['high']:.2f}" if scores else "–",
                "speed_up": f"{factor:.2f}" if factor else "–",
                "times": [_time(cell, clock) for cell in row["cells"]],
            }
        )  # fmt: skip
    return sorted(
        result, key=lambda entry: (entry["place"], -float(entry["score"].replace("–", "0")))
    )


def board_table(device: dict[str, Any], clock: str = "seconds", wide: bool = True) -> Table:
    """The board of a device for a terminal.

    Args:
      device: one of the board's devices.
      clock: that ranks and times are by.
      wide: with intervals and speed-ups, for about 130 columns.
    """
    extra = ("interval", "speed-up") if wide else ()
    table = Table(
        title=texts.terminal(f"{device['name']}, {device['date'][:10]}: {CLOCKS[clock]}"),
        caption="Medians over seeds. Score: area under the performance profile; = is a tie."
        + " Speed-up: over the best first-order contestant of each workload." * wide,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("contestant", no_wrap=True)
    for name in ("score", *extra):
        table.add_column(name, justify="right", no_wrap=True)
    for workload in device["workloads"]:
        head = Text("\n").join(map(texts.terminal, workload["name"].split("-")))
        table.add_column(head, justify="right", overflow="fold")
    for entry in entries(device, clock):
        cells = [entry[name.replace("-", "_")] for name in ("rank", "contestant", "score", *extra)]
        table.add_row(*map(texts.terminal, [*cells, *entry["times"]]))
    return table


def markdown(device: dict[str, Any], most: int = 12) -> str:
    """The board of a device as a Markdown table.

    Args:
      device: one of the board's devices.
      most: rows; the best first-order contestant is shown even if it is not among them.
    """
    ranked = [entry for entry in entries(device) if entry["rank"] != "–"]
    rivals = [entry for entry in ranked if entry["family"] == FIRST_ORDER]
    shown = ranked[:most]
    shown += [entry for entry in rivals[:1] if entry not in shown]
    heads = ["rank", "contestant", "score", *(f"{w['name']}, s" for w in device["workloads"])]
    lines = [
        "| " + " | ".join(map(texts.markdown, heads)) + " |",
        "|---:|---|" + "---:|" * (len(heads) - 2),
    ]
    for entry in shown:
        cells = [entry["rank"], entry["title"], entry["score"], *entry["times"]]
        lines.append("| " + " | ".join(map(texts.markdown, cells)) + " |")
    rest = len(ranked) - len(shown)
    if rest:
        more = "1 more contestant is" if rest == 1 else f"{rest} more contestants are"
        lines += ["", f"{more} on the page of the leaderboard."]
    return "\n".join(lines)


def refutations(device: dict[str, Any]) -> list[str]:
    """A sentence for each refutation of a device's rows that stands: which, who, when and why."""
    return [
        f"{row['contestant']} on {entry['workload']}: refuted on {entry['date'][:10]}"
        f"{entry['submitter'] and ' by ' + entry['submitter']}: {entry['reason']}"
        for row in device["rows"]
        for entry in row["refutations"]
        if entry["withdrawn"] is None
    ]


def _time(cell: dict[str, Any], clock: str) -> str:
    """A median, or why there is none."""
    value = cell[clock]
    if value is None:
        return str(cell["status"])
    if clock == "steps":
        return f"{value:g}"
    return f"{value:.2f}" if 0.01 <= value < 10 else f"{value:.3g}"
