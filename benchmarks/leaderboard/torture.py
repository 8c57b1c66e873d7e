"""Kills the runner again and again, and counts what was lost: nothing may be.

``python -m benchmarks.leaderboard torture --kills 100``. The trials only sleep, and write a line to
a log when they begin and when they end, so that the log tells what ran, when and how often.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.leaderboard.progress import duration
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.runner import Summary, run
from benchmarks.leaderboard.store import MANIFEST, Store

RULES = "torture"
LOG = "trials.log"
CHECKOUT = Path(__file__).resolve().parents[2]

_PATIENCE_SECONDS = 120.0


def execute(config: dict[str, Any]) -> dict[str, Any]:
    """A trial that sleeps, and says in the log when it begins and when it ends."""
    key = trial_key(config)
    log_line(Path(config["log"]), "start", key)
    time.sleep(config["seconds"])
    log_line(Path(config["log"]), "end", key)
    values = [random.random() for _ in range(200)]
    outcome = {"status": "reached", "wall_seconds": config["seconds"], "values": values}
    return {"facts": {"title": "sleep"}, "outcome": outcome, "command": "torture"}


def log_line(log: Path, event: str, key: str) -> None:
    """Appends a line in one write, which no kill can cut."""
    with log.open("ab", buffering=0) as file:
        file.write(f"{event} {key} {os.getpid()}\n".encode())


def make_configs(number: int, log: Path) -> list[dict[str, Any]]:
    """Trials of 1 to 40 ms, half of them timed; the first ones are the same for any number."""
    generator = random.Random(0)
    return [
        {
            "rules": RULES,
            "kind": ("timed", "structure")[seed % 2],
            "workload": "sleep",
            "contestant": "sleep",
            "seed": seed,
            "seconds": round(generator.uniform(0.001, 0.04), 4),
            "log": str(log),
        }
        for seed in range(number)
    ]


@dataclass
class Report:
    """What the kills did.

    Attributes:
      kills: SIGKILLs.
      in_flight: of them, those with a trial in progress.
      trials: trials asked for.
      finished: trials with a valid record at the end.
      lost: finished trials that were gone or changed later.
      corrupt: files that were no valid record at any time.
      repeated: trials begun once more than the kills in their midst account for.
      collisions: trials begun while they, or another timed one, were running.
      leftovers: temporary and lock files at the end.
      seconds: of it all.
    """

    kills: int = 0
    in_flight: int = 0
    trials: int = 0
    finished: int = 0
    lost: int = 0
    corrupt: int = 0
    repeated: int = 0
    collisions: int = 0
    leftovers: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, corrupt, repeated, run twice at once or left over."""
        bad = self.lost + self.corrupt + self.repeated + self.collisions + self.leftovers
        return bad == 0 and self.finished == self.trials

    def table(self) -> Table:
        """The counts, with what they must be."""
        table = Table("", "found", "wanted", box=box.SIMPLE, title="torture of the runner")
        for column in table.columns[1:]:
            column.justify = "right"
        rows: list[tuple[str, int, str]] = [
            ("kills", self.kills, ""),
            ("kills in the midst of a trial", self.in_flight, ""),
            ("trials finished", self.finished, str(self.trials)),
            ("finished trials lost", self.lost, "0"),
            ("corrupt files", self.corrupt, "0"),
            ("repeated beyond the trial in flight", self.repeated, "0"),
            ("trials that ran into each other", self.collisions, "0"),
            ("files left over", self.leftovers, "0"),
        ]
        for name, found, wanted in rows:
            good = not wanted or str(found) == wanted
            table.add_row(name, str(found), wanted, style="" if good else "bold red")
        table.caption = f"{duration(self.seconds)}; {'passed' if self.passed else 'FAILED'}"
        return table


@dataclass
class _Watch:
    """What was seen of a folder between kills."""

    folder: Path
    seen: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    restarted: Counter[str] = field(default_factory=Counter)
    _read: int = 0

    def look(self) -> None:
        """Compares the folder and the log with what was seen before.

        Reads the files by itself and moves none: what the runner thinks of them is not asked.
        """
        now: dict[str, str] = {}
        for path in self.folder.glob("store/trials/*/*.json"):
            try:
                record = json.loads(path.read_bytes())
                now[record["key"]] = record["digest"]
                if record["key"] != path.stem or len(record["outcome"]["values"]) != 200:
                    self.corrupt.add(path.name)
            except (ValueError, KeyError, TypeError):
                self.corrupt.add(path.name)
        self.corrupt.update(path.name for path in self.folder.glob("store/quarantine/*.json"))
        self.lost.update(key for key, digest in self.seen.items() if now.get(key) != digest)
        # the log after the files: a living runner may begin and finish a trial in between
        lines = log_lines(self.folder)
        for line in lines[self._read :]:
            event, key, _ = line.split()
            if event == "start" and key in self.seen:
                self.restarted[key] += 1
        self.seen, self._read = now, len(lines)


def log_lines(folder: Path) -> list[str]:
    """The log so far."""
    log = folder / LOG
    return log.read_text().splitlines() if log.exists() else []


def torture(
    kills: int = 100, runners: int = 1, *, seed: int = 0, console: Console | None = None
) -> Report:
    """Kills runners at random moments, restarts them, and lets them finish in the end.

    Args:
      kills: how many SIGKILLs.
      runners: runners on the folder at a time; a kill hits one of them.
      seed: of the moments.
      console: to show the number of kills on; None shows nothing.

    Raises:
      ValueError: less than one kill or runner.
      RuntimeError: a runner failed by itself, or makes no progress.
    """
    for name, value in (("kills", kills), ("runners", runners)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    with tempfile.TemporaryDirectory(prefix="natgrad-torture-") as name:
        return _torture(Path(name), kills, runners, random.Random(seed), console)


def _torture(
    folder: Path, kills: int, runners: int, generator: random.Random, console: Console | None
) -> Report:
    report, watch, start = Report(trials=10 * kills), _Watch(folder), time.perf_counter()
    dead: dict[int, str] = {}
    alive: list[subprocess.Popen[bytes]] = []
    try:
        while report.kills < kills:
            alive = [process for process in alive if not _ended(process)]
            if not alive and _complete(folder, report.trials):
                report.trials += 10 * (kills - report.kills)
            while len(alive) < runners:
                alive.append(_start(folder, report.trials))
            if generator.random() < 0.8:  # the others hit a runner that is starting, too
                _wait_for_work(folder, alive)
            time.sleep(generator.uniform(0.0, 0.5))
            victim = alive.pop(generator.randrange(len(alive)))
            if _ended(victim):
                continue
            victim.kill()
            victim.wait()
            report.kills += 1
            last = _last_event(folder, victim.pid)
            if last is not None:
                dead[victim.pid] = last[1]
                report.in_flight += last[0] == "start"
            watch.look()
            if console is not None and report.kills % 10 == 0:
                console.print(f"{report.kills} of {kills} kills", highlight=False)
        # twice: runners that outlived their kills may have begun with fewer trials than there are
        for _ in range(2):
            alive += [_start(folder, report.trials) for _ in range(runners - len(alive))]
            while alive:
                alive[-1].wait(_PATIENCE_SECONDS)
                _ended(alive.pop())
        watch.look()
    finally:
        for process in alive:
            process.kill()
            process.wait()
    lines = log_lines(folder)
    report.finished = len(watch.seen)
    report.lost, report.corrupt = len(watch.lost), len(watch.corrupt)
    report.repeated = max(_repeated(lines, dead), sum(watch.restarted.values()))
    report.collisions = _collisions(lines, make_configs(report.trials, folder / LOG))
    report.leftovers = sum(
        path.is_file() and path.name != MANIFEST and path.suffix != ".json"
        for path in (folder / "store").rglob("*")
    )
    report.seconds = time.perf_counter() - start
    return report


def _start(folder: Path, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.leaderboard.torture", str(folder), str(number)]
    # a temporary folder of its own, so that no runner of this machine waits for its lock
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment)


def _wait_for_work(folder: Path, alive: list[subprocess.Popen[bytes]]) -> None:
    """Waits until the log grows, or the runners are at their end."""
    before, end = len(log_lines(folder)), time.monotonic() + _PATIENCE_SECONDS
    while len(log_lines(folder)) == before and any(process.poll() is None for process in alive):
        if time.monotonic() > end:
            raise RuntimeError("the runners make no progress")
        time.sleep(0.01)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a runner has come to its end; RuntimeError where that was no good one."""
    code = process.poll()
    if code not in (None, 0):
        raise RuntimeError(f"a runner that nobody killed ended with exit code {code}")
    return code is not None


def _complete(folder: Path, number: int) -> bool:
    return len(list(folder.glob("store/trials/*/*.json"))) >= number


def _last_event(folder: Path, process: int) -> tuple[str, str] | None:
    """The last line of a process in the log: event and key."""
    lines = (line.split() for line in reversed(log_lines(folder)))
    return next(((event, key) for event, key, pid in lines if int(pid) == process), None)


def _repeated(lines: list[str], dead: Mapping[int, str]) -> int:
    """Starts of trials beyond one, and beyond one for each kill in the midst of that trial."""
    starts = Counter(line.split()[1] for line in lines if line.startswith("start"))
    allowed = Counter(dead.values())
    return sum(max(0, number - 1 - allowed[key]) for key, number in starts.items())


def _collisions(lines: list[str], configs: list[dict[str, Any]]) -> int:
    """Trials begun while the same one, or with a timed one any other, ran to its end elsewhere.

    A trial that a kill cut short has no end in the log, and is left out: when it stopped is not
    known.
    """
    timed = {trial_key(config) for config in configs if config["kind"] == "timed"}
    ends = {tuple(line.split()[1:]) for line in lines if line.startswith("end")}
    running: set[tuple[str, ...]] = set()
    collisions = 0
    for line in lines:
        event, *trial = line.split()
        this = tuple(trial)
        if event == "end":
            running.discard(this)
            continue
        collisions += any(
            other[0] == this[0] or other[0] in timed or this[0] in timed for other in running
        )
        if this in ends:
            running.add(this)
    return collisions


def run_trials(folder: Path, number: int) -> Summary:
    """Runs the trials of a torture: what is killed."""
    store = Store.open(folder / "store", RULES)
    return run(make_configs(number, folder / LOG), store, execute)


if __name__ == "__main__":
    sys.exit(0 if run_trials(Path(sys.argv[1]), int(sys.argv[2])).complete else 1)
