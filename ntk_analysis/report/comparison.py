"""Results of checks from several runs: one table, and devices side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntk_analysis.reproduce import Check
from ntk_analysis.reproduce.registry import KINDS
from ntk_analysis.reproduce.runner import COMMAND, is_fresh
from ntk_analysis.results import CHECKS, read_json, sound_records

HERE, STORED, STALE = "ran here", "stored and fresh", "of another version"
"""Where the result of a check comes from: ``Source.judged``."""
EVIDENCE = (HERE, STORED, STALE)
NOT_RUN = "not run"
VERDICTS = ("passed", "failed", "error", "skipped", NOT_RUN)
_CPU = "cpu"
_FINISHED = ("passed", "failed")
_KEYS = {
    "title", "claim", "setting", "origin", "verdict", "reason", "seconds", "measurements", "notes",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One document of ``natgrad reproduce``.

    Attributes:
      name: of the file, or "this report".
      document: what it holds.
    """

    name: str
    document: dict[str, Any]

    @property
    def platform(self) -> str:
        """What JAX calls it: "cpu" or "gpu"."""
        return self._device.partition(": ")[0]

    @property
    def device(self) -> str:
        """The device for readers: "CPU", or the platform and its model."""
        platform, _, kind = self._device.partition(": ")
        same = kind.lower() in ("", platform.lower())
        return platform.upper() if same else f"{platform.upper()} ({kind})"

    @property
    def date(self) -> str:
        """When it was written; "" where the document does not say."""
        return str(self.document.get("date", ""))

    @property
    def versions(self) -> dict[str, str]:
        """Of the software."""
        environment: dict[str, str] = self.document.get("environment", {})
        return {k: v for k, v in environment.items() if k != "device"}

    @property
    def checks(self) -> dict[str, dict[str, Any]]:
        """Records by identifier."""
        records: dict[str, dict[str, Any]] = self.document["checks"]
        return records

    def judged(self, checks: Iterable[Check], evidence: str = STORED) -> Source:
        """The same with "evidence" in each record: as given, or STALE where the source has changed.

        Title, claim, origin and what is said of the claim become those of the present catalogue.

        Args:
          checks: the catalogue.
          evidence: HERE or STORED.
        """
        known = {check.identifier: check for check in checks}
        versions = self.document.get("environment", {})
        records = {}
        for name, record in self.checks.items():
            check = known.get(name)
            state = evidence if is_fresh(record, check, versions) else STALE
            words = check.words if check else {"kind": "", "remark": "", "differs": "", **record}
            records[name] = {**record, **words, "evidence": state}
        return Source(self.name, {**self.document, "checks": records})

    @property
    def _device(self) -> str:
        return str(self.document.get("environment", {}).get("device", "unknown"))


def read_sources(folder: Path | None, checks: Iterable[Check]) -> tuple[list[Source], list[str]]:
    """The documents of ``natgrad reproduce`` in a folder and below it.

    Only records that have the digest they were written with are taken; older documents have none.
    What lies in ``asv/`` is not looked at.

    Args:
      folder: None, or one that does not exist, holds none.
      checks: the catalogue.

    Returns:
      The sources by name, judged, and a sentence for each file of which something was left out.
    """
    sources: list[Source] = []
    notes: list[str] = []
    if folder is None or not folder.is_dir():
        return sources, notes
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("asv/"):  # results of the suites, which asv reads
            continue
        try:
            document = read_json(path)
            command = document["command"]
        except (ValueError, KeyError):
            notes.append(f"{name} is not a document of this project and was left out")
            continue
        if command != COMMAND:
            continue
        records, unsound = sound_records(document, CHECKS)
        if unsound:
            notes.append(f"{name}: {unsound}")
        if not all(record.keys() >= _KEYS for record in records.values()):
            notes.append(f"{name} has records that are not whole and was left out")
        elif records:
            sources.append(Source(name, {**document, "checks": records}).judged(checks))
    return sources, notes


def newest_seconds(folders: Iterable[Path]) -> dict[str, float]:
    """How long checks took by their newest finished records in some folders and below them."""
    found: dict[str, tuple[str, float]] = {}
    for folder in folders:
        for source in read_sources(folder, ())[0]:
            for name, record in source.checks.items():
                dated = str(record.get("date", "")), float(record["seconds"])
                if record["verdict"] in _FINISHED:
                    found[name] = max(found.get(name, dated), dated)
    return {name: seconds for name, (_, seconds) in found.items()}


def merge_checks(
    own: Source, others: Iterable[Source], order: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """One record a check: that of this report, or else the best that was found in files.

    Args:
      own: the checks that this report ran.
      others: finished ones are preferred, then fresh ones, those of a CPU, and the latest.
      order: identifiers; unknown ones follow after them.

    Returns:
      Records with "source", "device" and "date" of where they come from.
    """
    found: dict[str, tuple[tuple[bool, bool, bool, str], dict[str, Any]]] = {}
    for source in others:
        for name, record in source.checks.items():
            finished, fresh = record["verdict"] in _FINISHED, record["evidence"] != STALE
            rank = (finished, fresh, source.platform == _CPU, source.date)
            if name not in found or rank > found[name][0]:
                found[name] = rank, _with_source(record, source)
    merged = {name: record for name, (_, record) in found.items()}
    for name, record in own.checks.items():
        if record["verdict"] in _FINISHED or name not in merged:
            merged[name] = _with_source(record, own)
    place = {name: index for index, name in enumerate(order)}
    names = sorted(merged, key=lambda name: (place.get(name, len(place)), name))
    return {name: merged[name] for name in names}


def counted(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many records are of each verdict and of each evidence; a stale verdict does not count."""
    entries = list(records)
    counts = {state: sum(r["evidence"] == state for r in entries) for state in EVIDENCE}
    fresh = [r["verdict"] for r in entries if r["evidence"] != STALE]
    return counts | {verdict: fresh.count(verdict) for verdict in VERDICTS}


def remarks(records: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Checks whose claims have a remark, by its kind."""
    found = {kind: [n for n, r in records.items() if r["kind"] == kind] for kind in KINDS}
    return {kind: names for kind, names in found.items() if names}


def without_data(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the numbers of its figure."""
    return {key: value for key, value in record.items() if key != "data"}


def side_by_side(sources: Iterable[Source]) -> tuple[list[str], list[dict[str, Any]]]:
    """The checks that ran on another device than a CPU, beside the other devices.

    Args:
      sources: of all runs, this report's among them; a later record of a device replaces an
        earlier one.

    Returns:
      The devices, CPUs first, and one row a check: "identifier", "title", "runs" (its verdict and
      seconds, or None, for each device) and "rows", one a measurement: "what", "expected" and
      "measured", a number for each device.
    """
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    elsewhere: dict[str, str] = {}
    for source in sorted(sources, key=lambda s: (s.platform != _CPU, s.device, s.date)):
        for name, record in source.checks.items():
            if record["verdict"] not in _FINISHED:
                continue
            devices.setdefault(source.device, {})[name] = record
            if source.platform != _CPU:
                elsewhere[name] = record["title"]
    rows = [
        {
            "identifier": name,
            "title": title,
            "runs": [_run(records.get(name)) for records in devices.values()],
            "rows": _measurements([records.get(name) for records in devices.values()]),
        }
        for name, title in elsewhere.items()
    ]
    return list(devices), rows if elsewhere else []


def _run(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the table of devices shows of a record."""
    return record and {key: record[key] for key in ("verdict", "seconds", "evidence")}


def _measurements(records: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The measurements of all records, matched by their words."""
    expected: dict[str, str] = {}
    values: list[Mapping[str, float | None]] = []
    for record in records:
        measurements = [] if record is None else record["measurements"]
        values.append({m["what"]: m["measured"] for m in measurements})
        for m in measurements:
            expected.setdefault(m["what"], m["expected"])
    return [
        {
            "what": what,
            "expected": bound,
            "measured": [found.get(what, "") for found in values],
        }
        for what, bound in expected.items()
    ]


def _with_source(record: dict[str, Any], source: Source) -> dict[str, Any]:
    return {**record, "source": source.name, "device": source.device, "from": source.date}
