"""Records of trials to one board for each device, as plain JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import Any

import numpy as np

from benchmarks.leaderboard import refutations, scoring
from benchmarks.leaderboard.across import across_machines
from benchmarks.leaderboard.rows import CLOCKS, by_cell, clock_times, make_row, row_of
from benchmarks.leaderboard.verdict import came_true, verdict
from benchmarks.leaderboard.versions import (
    Record,
    by_rules,
    counts,
    evaluations,
    version_of,
    versions,
    workload_of,
)
from ntk_analysis.names import find
from ntk_analysis.palette import STYLES
from ntk_analysis.results import plain

FIRST_ORDER = "first-order"
OURS = "natural-gradient"
# machine, not software: what makes two boards rather than an older and a newer one
_MACHINE = ("device", "processor", "cores")
MEASURES = (
    "alpha", "condition_number", "deviation", "nonzeros", "stored", "flops", "sgd_flops"
)  # fmt: skip


def build(records: Iterable[Record], workloads: Sequence[str] = ()) -> dict[str, Any]:
    """The board of every device.

    Only evaluation trials with a target count. Of several versions of a workload or of its target,
    and of several learning rates of a study, the newest counts; the number of trials that were left
    out for it stands in the board. Every contestant has a row of its own newest version (of its
    sources, of libraries, of the harness), whatever others did meanwhile, and its earlier versions
    stand in this row, those of earlier rules too. A row with a trial that stands refuted has no
    rank.

    Args:
      records: of trials and refutations, in any order: the board does not depend on it.
      workloads: that contestants are ranked by, those alone who ran any of them; all where none is
        named. A row that is refuted on another one has no rank here either.

    Returns:
      What JSON can hold; times that are infinite are null.

    Raises:
      ValueError: there are no records, or no trial that counts on a workload; the message offers
        the nearest.
    """
    every = sorted(records, key=lambda record: str(record["key"]))
    ordered = list(filter(refutations.is_trial, every))
    against = refutations.by_trial(every)
    if not ordered:
        raise ValueError(
            "there are no trials to score; `python -m benchmarks.leaderboard run` makes them"
        )
    current, past = by_rules(ordered)
    known = sorted({r["config"]["workload"] for r in current if counts(r)})
    chosen = {find("workload of this board", name, known) for name in workloads}
    here, before = _by_machine(current), _by_machine(past)
    machines = {*here, *before}
    if chosen:
        machines = {m for m in here if any(map(partial(_is_on, chosen), filter(counts, here[m])))}
    devices = [_device(here[m], before[m], against, chosen) for m in sorted(machines)]
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


def _is_on(chosen: Set[str], record: Record) -> bool:
    return not chosen or record["config"]["workload"] in chosen


def _device(
    records: list[Record],
    past: list[Record],
    against: dict[str, list[dict[str, Any]]],
    chosen: Set[str],
) -> dict[str, Any]:
    """The board of one machine, of its records and those of earlier rules.

    ``against`` is what is said against trials, by key; ``chosen`` the workloads, empty for all.
    """
    counted, left_out = evaluations(records)
    older, _ = evaluations(past)
    said: defaultdict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for trial in (*counted, *older):
        said[row_of(trial)] += against.get(trial["key"], [])
    kept = list(filter(partial(_is_on, chosen), counted))
    left_out["on workloads that were not chosen"] = len(counted) - len(kept)
    of_rules = versions(kept)
    before = versions(list(filter(partial(_is_on, chosen), older)))
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
    cells, tuning = by_cell(trials), by_cell(tuned)
    rows = [
        make_row(
            name,
            [(cells[name, w], tuning[name, w]) for w in names],
            [*of_rules[name][1:], *before.get(name, [])],
            names,
            said,
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
    clock = next(iter(CLOCKS))
    # far behind the best, scores are 0: the one with more targets is before the other
    rows.sort(
        key=lambda row: (
            -row["scores"][clock]["score"] if row["ranked"] else 1,
            -row["reached"],
            row["contestant"],
        )
    )


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
    cells = by_cell(records)
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
