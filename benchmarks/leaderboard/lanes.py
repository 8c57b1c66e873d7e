"""Where trials run: in this process or in processes of its own; ``cluster`` has Dask's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.leaderboard import locks

Config = Mapping[str, Any]
Result = Mapping[str, Any]
Execute = Callable[[dict[str, Any]], Result]
Identity = Callable[[], Mapping[str, Any]]
Flight = Future[tuple[float, Result]]
"""A trial that has begun; it gives its seconds and its result."""


class RefusedError(ValueError):
    """A worker of a cluster has other code or another environment than a trial asks for."""


class Lanes(NamedTuple):
    """Where trials run.

    Attributes:
      submit: begins a trial.
      width: number of trials to have in hand at a time.
    """

    submit: Callable[[Config], Flight]
    width: Callable[[], int]


def perform(
    execute: Execute, config: Config, waiting: Callable[[], None] | None = None
) -> tuple[float, Result]:
    """Runs a trial on this machine, alone where it is timed; its seconds and its result."""
    with locks.machine(shared=config["kind"] != "timed", waiting=waiting):
        start = time.perf_counter()
        result = execute(dict(config))
        return time.perf_counter() - start, result


def here(execute: Execute, waiting: Callable[[], None]) -> Lanes:
    """This process: one trial at a time, finished when ``submit`` returns."""

    def submit(config: Config) -> Flight:
        flight: Flight = Future()
        try:
            flight.set_result(perform(execute, config, waiting))
        except Exception as error:
            flight.set_exception(error)
        return flight

    return Lanes(submit, lambda: 1)


@contextmanager
def processes(execute: Execute, jobs: int) -> Iterator[Lanes]:
    """Processes of this machine, which end with the context and with this process."""
    # here, as it imports JAX, which a runner without processes does not need
    from natgrad_flax.processes import workers

    with workers() as new_pool:
        pool = new_pool(jobs)

        def submit(config: Config) -> Flight:
            nonlocal pool
            try:
                return pool.submit(perform, execute, dict(config))
            except BrokenProcessPool:
                pool = new_pool(jobs)
                return pool.submit(perform, execute, dict(config))

        yield Lanes(submit, lambda: jobs)
