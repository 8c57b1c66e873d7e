"""A contestant's row of a board, from the records of its trials."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.leaderboard import refutations, scoring
from benchmarks.leaderboard.versions import Record, version_of

CLOCKS = {
    "seconds": "seconds, with compilation and preparation",
    "training": "seconds of training alone",
    "steps": "steps",
}
"""What a time can be in; the first is what the ranking goes by."""
STATUSES = ("reached", "missed", "diverged", "skipped")

Against = Mapping[tuple[str, ...], list[dict[str, Any]]]
"""What is said against the trials of a row, by ``row_of``."""


def row_of(trial: Record) -> tuple[str, ...]:
    """Which row a trial stands in: one version of a contestant under one version of the rules."""
    config = trial["config"]
    return config["rules"], config["contestant"], version_of(trial)


def by_cell(records: list[Record]) -> defaultdict[tuple[str, str], list[Record]]:
    """Records by contestant and workload, in the order of their seeds and learning rates."""
    cells: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        cells[record["config"]["contestant"], record["config"]["workload"]].append(record)
    for cell in cells.values():
        cell.sort(key=lambda r: (r["config"]["seed"], r["config"]["learning_rate"] or 0.0))
    return cells


def make_row(
    name: str,
    cells: Sequence[tuple[list[Record], list[Record]]],
    earlier: list[list[Record]],
    workloads: list[str],
    against: Against,
) -> dict[str, Any]:
    """A contestant, without its scores."""
    every = [trial for trials, _ in cells for trial in trials]
    origin = _origin(every, against)

    def fact(key: str) -> str:
        return "; ".join(dict.fromkeys(t["facts"][key] for t in every if t["facts"][key]))

    made = [_cell(trials, tuning) for trials, tuning in cells]
    outcomes = [trial["outcome"] for trial in every]
    return {
        "contestant": name, "title": every[0]["facts"]["title"],
        "family": every[0]["facts"]["family"], "structure": every[0]["facts"]["structure"],
        "fisher": fact("fisher"), "damping": fact("damping"), "rate_rule": fact("rate_rule"),
        "ruleset": every[0]["facts"].get("ruleset", ""),
        "ranked": any(trial["outcome"]["status"] != "skipped" for trial in every)
        and not origin["refuted"],
        "reached": sum(cell["status"] == "reached" for cell in made),
        "compile": _middle(outcomes, "compile_seconds"),
        "preparation": _middle(outcomes, "preparation_seconds"),
        "cells": made,
        **origin,
        "earlier": [_earlier(trials, workloads, against) for trials in earlier],
    }  # fmt: skip


def _origin(trials: list[Record], against: Against) -> dict[str, Any]:
    """Where a version of a contestant comes from, who, when, and what is said against it."""
    newest = max(trials, key=lambda trial: trial["date"])
    facts = newest["facts"]
    said = against.get(row_of(newest), [])
    return {
        "refuted": refutations.stands(said), "refutations": said,
        "submitter": facts.get("submitter", ""), "commit": facts.get("commit", ""),
        "sources": newest["config"]["sources"], "harness": newest["config"]["code"],
        "date": newest["date"],
        "jax": newest["config"]["environment"]["jax"],
        "rules": newest["config"]["rules"],
    }  # fmt: skip


def _earlier(trials: list[Record], workloads: list[str], against: Against) -> dict[str, Any]:
    """An earlier version of a contestant, with its medians: no part of any ranking."""
    cells = by_cell(trials)
    name = trials[0]["config"]["contestant"]
    made = [_cell(cells[name, workload], []) for workload in workloads]
    return {
        **_origin(trials, against),
        "cells": [{key: cell[key] for key in ("status", *CLOCKS)} for cell in made],
    }


def clock_times(trial: Record) -> dict[str, float]:
    """A trial's time to the target on every clock; infinite where it was missed."""
    outcome = trial["outcome"]
    if outcome["status"] != "reached":
        return dict.fromkeys(CLOCKS, np.inf)
    training, steps = outcome["seconds_to_target"], outcome["steps_to_target"]
    parts = (outcome["compile_seconds"], outcome["preparation_seconds"])
    seconds = scoring.total_seconds(training, *parts)
    return {"seconds": seconds, "training": float(training), "steps": float(steps)}


def _cell(trials: list[Record], tuning: list[Record]) -> dict[str, Any]:
    """A contestant on a workload."""
    times = [clock_times(trial) for trial in trials]
    outcomes = [trial["outcome"] for trial in trials]
    counts = Counter(outcome["status"] for outcome in outcomes)
    medians = {clock: float(scoring.median([t[clock] for t in times])) for clock in CLOCKS}
    middle = sorted(range(len(trials)), key=lambda i: times[i]["seconds"])
    return {
        "status": _status(counts, medians["seconds"]),
        "counts": {status: counts[status] for status in STATUSES},
        "reason": next((o["reason"] for o in outcomes if o["reason"]), ""),
        **medians,
        "compile": _middle(outcomes, "compile_seconds"),
        "preparation": _middle(outcomes, "preparation_seconds"),
        "learning_rates": _range(outcomes, "learning_rate"),
        "rate_note": next(filter(None, (o.get("rate_note") for o in outcomes)), ""),
        "shown": trials[middle[(len(trials) - 1) // 2]]["key"] if trials else None,
        "trials": [
            {"key": trial["key"], "seed": trial["config"]["seed"], "command": trial["command"],
             "status": outcome["status"], "reason": outcome["reason"], **time,
             "learning_rate": outcome.get("learning_rate"),
             "compile": outcome.get("compile_seconds"),
             "preparation": outcome.get("preparation_seconds")}
            for trial, outcome, time in zip(trials, outcomes, times, strict=True)
        ],
        "tuned_on": [
            {"key": trial["key"], "seed": trial["config"]["seed"],
             "learning_rate": trial["config"]["learning_rate"],
             "status": trial["outcome"]["status"], "best": trial["outcome"].get("best")}
            for trial in tuning
        ],
    }  # fmt: skip


def _status(counts: Counter[str], median: float) -> str:
    """What to say of a contestant on a workload: that of its median, else the commonest failure."""
    if not counts:
        return "not run"
    if np.isfinite(median):
        return "reached"
    failures = [status for status in STATUSES[1:] if counts[status]]
    return max(failures, key=lambda status: counts[status])


def _range(outcomes: list[dict[str, Any]], name: str) -> list[float] | None:
    """The smallest and the largest over the trials that ran."""
    values = [outcome[name] for outcome in outcomes if outcome.get(name) is not None]
    return [float(min(values)), float(max(values))] if values else None


def _middle(outcomes: list[dict[str, Any]], name: str) -> float | None:
    """The median over the trials that ran."""
    values = [outcome[name] for outcome in outcomes if outcome.get(name) is not None]
    return float(np.median(values)) if values else None
