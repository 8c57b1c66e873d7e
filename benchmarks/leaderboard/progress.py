"""What a run shows while it goes on: a bar on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.leaderboard.texts import printable

Config = Mapping[str, Any]
_Group = tuple[str, str, str]


def label(config: Config) -> str:
    """A trial in words: workload, contestant, learning rate and seed."""
    parts = [f"{config.get('workload')}: {config.get('contestant')}"]
    rate = config.get("learning_rate")
    if rate is not None:
        parts.append(f"rate {rate:.3g}")
    parts.append(f"seed {config.get('seed', 0)}")
    return printable(", ".join(parts))


def duration(seconds: float) -> str:
    """Seconds in words, as exact as an estimate deserves."""
    if seconds < 0.95:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _group(config: Config) -> _Group:
    return (str(config["kind"]), str(config.get("workload")), str(config.get("contestant")))


class Durations:
    """Mean seconds of finished trials, to estimate the others by.

    A trial is estimated by those of its kind, workload and contestant; without any, by those of its
    kind and workload, of its kind, or by all.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def add(self, config: Config, seconds: float) -> None:
        """Takes a finished trial in."""
        group = _group(config)
        for length in range(len(group) + 1):
            self._seconds[group[:length]].append(seconds)

    def expected(self, group: _Group) -> float | None:
        """Seconds that a trial of this kind, workload and contestant should take, if known."""
        near = (self._seconds.get(group[:length]) for length in range(len(group), -1, -1))
        return next((fmean(seconds) for seconds in near if seconds), None)


class Display:
    """Shows runs on a console, one after the other; what it learns of durations stays.

    Nothing is drawn between the beginning and the end of a trial, so that drawing takes no time
    from what is timed.

    Args:
      console: to draw on; None shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.durations = Durations()
        self._console = console
        self._bar: Progress | None = None
        self._remaining: Counter[_Group] = Counter()
        self._running: dict[str, str] = {}
        self._done = self._total = 0
        self._lanes = 1
        self._noted = ""

    @contextmanager
    def stage(self, configs: Sequence[Config], done: int, lanes: int) -> Iterator[None]:
        """Shows a run from here to the end of the context.

        Args:
          configs: of the trials still to run.
          done: number of trials that are finished already.
          lanes: number of untimed trials that run at a time.
        """
        self._remaining = Counter(_group(config) for config in configs)
        self._running.clear()
        self._done, self._total, self._lanes = done, done + len(configs), lanes
        if self._console is None or not configs:
            yield
        elif not self._console.is_terminal:
            self._line(f"{done} of {self._total} trials are finished, {len(configs)} to run")
            yield
        else:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
            )
            with Progress(*columns, console=self._console, auto_refresh=False) as self._bar:
                self._bar.add_task("", total=self._total, completed=done)
                try:
                    yield
                finally:
                    self._bar.refresh()
                    self._bar = None

    def started(self, key: str, config: Config) -> None:
        """A trial begins."""
        self._running[key] = label(config)
        self._draw()

    def waiting(self) -> None:
        """The trial that begins has to wait for another runner on this machine."""
        self._note("waiting for the timed trial of another runner on this machine")

    def waiting_for_others(self, number: int) -> None:
        """All trials that are left are in the hands of other runners."""
        self._note(f"waiting for {number} trials that other runners have in hand")

    def ended(self, key: str, config: Config, how: str) -> None:
        """A trial is finished, or has failed.

        Args:
          key: of the trial.
          config: of the trial.
          how: it ended, in a few words.
        """
        self._running.pop(key, None)
        self._remaining[_group(config)] -= 1
        self._done += 1
        text = f"{label(config)}: {how}"
        if self._bar is not None:
            self._draw(completed=self._done)
        elif self._console is not None:
            left = self.seconds_left()
            rest = "" if left is None or self._done == self._total else f"; {_about(left)}"
            self._line(f"[{self._done}/{self._total}] {text}{rest}")

    def seconds_left(self) -> float | None:
        """Estimate of the seconds to the end of the run; None before any trial is finished."""
        left = 0.0
        for group, number in self._remaining.items():
            if number > 0:
                each = self.durations.expected(group)
                if each is None:
                    return None
                left += number * each / (1 if group[0] == "timed" else self._lanes)
        return left

    def _draw(self, **changes: Any) -> None:
        if self._bar is None:
            return
        left = self.seconds_left()
        names = list(self._running.values())
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        now = f"now {names[0]}{more}" if names else ""
        parts = [part for part in (_about(left) if left else "", now) if part]
        self._describe("; ".join(parts), **changes)

    def _note(self, text: str) -> None:
        if self._bar is not None:
            self._describe(text)
        elif self._console is not None and text != self._noted:
            self._line(text)
        self._noted = text

    def _describe(self, text: str, **changes: Any) -> None:
        assert self._bar is not None
        self._bar.update(self._bar.task_ids[0], description=text, refresh=True, **changes)

    def _line(self, text: str) -> None:
        assert self._console is not None
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _about(seconds: float) -> str:
    return f"about {duration(seconds)} left"
