"""Trials that sleep, what they log, and waiting for something to happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.leaderboard import torture


def make_configs(tmp_path: Path, number: int, **more: object) -> list[dict]:
    return [config | more for config in torture.make_configs(number, tmp_path / torture.LOG)]


def events(tmp_path: Path) -> list[tuple[str, str, int]]:
    """What trials logged: "start" or "end", key, process."""
    split = [line.split() for line in torture.log_lines(tmp_path)]
    return [(event, key, int(process)) for event, key, process in split]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened for too long"
        time.sleep(0.01)
