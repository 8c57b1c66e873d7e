"""Records of trials to one board for each device, as plain JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.leaderboard import refutations, scoring
from benchmarks.leaderboard.across import across_machines
from benchmarks.leaderboard.verdict import came_true, verdict
from benchmarks.leaderboard.versions import (
    Record,
    by_rules,
    evaluations,
    version_of,
    versions,
    workload_of,
)
from ntk_analysis.palette import STYLES
from ntk_analysis.results import plain

CLOCKS = {
    "seconds": "seconds, with compilation and preparation",
    "training": "seconds of training alone",
    "steps": "steps",
}
"""What a time can be in; the first is what the ranking goes by."""
STATUSES = ("reached", "missed", "diverged", "skipped")
FIRST_ORDER = "first-order"
OURS = "natural-gradient"
_Against = dict[str, list[dict[str, Any]]]
# machine, not software: what makes two boards rather than an older and a newer one
_MACHINE = ("device", "processor", "cores")
MEASURES = (
    "alpha", "condition_number", "deviation", "nonzeros", "stored", "flops", "sgd_flops"
)  # fmt: skip


def build(records: Iterable[Record]) -> dict[str, Any]:
    """The board of every device.

    Only evaluation trials with a target count. Of several versions of a workload or of its target,
    and of several learning rates of a study, the newest counts; the number of trials that were left
    out for it stands in the board. Every contestant has a row of its own newest version (of its
    sources, of libraries, of the harness), whatever others did meanwhile, and its earlier versions
    stand in this row, those of earlier rules too. A row with a trial that stands refuted has no
    rank.

    Args:
      records: of trials and refutations, in any order: the board does not depend on it.

    Returns:
      What JSON can hold; times that are infinite are null.

    Raises:
      ValueError: there are no records.
    """
    every = sorted(records, key=lambda record: str(record["key"]))
    ordered = list(filter(refutations.is_trial, every))
    against = refutations.by_trial(every)
    if not ordered:
        raise ValueError(
            "there are no trials to score; `python -m benchmarks.leaderboard run` makes them"
        )
    current, past = by_rules(ordered)
    here, before = _by_machine(current), _by_machine(past)
    devices = [
        _device(here[machine], before[machine], against) for machine in sorted({*here, *before})
    ]
    return {
        "schema": 2,
        "rules": current[0]["config"]["rules"],
        "date": max(record["date"] for record in ordered),
        "records": len(every),
        "scoring": {
            "r_max": scoring.R_MAX, "replicates": scoring.REPLICATES, "level": scoring.LEVEL,
            "tie_level": scoring.TIE_LEVEL,
            "clock_noise": scoring.CLOCK_NOISE,
        },
        "clocks": CLOCKS,
        "devices": devices,
        "across": across_machines(devices),
    }  # fmt: skip


def _by_machine(records: list[Record]) -> defaultdict[tuple[str, ...], list[Record]]:
    machines: defaultdict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        machines[tuple(record["config"]["environment"].get(n, "") for n in _MACHINE)].append(record)
    return machines


def device_name(environment: dict[str, str]) -> str:
    """A machine in words, such as "CPU, AMD EPYC, 2 cores"."""
    platform, _, kind = environment["device"].partition(": ")
    parts = [kind if kind and kind != platform else platform.upper()]
    parts += [environment[name] for name in ("processor",) if environment.get(name)]
    if environment.get("cores"):
        parts.append(f"{environment['cores']} cores")
    return ", ".join(parts)


def _device(records: list[Record], past: list[Record], against: _Against) -> dict[str, Any]:
    """The board of one machine, of its records and those of earlier rules.

    ``against`` is what is said against trials, by key.
    """
    counted, left_out = evaluations(records)
    of_rules, before = versions(counted), versions(evaluations(past)[0])
    trials = [trial for newest, *_ in of_rules.values() for trial in newest]
    rowless = [name for name in before if name not in of_rules]
    left_out["of earlier rules, of contestants without a row"] = sum(
        len(version) for name in rowless for version in before[name]
    )
    names = sorted({trial["config"]["workload"] for trial in trials})
    workloads = [_workload([t for t in trials if t["config"]["workload"] == n]) for n in names]
    current = {(w["name"], w["version"], w["digest"]) for w in workloads}
    newest_of = {name: version_of(newest[0]) for name, (newest, *_) in of_rules.items()}
    tuned, measured = (
        [
            r for r in records
            if r["config"]["role"] == role and workload_of(r) in current
            and newest_of.get(r["config"]["contestant"], version_of(r)) == version_of(r)
        ]
        for role in ("tuning", "structure")
    )  # fmt: skip
    cells, tuning = _by_cell(trials), _by_cell(tuned)
    rows = [
        _row(
            name,
            [(cells[name, w], tuning[name, w]) for w in names],
            [*of_rules[name][1:], *before.get(name, [])],
            names,
            against,
        )
        for name in sorted(of_rules)
    ]
    _score(rows, workloads, cells, names)
    for workload in workloads:
        workload["came_true"] = came_true(workload, list(CLOCKS))
    newest = max(trials or records or past, key=lambda record: record["date"])
    timed = [record["outcome"] for record in (*trials, *tuned)]
    board = {
        "name": device_name(newest["config"]["environment"]),
        "environment": newest["config"]["environment"],
        "harnesses": sorted({row["harness"] for row in rows}),
        "natgrad": newest["facts"].get("natgrad", ""),
        "date": newest["date"],
        "trials": len(trials),
        "tuning_trials": len(tuned),
        "left_out": dict(sorted(left_out.items())),
        "wall_seconds": sum(outcome.get("wall_seconds") or 0.0 for outcome in timed),
        "harness_seconds": sum(outcome.get("harness_seconds") or 0.0 for outcome in timed),
        "workloads": workloads,
        "rows": rows,
        "structures": _structures(measured, names),
    }
    result: dict[str, Any] = plain({**board, "verdict": verdict(board)})
    return result


def _by_cell(records: list[Record]) -> defaultdict[tuple[str, str], list[Record]]:
    """Records by contestant and workload, in the order of their seeds and learning rates."""
    cells: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        cells[record["config"]["contestant"], record["config"]["workload"]].append(record)
    for cell in cells.values():
        cell.sort(key=lambda r: (r["config"]["seed"], r["config"]["learning_rate"] or 0.0))
    return cells


def _workload(trials: list[Record]) -> dict[str, Any]:
    """A workload as its newest trial describes it."""
    record = max(trials, key=lambda trial: trial["date"])
    config, facts = record["config"], record["facts"]
    return {
        "name": config["workload"], "title": facts["workload_title"],
        "version": config["workload_version"], "digest": config["workload_digest"],
        "metric": facts["metric"], "target": config["target"],
        "question": facts.get("question", ""), "why_target": facts.get("why_target", ""),
        "expectation": facts.get("expectation", ""), "expected": facts.get("expected", ""),
    }  # fmt: skip


def _row(
    name: str,
    cells: Sequence[tuple[list[Record], list[Record]]],
    earlier: list[list[Record]],
    workloads: list[str],
    against: _Against,
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


def _origin(trials: list[Record], against: _Against) -> dict[str, Any]:
    """Where a version of a contestant comes from, who, when, and what is said against it."""
    newest = max(trials, key=lambda trial: trial["date"])
    facts = newest["facts"]
    said = [entry for trial in trials for entry in against.get(trial["key"], [])]
    return {
        "refuted": refutations.stands(said), "refutations": said,
        "submitter": facts.get("submitter", ""), "commit": facts.get("commit", ""),
        "sources": newest["config"]["sources"], "harness": newest["config"]["code"],
        "date": newest["date"],
        "jax": newest["config"]["environment"]["jax"],
        "rules": newest["config"]["rules"],
    }  # fmt: skip


def _earlier(trials: list[Record], workloads: list[str], against: _Against) -> dict[str, Any]:
    """An earlier version of a contestant, with its medians: no part of any ranking."""
    cells = _by_cell(trials)
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


def _score(
    rows: list[dict[str, Any]],
    workloads: list[dict[str, Any]],
    cells: dict[tuple[str, str], list[Record]],
    names: list[str],
) -> None:
    """Puts scores into the rows, best first, and winners into the workloads."""
    ranked = [row for row in rows if row["ranked"]]
    for row in rows:
        row["scores"] = {}
    for workload in workloads:
        workload |= {"winners": {}, "first_order": {}, "faster": {}, "reached_by": 0, "of": 0}
        for clock in CLOCKS:
            workload["winners"][clock], workload["faster"][clock] = [], []
            workload["first_order"][clock] = {"contestants": [], "time": np.inf}
    for clock in CLOCKS:
        times = [[[clock_times(t)[clock] for t in cells[r["contestant"], n]] for n in names]
                 for r in ranked]  # fmt: skip
        if not times:
            continue
        medians = np.array([[cell[clock] for cell in row["cells"]] for row in ranked])
        places = _places(medians, times, clock)
        rivals = [index for index, row in enumerate(ranked) if row["family"] == FIRST_ORDER]
        baseline = medians[rivals].min(axis=0, initial=np.inf)
        for index, row in enumerate(ranked):
            factor, shared = scoring.speed_up(medians[index], baseline)
            row["scores"][clock] = {**places[index], "speed_up": factor, "shared": shared}
        for ruleset in {row["ruleset"] for row in ranked}:
            members = [i for i, row in enumerate(ranked) if row["ruleset"] == ruleset]
            among = _places(medians[members], [times[i] for i in members], clock)
            for index, place in zip(members, among, strict=True):
                ranked[index]["scores"][clock]["own"] = place
        for column, workload in enumerate(workloads):
            _winners(workload, clock, ranked, medians[:, column], baseline[column])
    rows.sort(key=lambda row: (-row["scores"][next(iter(CLOCKS))]["score"] if row["ranked"] else 1,
                               row["contestant"]))  # fmt: skip


def _places(
    medians: np.ndarray, times: list[list[list[float]]], clock: str
) -> list[dict[str, Any]]:
    """Score, its interval, place and ratios of each of some contestants, among these."""
    ratios = scoring.ratios(medians)
    scores = scoring.score(ratios)
    resampled = scoring.bootstrap(times, noise=0.0 if clock == "steps" else scoring.CLOCK_NOISE)
    low, high = scoring.interval(resampled)
    ranks = scoring.rank(scores, resampled)
    return [
        {"score": float(scores[i]), "low": float(low[i]), "high": float(high[i]),
         "place": ranks[i].place, "rank": str(ranks[i]), "ratios": ratios[i].tolist()}
        for i in range(len(times))
    ]  # fmt: skip


def _winners(
    workload: dict[str, Any],
    clock: str,
    rows: list[dict[str, Any]],
    times: np.ndarray,
    baseline: float,
) -> None:
    """Who is first on a workload, the best first-order contestant, our structures before it."""
    finite = np.isfinite(times)
    best = times.min()
    workload["of"], workload["reached_by"] = len(rows), int(finite.sum())
    workload["winners"][clock] = [
        row["contestant"] for row, time in zip(rows, times, strict=True)
        if np.isfinite(best) and time == best
    ]  # fmt: skip
    rivals = [
        row["contestant"] for row, time in zip(rows, times, strict=True)
        if row["family"] == FIRST_ORDER and np.isfinite(time) and time == baseline
    ]  # fmt: skip
    workload["first_order"][clock] = {"contestants": rivals, "time": float(baseline)}
    ours = {
        STYLES[row["structure"]].label if row["structure"] else row["title"]: time
        for row, time in sorted(zip(rows, times, strict=True), key=lambda pair: -pair[1])
        if row["family"] == OURS and time < baseline
    }
    workload["faster"][clock] = sorted(ours, key=ours.__getitem__)


def _structures(records: list[Record], names: list[str]) -> list[dict[str, Any]]:
    """Isotropy and cost of every structure, a list entry a workload."""
    cells = _by_cell(records)
    result = []
    for name in sorted({contestant for contestant, _ in cells}):
        newest = [max(cells[name, w], key=lambda r: r["date"], default=None) for w in names]
        facts = next(record["facts"] for record in newest if record)
        measures = [
            record and {"key": record["key"], "command": record["command"],
                        "status": record["outcome"]["status"],
                        "reason": record["outcome"].get("reason", ""),
                        **{measure: record["outcome"].get(measure) for measure in MEASURES}}
            for record in newest
        ]  # fmt: skip
        result.append(
            {"contestant": name, "title": facts["title"], "structure": facts["structure"],
             "damping": facts["damping"], "measures": measures}
        )  # fmt: skip
    return result
