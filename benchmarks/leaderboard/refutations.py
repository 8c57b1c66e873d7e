"""Refutations: records that name a trial of a board, why it does not hold, and what shows it.

They lie in a store as trials do, under the hash of what they say, so that merging, exporting and
checking of records are one for both. A row with a trial that stands refuted has no rank. Whoever
answers a refutation refutes it in turn, which withdraws it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.leaderboard.records import Record
from benchmarks.leaderboard.versions import counts, workload_of

ROLES = REFUTATION, WITHDRAWAL = "refutation", "withdrawal"
"""Of such records."""

_ROW = (
    "rules", "workload", "workload_version", "workload_digest", "target", "contestant", "sources",
)  # fmt: skip
_SHORTEST = 8


def is_trial(record: Record) -> bool:
    """Whether a record is of a trial, and not of what is said of one."""
    return record["config"]["role"] not in ROLES


def named(records: Iterable[Record], key: str) -> Record:
    """The record with a key, or with the only key that begins so.

    Args:
      records: of the folder.
      key: 8 of its digits at least.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = [record for record in records if record["key"].startswith(key)]
    if len(key) < _SHORTEST:
        raise ValueError(f"{key!r} is too short for a key: give at least {_SHORTEST} digits of it")
    if len(found) != 1:
        why = f"{len(found)} records have" if found else "no record here has"
        raise ValueError(f"{why} the key {key!r}; the files of trials and the page have them")
    return found[0]


def check_refutable(record: Record) -> None:
    """Raises ValueError unless a record is a trial that counts, or a refutation."""
    role = record["config"]["role"]
    if role != REFUTATION and not counts(record):
        raise ValueError(
            f"{record['key'][:12]} is of the role {role!r}: name an evaluation trial of the row "
            "to refute, or a refutation to withdraw"
        )


def evidence_of(trial: Record) -> dict[str, Any]:
    """What a refutation holds of a trial that shows it: its key, command, machine and result."""
    config, outcome = trial["config"], trial["outcome"]
    return {
        "key": trial["key"], "command": trial["command"], "seed": config["seed"],
        "sources": config["sources"], "learning_rate": config["learning_rate"],
        "environment": config["environment"],
        **{n: outcome.get(n) for n in ("status", "steps_to_target", "seconds_to_target", "final")},
    }  # fmt: skip


def refutation(refuted: Record, reason: str, evidence: Sequence[Record]) -> dict[str, Any]:
    """The configuration of the record that refutes another one.

    Args:
      refuted: a trial that counts; or a refutation, which is withdrawn by it.
      reason: why, for the reader.
      evidence: trials of the same workload that show it.

    Raises:
      ValueError: the reason is empty, the record is none that can be refuted, or a trial of the
        evidence is of another workload.
    """
    check_refutable(refuted)
    if not reason.strip():
        raise ValueError("a refutation needs a reason; say by --reason what does not hold")
    wanted = (*workload_of(refuted), refuted["config"]["target"])
    for trial in evidence:
        if not counts(trial) or (*workload_of(trial), trial["config"]["target"]) != wanted:
            raise ValueError(
                f"{trial['key'][:12]} shows nothing: evidence is an evaluation trial on "
                f"{wanted[0]}, version {wanted[1]}, to the target {wanted[3]}"
            )
    kind = REFUTATION if is_trial(refuted) else WITHDRAWAL
    return {
        **{name: refuted["config"][name] for name in _ROW},
        "kind": kind,
        "role": kind,
        "refutes": refuted["key"],
        "reason": reason.strip(),
        "evidence": sorted(map(evidence_of, evidence), key=lambda entry: entry["key"]),
    }


def by_trial(records: Iterable[Record]) -> dict[str, list[dict[str, Any]]]:
    """What is said against each trial, by its key; the oldest first.

    Returns:
      For each refutation "key", "workload", "date", "submitter", "commit", "reason", "evidence",
      and "withdrawn": the same of who withdrew it first, or None.
    """
    found = sorted(
        (record for record in records if not is_trial(record)),
        key=lambda record: (record["date"], record["key"]),
    )
    withdrawn: dict[str, dict[str, Any]] = {}
    for record in found:
        if record["config"]["role"] == WITHDRAWAL:
            withdrawn.setdefault(record["config"]["refutes"], _said(record))
    against: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in found:
        if record["config"]["role"] == REFUTATION:
            entry = {**_said(record), "withdrawn": withdrawn.get(record["key"])}
            against[record["config"]["refutes"]].append(entry)
    return dict(against)


def is_withdrawn(record: Record, records: Iterable[Record]) -> bool:
    """Whether one of the records withdraws another, a refutation."""
    return any(
        other["config"]["role"] == WITHDRAWAL and other["config"]["refutes"] == record["key"]
        for other in records
    )


def stands(said: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any of the refutations of a row was not withdrawn."""
    return any(entry["withdrawn"] is None for entry in said)


def _said(record: Record) -> dict[str, Any]:
    config, facts = record["config"], record["facts"]
    return {
        "key": record["key"], "workload": config["workload"], "date": record["date"],
        "submitter": facts["submitter"], "commit": facts["commit"],
        "reason": config["reason"], "evidence": config["evidence"],
    }  # fmt: skip


def difference(trial: Record, outcome: Mapping[str, Any]) -> str:
    """How the outcome of a repeat differs from that of a trial, "" where it does not.

    Steps are compared, which repeat exactly; seconds do not.

    Raises:
      ValueError: the repeat was out of its seconds before it came as far.
    """
    before = trial["outcome"]
    if all(before.get(name) == outcome.get(name) for name in ("status", "steps_to_target")):
        return ""
    if outcome["status"] == "missed" and outcome["steps"] < before.get("steps", 0):
        raise ValueError(
            f"the repeat had used up its seconds after {outcome['steps']} steps, which says "
            "nothing: repeat it while nothing else runs"
        )
    return (
        f"a repeat gave {outcome['status']} after {outcome.get('steps')} steps, "
        f"not {before['status']} after {before.get('steps')}"
    )
