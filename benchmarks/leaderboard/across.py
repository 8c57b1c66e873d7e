"""One ranking of all machines: by steps, which do not depend on how fast a machine is."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.leaderboard import scoring


def across_machines(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of several machines in one ranking by steps; [] of a single machine.

    Args:
      devices: of a board, with their rows and workloads.

    Returns:
      The best first: "contestant", "title", "machine", "score", "low", "high", "rank", and
      "steps", the median for each of "workloads" (null where it was missed or not run). Workloads
      of one name but of different versions or targets count as different ones.
    """
    rows = [(device, row) for device in devices for row in device["rows"] if row["ranked"]]
    if len({id(device) for device, _ in rows}) < 2:
        return []
    asked = sorted({_name(workload) for device in devices for workload in device["workloads"]})
    times = [[_steps(device, row, workload) for workload in asked] for device, row in rows]
    medians = np.array([[float(scoring.median(seeds)) for seeds in row] for row in times])
    scores = scoring.score(scoring.ratios(medians))
    resampled = scoring.bootstrap(times)
    low, high = scoring.interval(resampled)
    ranks = scoring.rank(scores, resampled)
    found = [
        {
            "contestant": row["contestant"], "title": row["title"], "machine": device["name"],
            "score": float(scores[index]), "low": float(low[index]), "high": float(high[index]),
            "place": ranks[index].place, "rank": str(ranks[index]),
            "steps": [value if np.isfinite(value) else None for value in medians[index].tolist()],
            "workloads": [name for name, *_ in asked],
        }
        for index, (device, row) in enumerate(rows)
    ]  # fmt: skip
    return sorted(found, key=lambda row: (row["place"], -row["score"], row["contestant"]))


def _name(workload: dict[str, Any]) -> tuple[str, int, str, float]:
    return workload["name"], workload["version"], workload["digest"], workload["target"]


def _steps(
    device: dict[str, Any], row: dict[str, Any], workload: tuple[str, int, str, float]
) -> list[float]:
    """Steps to the target, a seed each, infinite where it was missed."""
    return [
        np.inf if trial["steps"] is None else float(trial["steps"])
        for where, cell in zip(device["workloads"], row["cells"], strict=True)
        if _name(where) == workload
        for trial in cell["trials"]
    ]
