"""Which trials of a store count for a board, of all that it has of other times."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks.leaderboard.records import Record
from benchmarks.leaderboard.studies import study_of
from ntk_analysis.results import content_hash


def version_of(record: Record) -> str:
    """Which version of a contestant ran: its sources, the libraries below them, the harness."""
    config = record["config"]
    names = ("sources", "environment", "packages", "code")
    return content_hash([config.get(name) for name in names])


def by_rules(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The trials of the newest rules, and those of earlier ones."""
    newest = max(records, key=lambda record: record["date"], default=None)
    rules = newest and newest["config"]["rules"]
    current = [record for record in records if record["config"]["rules"] == rules]
    return current, [record for record in records if record["config"]["rules"] != rules]


def versions(trials: list[Record]) -> dict[str, list[list[Record]]]:
    """By contestant the trials of each of its versions, the newest first."""
    groups: defaultdict[str, defaultdict[str, list[Record]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for trial in trials:
        groups[trial["config"]["contestant"]][version_of(trial)].append(trial)
    return {
        contestant: [
            found[version]
            for version in sorted(
                found, key=lambda v: (max(t["date"] for t in found[v]), v), reverse=True
            )
        ]
        for contestant, found in groups.items()
    }


def counts(record: Record) -> bool:
    """Whether a trial is one that scores are made of."""
    config = record["config"]
    return config["role"] == "evaluation" and config["target"] is not None


def workload_of(record: Record) -> tuple[str, int, str]:
    """Which workload a trial ran, and which version of it."""
    config = record["config"]
    return config["workload"], config["workload_version"], config["workload_digest"]


def evaluations(records: list[Record]) -> tuple[list[Record], Counter[str]]:
    """The trials that count, with one target a workload and one learning rate a study."""
    trials = [record for record in records if counts(record)]
    left_out = Counter(
        {"without a frozen target": sum(r["config"]["role"] == "evaluation" for r in records)}
    )
    left_out["without a frozen target"] -= len(trials)
    rules: list[tuple[str, Callable[[Record], Any], Callable[[Record], Any]]] = [
        (
            "of other targets or versions of a workload",
            lambda r: r["config"]["workload"],
            lambda r: (workload_of(r), r["config"]["target"]),
        ),
        (
            "at other learning rates",
            lambda r: (
                r["config"]["workload"],
                r["config"]["contestant"],
                version_of(r),
                study_of(r["config"]["seed"]),
            ),
            lambda r: r["config"]["learning_rate"],
        ),
    ]
    for reason, group, variant in rules:
        latest: dict[Any, tuple[tuple[str, str], Any]] = {}
        for trial in trials:
            mark = ((trial["date"], repr(variant(trial))), variant(trial))
            latest[group(trial)] = max(latest.get(group(trial), mark), mark, key=lambda m: m[0])
        kept = [trial for trial in trials if latest[group(trial)][1] == variant(trial)]
        left_out[reason] = len(trials) - len(kept)
        trials = kept
    return trials, left_out
