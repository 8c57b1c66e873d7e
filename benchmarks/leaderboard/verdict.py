"""What a board says, in sentences."""

from __future__ import annotations

import math
from typing import Any

CLOCK = "seconds"
BARE = "training"
CLOCK_WORDS = {
    "seconds": "by seconds with compilation",
    "training": "by seconds of training alone",
    "steps": "by steps",
}


def verdict(board: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one device.

    Args:
      board: of the device, with its scores; times may be infinite or None.

    Returns:
      ``answer``, one sentence, and ``sentences``, what else is worth to know.
    """
    rows = [row for row in board["rows"] if row["ranked"]]
    if not any(row["reached"] for row in rows):
        return {"answer": "No contestant has reached a target yet.", "sentences": _left(board)}
    total = len(board["workloads"])
    leader, *others = rows
    tied = [row for row in others if row["scores"][CLOCK]["place"] == 1]
    best = f"{leader['scores'][CLOCK]['score']:.2f}"
    if tied:
        least = f"{tied[-1]['scores'][CLOCK]['score']:.2f}"
        answer = (
            f"{_names([leader, *tied])} share the first rank, where the trials do not tell them "
            f"apart, with scores {f'from {least} to' if least != best else 'of'} {best} of 1"
        )
    else:
        answer = (
            f"{leader['title']} is the fastest to the targets: its score is {best} of 1, and it "
            f"reaches {_of(leader, total)}"
        )
    answer += _against_first_order(rows, total)
    sentences = [*_rulesets(rows), *_clocks(rows), *_workloads(board), *_expected(board)]
    return {"answer": answer + ".", "sentences": [*sentences, *_left(board)]}


def _leaders(rows: list[dict[str, Any]], clock: str, *, own: bool = False) -> list[dict[str, Any]]:
    """Who has the first rank, among all or among those of the same ruleset."""
    places = [row["scores"][clock] for row in rows]
    return [
        row for row, place in zip(rows, places, strict=True)
        if (place["own"] if own else place)["place"] == 1
    ]  # fmt: skip


def _rulesets(rows: list[dict[str, Any]]) -> list[str]:
    """Who is first among the tuned, and among those that tune themselves; of two or more each."""
    sentences = []
    for ruleset in ("tuned", "self-tuning"):
        members = [row for row in rows if row["ruleset"] == ruleset]
        leaders = _leaders(members, CLOCK, own=True)
        if len(members) < 2 or not any(row["reached"] for row in members):
            continue
        has = "have" if len(leaders) > 1 else "has"
        sentences.append(
            f"Among the {len(members)} {ruleset} contestants {_names(leaders)} {has} the first "
            "rank."
        )
    return sentences if len(sentences) > 1 else []


def _clocks(rows: list[dict[str, Any]]) -> list[str]:
    """Says it where nobody has the first rank on every clock."""
    leaders = {clock: _leaders(rows, clock) for clock in CLOCK_WORDS}
    names = {clock: {row["contestant"] for row in found} for clock, found in leaders.items()}
    if set.intersection(*names.values()):
        return []
    parts = [f"{CLOCK_WORDS[clock]} {_names(found)}" for clock, found in leaders.items()]
    return [f"Who has the first rank depends on the clock: {'; '.join(parts)}."]


def came_true(workload: dict[str, Any], clocks: list[str]) -> str:
    """Whether what was expected of curvature on a workload is so, in words; "" if nothing was.

    Curvature wins by a clock where a contestant of natural gradient is at the target before every
    first-order one.

    Args:
      workload: of a board, with who is faster.
      clocks: by which it can win.
    """
    if not workload["expected"] or not workload["winners"][CLOCK]:
        return ""
    wins = [clock for clock in clocks if workload["faster"][clock]]
    if len(wins) == len(clocks):
        found = "it wins by every clock"
    elif wins:
        found = f"it wins {' and '.join(CLOCK_WORDS[clock] for clock in wins)} only"
    else:
        found = "it does not win by any clock"
    wanted = "to win" if workload["expected"] == "curvature" else "not to win"
    return f"curvature was expected {wanted}, and {found}"


def _expected(board: dict[str, Any]) -> list[str]:
    return [
        f"{workload['name']}: {workload['came_true']}."
        for workload in board["workloads"] if workload["came_true"]
    ]  # fmt: skip


def _of(row: dict[str, Any], total: int) -> str:
    """How many targets a contestant reaches, in words."""
    if row["reached"] == total > 1:
        return "both targets" if total == 2 else f"all {total} targets"
    return f"{row['reached']} of {total} {'target' if total == 1 else 'targets'}"


def _names(rows: list[dict[str, Any]], most: int = 3) -> str:
    """Titles in a row; the first few of a long one."""
    titles = [row["title"] for row in rows]
    if len(titles) > most + 1:
        return f"{_listed(titles[:most])} and {len(titles) - most} others"
    return " and ".join(filter(None, [_listed(titles[:-1]), titles[-1]]))


def _listed(titles: list[str]) -> str:
    """Semicolons where a title has a comma."""
    return ("; " if any("," in title for title in titles) else ", ").join(titles)


def _against_first_order(rows: list[dict[str, Any]], total: int) -> str:
    """How the best of ours and the best first-order contestant stand to each other."""
    leader = rows[0]
    first_order = [row for row in rows if row["family"] == "first-order"]
    ours = [row for row in rows if row["family"] == "natural-gradient"]
    if not first_order or not ours:
        return ""
    rival = first_order[0]
    if leader["family"] == "first-order":
        best = ours[0]
        return (
            f"; of natural gradient the best is {best['title']} with "
            f"{best['scores'][CLOCK]['score']:.2f}, and {_of(best, total)}"
        )
    return (
        f"; the best first-order contestant is {rival['title']} with "
        f"{rival['scores'][CLOCK]['score']:.2f}, and {_of(rival, total)}"
    )


def _workloads(board: dict[str, Any]) -> list[str]:
    """Workload by workload: our structures against the best first-order contestant."""
    titles = {row["contestant"]: row["title"] for row in board["rows"]}
    sentences = []
    for workload in board["workloads"]:
        rival = workload["first_order"][CLOCK]
        faster = workload["faster"][CLOCK]
        if not workload["winners"][CLOCK]:
            sentences.append(f"{workload['name']}: no contestant reaches the target.")
        elif rival["time"] is None or not math.isfinite(rival["time"]):
            sentences.append(
                f"{workload['name']}: no first-order contestant reaches the target; "
                f"{_count(faster)} of ours {'do' if len(faster) > 1 else 'does'}."
            )
        else:
            name = " and ".join(titles[contestant] for contestant in rival["contestants"])
            listed = f" ({_listed(faster)})" if faster else ""
            verb = "are" if len(faster) > 1 else "is"
            sentences.append(
                f"{workload['name']}: {_count(faster)} of ours{listed} {verb} faster than the "
                f"best first-order contestant, {name}{_bare(workload)}."
            )
    return sentences


def _bare(workload: dict[str, Any]) -> str:
    """What compilation costs our structures: those that would be faster without any."""
    faster = workload["faster"][BARE]
    if set(faster) <= set(workload["faster"][CLOCK]):
        return ""
    return f"; without compilation and preparation {len(faster)} ({_listed(faster)})"


def _count(structures: list[str]) -> str:
    """A number of structures."""
    if not structures:
        return "no structure"
    return f"{len(structures)} structure{'s' if len(structures) > 1 else ''}"


def _left(board: dict[str, Any]) -> list[str]:
    """What was left out, skipped or not run."""
    sentences = []
    refuted = [row["title"] for row in board["rows"] if row["refuted"]]
    if refuted:
        sentences.append(f"Refuted, so without a rank: {'; '.join(refuted)}.")
    skipped = [row["title"] for row in board["rows"] if not (row["ranked"] or row["refuted"])]
    if skipped:
        sentences.append(f"Skipped everywhere, so without a rank: {'; '.join(skipped)}.")
    left = [f"{count} {reason}" for reason, count in board["left_out"].items() if count]
    if left:
        sentences.append(f"Left out of this board: trials {', '.join(left)}.")
    if len(board["harnesses"]) > 1:
        sentences.append(
            f"The rows were timed by {len(board['harnesses'])} versions of the harness, under the "
            "same rules."
        )
    cells = [cell for row in board["rows"] for cell in row["cells"]]
    missing = sum(cell["status"] == "not run" for cell in cells)
    if missing:
        sentences.append(
            f"Not run yet, and counted as missed: {missing} of {len(cells)} pairs of a contestant "
            "and a workload."
        )
    return sentences
