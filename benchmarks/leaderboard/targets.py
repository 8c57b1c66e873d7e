"""Targets, frozen in files: what a workload has to reach, and how that was set.

A target belongs to one version of its workload. The file carries a digest of both, so that neither
can be edited without a new version and a new freeze.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.workload import METRICS, Workload
from ntk_analysis.results import content_hash, now, write_json

FOLDER = Path(__file__).parent / "frozen"

SLACK = 1.05
"""A target is this times what the best tuned baseline has at the end of the budget."""

FLOOR = 1e-6
"""A training loss of this share of the initial one is zero in float32: no target is below it."""


def target_of(workload: Workload, folder: Path = FOLDER) -> dict[str, Any]:
    """The target of a workload: known beforehand, or frozen.

    Returns:
      What the file holds: "target", "how", "baseline" and more.

    Raises:
      ValueError: there is none, it is of another version of the workload, or the file or the
        workload was edited without a new version.
    """
    if workload.known_target:
        target, how = workload.known_target
        return {"target": target, "how": how}
    path = folder / f"{workload.name}.json"
    freeze = f"freeze it with `python -m benchmarks.leaderboard freeze {workload.name}`"
    if not path.exists():
        raise ValueError(f"{workload.name} has no target; {freeze}")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated, version = found["digest"], found["workload_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"the target {path.name} is no target file; {freeze}") from None
    if version != workload.version:
        raise ValueError(
            f"the target of {workload.name} is of version {version}, the "
            f"workload has version {workload.version}; {freeze}"
        )
    if stated != content_hash([{k: v for k, v in found.items() if k != "digest"}]):
        raise ValueError(
            f"the target {path.name} was edited and its version was not raised: restore the file, "
            f"or raise the version of the workload and {freeze}"
        )
    if found["workload_digest"] != workload.digest:
        raise ValueError(
            f"the workload {workload.name} was edited and its version was not raised: restore it, "
            f"or raise its version and {freeze}"
        )
    return found


def reason_of(workload: Workload) -> str:
    """How the target of a workload was set; "" where it has none."""
    try:
        return str(target_of(workload)["how"])
    except ValueError:
        return ""


def write_target(
    workload: Workload,
    trials: Sequence[dict[str, Any]],
    folder: Path = FOLDER,
    *,
    tried: Sequence[str] = (),
) -> Path:
    """Freezes a target: SLACK times the baseline's median held-out metric at its budget's end.

    Args:
      workload: its target is replaced only by that of a higher version.
      trials: records of the best tuned baseline on the evaluation seeds, run to the end.
      folder: of the target files.
      tried: names of all baselines that were tuned for it; the one of the trials without it.

    Raises:
      ValueError: there is a target of this version or a later one, or no trial to set it by.
    """
    if workload.known_target:
        raise ValueError(f"the target of {workload.name} is known beforehand: nothing to freeze")
    path = folder / f"{workload.name}.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8")).get("workload_version", 0)
        if earlier >= workload.version:
            raise ValueError(
                f"{workload.name} has a target of version {earlier}; raise the version of the "
                "workload before freezing another"
            )
    finals = [trial["outcome"]["final"] for trial in trials]
    if not finals or None in finals:
        raise ValueError(f"{workload.name}: no baseline came to the end of its budget")
    config, facts = trials[0]["config"], trials[0]["facts"]
    value = SLACK * statistics.median(finals)
    metric = METRICS[workload.metric].title
    how = (
        f"{SLACK:g} times the median {metric} of the best tuned baseline, {facts['title']}, "
        f"over {len(finals)} seeds at the end of the budget"
    )
    if METRICS[workload.metric].function is None:
        zero = FLOOR * statistics.median(trial["outcome"]["curve"]["train"][0] for trial in trials)
        if value < zero:
            how = f"{FLOOR:g} of the initial {metric}, below which float32 ends; {how} is less"
            value = zero
    target = float(f"{value:.4g}")
    reached = [_steps_to(target, trial["outcome"].get("curve")) for trial in trials]
    known = [steps for steps in reached if steps is not None]
    how += f"; its seeds ended from {min(finals):.4g} to {max(finals):.4g}"
    if known:
        how += (
            f", and {len(known)} of {len(reached)} passed the target, after {min(known)} to "
            f"{max(known)} steps"
        )
    document = {
        "workload": workload.name,
        "workload_version": workload.version,
        "workload_digest": workload.digest,
        "rules": RULES,
        "metric": metric,
        "target": target,
        "how": how,
        "baseline": {
            "contestant": config["contestant"],
            "learning_rate": config["learning_rate"],
            "tried": list(tried) or [config["contestant"]],
            "values": finals,
            "steps_to_target": reached,
            "steps": [trial["outcome"]["steps"] for trial in trials],
            "commands": [trial["command"] for trial in trials],
            "code": config["code"],
            "environment": config["environment"],
        },
        "date": now(),
    }
    write_json(path, {**document, "digest": content_hash([document])})
    return path


def _steps_to(target: float, curve: dict[str, list[float]] | None) -> int | None:
    """The step of a curve at which its metric first was at a target; None where it never was."""
    if curve is None:
        return None
    points = zip(curve["steps"], curve["held_out"], strict=True)
    return next((int(step) for step, value in points if value <= target), None)
