"""Runs trials into a store: each once, those with a clock alone on the machine.

A trial is owned (``Store.claim``) from before it begins until its record is written, so that two
runners on one folder never run it twice; and it holds the machine (``locks.machine``) while it
runs. Both end with the process, so a killed runner leaves nothing to clear away.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

from benchmarks.leaderboard import cluster, lanes
from benchmarks.leaderboard.lanes import Config, Execute, Flight, Identity, Lanes, RefusedError
from benchmarks.leaderboard.locks import MachineLockError
from benchmarks.leaderboard.progress import Display, duration, label
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.store import Quarantined, StorageError, Store

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
    timed = {key: config for key, config in pending.items() if config["kind"] == "timed"}
    others = {key: config for key, config in pending.items() if key not in timed}
    try:
        with display.stage(list(pending.values()), run_.summary.resumed, jobs):
            if scheduler is not None and pending:
                with cluster.lanes(scheduler, execute, min(jobs, len(pending)), identity) as there:
                    run_.drain(run_.pass_over(timed | others, there), there)
            else:
                here = lanes.here(execute, display.waiting)
                held = run_.pass_over(timed, here)
                beside = min(jobs, len(others))
                with lanes.processes(execute, beside) if beside > 1 else nullcontext(here) as many:
                    held |= run_.pass_over(others, many)
                run_.drain(held, here)
    except KeyboardInterrupt:
        run_.summary.interrupted = True
    run_.summary.quarantined = store.quarantined[known:]
    run_.summary.seconds = time.perf_counter() - start
    return run_.summary


_Trials = dict[str, Config]
_Flights = dict[Flight, tuple[str, ExitStack]]


class _Run:
    """The state of one call of ``run``."""

    def __init__(self, store: Store, display: Display) -> None:
        self.summary = Summary()
        self._store, self._display = store, display

    def unfinished(self, trials: _Trials) -> _Trials:
        """Those without a record, by key; of the others it learns how long they took."""
        pending = {}
        for key, config in trials.items():
            record = self._store.read(key)
            if record is None:
                pending[key] = config
                continue
            self.summary.resumed += 1
            seconds = record["outcome"].get("wall_seconds")
            if isinstance(seconds, (int, float)):
                self._display.durations.add(config, seconds)
        return pending

    def drain(self, trials: _Trials, where: Lanes) -> None:
        """Runs trials that other runners hold, as those finish them or give them up."""
        while trials:
            self._display.waiting_for_others(len(trials))
            time.sleep(POLL_SECONDS)
            trials = self.pass_over(trials, where)

    def pass_over(self, trials: _Trials, where: Lanes) -> _Trials:
        """Runs trials, each until it has a record or has failed; those that others hold."""
        queue, held, flights = deque(trials), set[str](), _Flights()
        try:
            while queue or flights:
                while queue and len(flights) < where.width():
                    key = queue.popleft()
                    if not self._begin(key, trials[key], where, flights):
                        held.add(key)
                    self._land(trials, flights)
                wait(flights, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                self._land(trials, flights)
        except KeyboardInterrupt:
            self._land(trials, flights)
            raise
        finally:
            for flight, (_, claim) in flights.items():
                flight.cancel()
                claim.close()
        return {key: config for key, config in trials.items() if key in held}

    def _begin(self, key: str, config: Config, where: Lanes, flights: _Flights) -> bool:
        """Begins a trial, unless it is finished; False where another runner holds it."""
        with ExitStack() as claim:
            if not claim.enter_context(self._store.claim(key)):
                return False
            if self._store.has(key):
                self.summary.elsewhere += 1
                self._display.ended(key, config, "finished by another runner")
            else:
                self._display.started(key, config)
                flights[where.submit(config)] = (key, claim.pop_all())
        return True

    def _land(self, trials: _Trials, flights: _Flights) -> None:
        """Stores what has ended.

        A flight leaves the list after its record is written, so that an interruption from the
        keyboard writes it once more instead of losing it.
        """
        for flight in [flight for flight in flights if flight.done()]:
            key, claim = flights[flight]
            config = trials[key]
            failure: Failure | None = None
            try:
                seconds, result = flight.result()
                how = self._store.write(config, result)["outcome"].get("status", "finished")
            except CancelledError:
                raise ValueError(
                    "the Dask scheduler is gone, and with it the trials that it had in hand; "
                    "finished ones are kept: run the same command again to go on"
                ) from None
            except (RefusedError, MachineLockError, StorageError):
                raise
            except Exception as error:
                failure = _failure(key, config, error)
            del flights[flight]
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
