"""Runs trials into a store: each once, those with a clock alone on the machine.

A trial is owned (``Store.claim``) from before it begins until its record is written, so that two
runners on one folder never run it twice; and it holds the machine (``locks.machine``) while it
runs. Both end with the process, so a killed runner leaves nothing to clear away.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.leaderboard import locks
from benchmarks.leaderboard.progress import Display, duration, label
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.store import Quarantined, Store

Config = Mapping[str, Any]
Result = Mapping[str, Any]
Execute = Callable[[dict[str, Any]], Result]
Identity = Callable[[], Mapping[str, Any]]

KINDS = ("timed", "structure")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Failure:
    """A trial that raised. It has no record, so the next run tries it again.

    Attributes:
      key: of the trial.
      name: the trial in words.
      reason: one sentence.
      details: the traceback.
    """

    key: str
    name: str
    reason: str
    details: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Summary:
    """What a run did.

    Attributes:
      finished: trials that it ran and stored.
      resumed: trials that were finished before it began.
      elsewhere: trials that another runner finished meanwhile.
      failed: trials that raised.
      quarantined: files that were no valid records; their trials ran again.
      interrupted: whether it was stopped from the keyboard.
      trial_seconds: sum of the seconds of the trials that it ran.
      seconds: of the whole run.
    """

    finished: int = 0
    resumed: int = 0
    elsewhere: int = 0
    failed: list[Failure] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    interrupted: bool = False
    trial_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every trial asked for has a record."""
        return not self.failed and not self.interrupted

    def __str__(self) -> str:
        parts = [f"{self.finished} trials run in {duration(self.seconds)}"]
        parts += [f"{self.resumed} finished before"] if self.resumed else []
        parts += [f"{self.elsewhere} finished by another runner"] if self.elsewhere else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{len(self.quarantined)} files quarantined"] if self.quarantined else []
        parts += ["interrupted: run the same command again to go on"] if self.interrupted else []
        return "; ".join(parts)


class RefusedError(ValueError):
    """A worker of a cluster has other code or another environment than a trial asks for."""


class Lanes(Protocol):
    """Where trials run: this process, processes of its own, or a cluster."""

    def width(self) -> int:
        """Number of trials to have in hand at a time."""

    def submit(self, config: Config) -> Future[tuple[float, Result]]:
        """Begins a trial; the future gives its seconds and its result."""


def perform(
    execute: Execute, config: Config, waiting: Callable[[], None] | None = None
) -> tuple[float, Result]:
    """Runs a trial on this machine, alone where it is timed; its seconds and its result."""
    with locks.machine(shared=config["kind"] != "timed", waiting=waiting):
        start = time.perf_counter()
        result = execute(dict(config))
        return time.perf_counter() - start, result


def run(
    configs: Iterable[Config],
    store: Store,
    execute: Execute,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    identity: Identity | None = None,
    display: Display | None = None,
) -> Summary:
    """Runs the trials that have no record yet: first the timed ones, then the others.

    Can be called stage after stage, as for tuning and then for evaluation.

    Args:
      configs: of the trials, each with its "kind": "timed" or "structure". Repeated ones count
        once.
      store: where records are kept.
      execute: runs one trial and returns "facts", "outcome" and "command". With ``jobs`` or a
        scheduler it must be a function of a module, as other processes import it.
      jobs: processes for trials that are not timed; with the scheduler "local", its workers.
      scheduler: of Dask: an address, "local" for a cluster of this machine, None for no cluster.
      identity: "code" and "environment" of the process that calls it; on a cluster a worker whose
        own differ from those in a config refuses the trial.
      display: shows progress; None shows nothing.

    Returns:
      What was done. Trials that raise are listed in it and do not stop the others, and so is an
      interruption from the keyboard.

    Raises:
      ValueError: a config of no known kind, ``jobs`` below 1, a scheduler that does not answer or
        has workers of other code or environment, or Dask is not installed.
      StorageError: the results folder cannot be written to.
      MachineLockError: the lock of this machine cannot be opened.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be an integer of at least 1, got {jobs!r}")
    trials = {trial_key(config): config for config in configs}
    for config in trials.values():
        if config.get("kind") not in KINDS:
            raise ValueError(f"a trial's kind is {' or '.join(KINDS)}, got {config.get('kind')!r}")
    start, known = time.perf_counter(), len(store.quarantined)
    display = display or Display()
    run_ = _Run(store, display)
    pending = run_.unfinished(trials)
    timed = [item for item in pending if item[1]["kind"] == "timed"]
    others = [item for item in pending if item[1]["kind"] != "timed"]
    try:
        with display.stage([config for _, config in pending], run_.summary.resumed, jobs):
            if scheduler is not None and pending:
                from benchmarks.leaderboard import cluster

                with cluster.lanes(scheduler, execute, min(jobs, len(pending)), identity) as lanes:
                    run_.drain(run_.pass_over(timed + others, lanes), lanes)
            else:
                here = _Here(execute, display)
                held = run_.pass_over(timed, here)
                with _beside(execute, min(jobs, len(others)), display) as lanes:
                    held += run_.pass_over(others, lanes)
                run_.drain(held, here)
    except KeyboardInterrupt:
        run_.summary.interrupted = True
    run_.summary.quarantined = store.quarantined[known:]
    run_.summary.seconds = time.perf_counter() - start
    return run_.summary


_Trial = tuple[str, Config]
_Flights = dict[Future[tuple[float, Result]], tuple[_Trial, ExitStack]]


class _Run:
    """The state of one call of ``run``."""

    def __init__(self, store: Store, display: Display) -> None:
        self.summary = Summary()
        self._store, self._display = store, display

    def unfinished(self, trials: Mapping[str, Config]) -> list[_Trial]:
        pending = []
        for key, config in trials.items():
            record = self._store.read(key)
            if record is None:
                pending.append((key, config))
                continue
            self.summary.resumed += 1
            seconds = record["outcome"].get("wall_seconds")
            if isinstance(seconds, (int, float)):
                self._display.durations.add(config, seconds)
        return pending

    def drain(self, trials: list[_Trial], lanes: Lanes) -> None:
        """Runs trials that other runners hold, as those finish them or give them up."""
        while trials:
            self._display.waiting_for_others(len(trials))
            time.sleep(POLL_SECONDS)
            trials = self.pass_over(trials, lanes)

    def pass_over(self, trials: Sequence[_Trial], lanes: Lanes) -> list[_Trial]:
        """Runs trials, each until it has a record or has failed; those that others hold."""
        queue, held = deque(trials), list[_Trial]()
        flights: _Flights = {}
        try:
            while queue or flights:
                while queue and len(flights) < lanes.width():
                    self._begin(queue.popleft(), lanes, flights, held)
                    self._land(flights)
                wait(flights, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                self._land(flights)
        except KeyboardInterrupt:
            self._land(flights)
            raise
        finally:
            for future, (_, claim) in flights.items():
                future.cancel()
                claim.close()
        return held

    def _begin(
        self,
        trial: _Trial,
        lanes: Lanes,
        flights: _Flights,
        held: list[_Trial],
    ) -> None:
        key, config = trial
        with ExitStack() as claim:
            if not claim.enter_context(self._store.claim(key)):
                held.append(trial)
            elif self._store.has(key):
                self.summary.elsewhere += 1
                self._display.ended(key, config, "finished by another runner")
            else:
                self._display.started(key, config)
                flights[lanes.submit(config)] = (trial, claim.pop_all())

    def _land(self, flights: _Flights) -> None:
        """Stores what has ended.

        A flight leaves the list after its record is written, so that an interruption from the
        keyboard writes it once more instead of losing it.
        """
        for future in [future for future in flights if future.done()]:
            (key, config), claim = flights[future]
            failure: Failure | None = None
            seconds = 0.0
            try:
                seconds, result = future.result()
            except CancelledError:
                raise ValueError(
                    "the Dask scheduler is gone, and with it the trials that it had in hand; "
                    "finished ones are kept: run the same command again to go on"
                ) from None
            except (RefusedError, locks.MachineLockError):
                raise
            except Exception as error:
                failure = _failure(key, config, error)
            else:
                try:
                    how = self._store.write(config, result)["outcome"].get("status", "finished")
                except (ValueError, TypeError) as error:
                    failure = _failure(key, config, error)
            del flights[future]
            claim.close()
            if failure is not None:
                self.summary.failed.append(failure)
                self._display.ended(key, config, f"failed: {failure.reason}")
            else:
                self.summary.finished += 1
                self.summary.trial_seconds += seconds
                self._display.durations.add(config, seconds)
                self._display.ended(key, config, f"{how} in {duration(seconds)}")


def _failure(key: str, config: Config, error: Exception) -> Failure:
    if isinstance(error, BrokenProcessPool):
        reason = "the process that ran it died (killed, or out of memory)"
    else:
        reason = ": ".join(part for part in (type(error).__name__, str(error).strip()) if part)
    return Failure(key, label(config), reason, "".join(traceback.format_exception(error)))


class _Here:
    """This process: one trial at a time, finished when ``submit`` returns."""

    def __init__(self, execute: Execute, display: Display) -> None:
        self._execute, self._display = execute, display

    def width(self) -> int:
        return 1

    def submit(self, config: Config) -> Future[tuple[float, Result]]:
        future: Future[tuple[float, Result]] = Future()
        try:
            future.set_result(perform(self._execute, config, self._display.waiting))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes:
    """Processes of this machine, spawned because JAX does not survive a fork.

    They end when the writing end of ``lifeline`` is closed, which the death of this process does.
    """

    def __init__(self, execute: Execute, jobs: int) -> None:
        self._execute, self._jobs = execute, jobs
        self._context = get_context("spawn")
        self._lifeline, self._hold = self._context.Pipe(duplex=False)
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._jobs, self._context, _end_with, (self._lifeline,))

    def width(self) -> int:
        return self._jobs

    def submit(self, config: Config) -> Future[tuple[float, Result]]:
        try:
            return self._pool.submit(perform, self._execute, dict(config))
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._new_pool()
            return self._pool.submit(perform, self._execute, dict(config))

    def close(self) -> None:
        self._hold.close()
        self._pool.shutdown(cancel_futures=True)
        self._lifeline.close()


def _end_with(lifeline: Connection) -> None:
    """Ends this process with the one that spawned it; the keyboard interrupts only that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _beside(execute: Execute, jobs: int, display: Display) -> Iterator[Lanes]:
    """Lanes for trials that are not timed."""
    if jobs <= 1:
        yield _Here(execute, display)
        return
    processes = _Processes(execute, jobs)
    try:
        yield processes
    finally:
        processes.close()
