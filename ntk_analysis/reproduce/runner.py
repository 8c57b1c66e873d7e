"""Runs checks and keeps what they found, one after the other."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from natgrad_flax.arguments.scalars import check_integer
from ntk_analysis.reproduce.processes import Report, in_turn
from ntk_analysis.reproduce.registry import Check, Measurement, MissingDataError
from ntk_analysis.results import CHECKS, FILE_NAME, Say, environment, now, open_results, plain
from ntk_analysis.sources import import_digest

COMMAND = "natgrad reproduce"
FINISHED = ("passed", "failed")
"""Verdicts that a later run keeps; what was skipped or ended in an error is tried again."""


@dataclass(frozen=True)
class Reproduction:
    """What checks found.

    Attributes:
      document: what results.json holds.
      selected: identifiers of the checks that this run was asked for, in order.
      resumed: those of them that an earlier run had finished.
    """

    document: dict[str, Any]
    selected: tuple[str, ...]
    resumed: tuple[str, ...]

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """One record a check, by identifier."""
        return {name: self.document["checks"][name] for name in self.selected}

    def with_verdict(self, verdict: str) -> list[str]:
        """Identifiers of the checks that were "passed", "failed", "skipped" or an "error"."""
        return [name for name, record in self.records.items() if record["verdict"] == verdict]


def run_checks(
    checks: Sequence[Check],
    out: Path,
    fresh: bool = False,
    report: Report = lambda what, done: None,
    say: Say = lambda sentence: None,
    jobs: int = 1,
) -> Reproduction:
    """Runs checks and writes results.json before the first and after each.

    A check is not run again where results.json has its result from the same versions of the
    software and the same source. Records of other checks stay in the file as long as the versions
    do; a file of other versions is kept under another name.

    Args:
      checks: what to run.
      out: folder of results.json.
      fresh: run finished checks again all the same.
      report: told about the progress.
      say: told what becomes of earlier results that are not taken over.
      jobs: processes that run checks side by side; with 1 they run in this one.

    Returns:
      The results. A check that raises does not stop the others.

    Raises:
      ValueError: results.json is there and holds something else, or ``jobs`` is below 1.
      OSError: the folder cannot be written to.
      KeyboardInterrupt: as it came; finished checks are kept.
    """
    check_integer("jobs", jobs, 1)
    versions = environment()
    # the source of a check counts, which a release need not change
    release = versions.pop("natgrad")
    results = open_results(out / FILE_NAME, COMMAND, CHECKS, versions, say)
    records = results.records
    resumed = tuple(
        check.identifier
        for check in checks
        if not fresh
        and is_fresh(records.get(check.identifier, {}), check, versions)
        and records[check.identifier]["verdict"] in FINISHED
    )
    document = {"command": COMMAND, "date": now(), "environment": versions}
    # before any work, so that a folder which cannot be written to is found now
    results.write(document)
    report("resuming" if resumed else "starting", len(resumed))
    waiting = [check for check in checks if check.identifier not in resumed]
    made = {
        check.identifier: {
            "device": versions["device"],
            "natgrad": release,
            "fingerprint": fingerprint(check, versions),
        }
        for check in waiting
    }
    for check, record in in_turn(waiting, jobs, _run, report):
        records[check.identifier] = record | made[check.identifier]
        results.write(document)
        report(check.identifier, 1)
    return Reproduction(document, tuple(check.identifier for check in checks), resumed)


def fingerprint(check: Check, versions: dict[str, str]) -> str:
    """SHA-256 of all that decides what a check finds, as far as it is worth a rerun.

    Args:
      check: the check; its module counts, and all modules that this one stands on.
      versions: of the software that it stands on, and the device.
    """
    module = inspect.getmodule(check.run)
    source = import_digest(Path(inspect.getfile(module or check.run)))
    content = [check.identifier, versions, source]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_fresh(record: dict[str, Any], check: Check | None, versions: dict[str, str]) -> bool:
    """Whether a record was made by the present source of a check.

    Args:
      record: of the check; one without a fingerprint is not fresh.
      check: as the catalogue has it now; None where it no longer does.
      versions: those the record was made with, which need not be the present ones.
    """
    return check is not None and record.get("fingerprint") == fingerprint(check, versions)


def _run(check: Check, report: Report) -> dict[str, Any]:
    began = time.perf_counter()
    measurements: tuple[Measurement, ...] = ()
    data: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    reason = ""
    try:
        outcome = check.run(lambda what: report(f"{check.identifier}: {what}", 0))
    except MissingDataError as error:
        verdict, reason = "skipped", str(error)
    except Exception as error:
        verdict, reason = "error", f"{type(error).__name__}: {error}"
    else:
        verdict = "passed" if outcome.passed else "failed"
        measurements, data, notes = outcome.measurements, outcome.data, outcome.notes
    return plain(
        {
            **check.words,
            "setting": check.setting,
            "verdict": verdict,
            "reason": reason,
            "seconds": time.perf_counter() - began,
            "measurements": [
                {
                    "what": m.what,
                    "measured": float(m.measured),
                    "expected": m.expected,
                    "passed": bool(m.passed),
                }
                for m in measurements
            ],
            "data": _without_arrays(data),
            "notes": list(notes),
            "date": now(),
        }
    )


def _without_arrays(value: Any) -> Any:
    """Arrays and their scalars, of NumPy or JAX, as numbers and lists of them."""
    if isinstance(value, dict):
        return {str(key): _without_arrays(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    return value
