"""Checks side by side, in processes that end with the one that asked for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import jax

from natgrad_flax.arguments.memory import host_memory
from natgrad_flax.processes import workers
from ntk_analysis.reproduce.registry import Check, Outcome

Report = Callable[[str, int], object]
"""Called with what is being done now, and how many checks have been finished since."""
Run = Callable[[Check, Report], dict[str, Any]]
"""Runs a check; returns its record whatever happens in it."""


def in_turn(
    checks: Sequence[Check], jobs: int, run: Run, report: Report
) -> Iterator[tuple[Check, dict[str, Any]]]:
    """Checks with their records, as they are finished.

    Args:
      checks: what to run, begun in this order, as far as memory allows.
      jobs: processes; with 1 the checks run in this one.
      run: does one; importable by its name, and so is ``run`` of each check.
      report: told what is being done; of checks in other processes only that they have begun.
    """
    if jobs == 1:
        for check in checks:
            report(check.identifier, 0)
            yield check, run(check, report)
            # compiled programs of one check are of no use to the next
            jax.clear_caches()
        return
    report(f"{jobs} checks at a time", 0)
    room, waiting = host_memory(), list(checks)
    running: dict[Future[dict[str, Any]], Check] = {}
    with workers() as new_pool:
        pool = new_pool(jobs)
        while waiting or running:
            while len(running) < jobs and (new := _next(waiting, running.values(), room)):
                waiting.remove(new)
                running[_begin(pool, new, run)] = new
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                check = running.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool:
                    record = run(replace(check, run=_ended), report)
                yield check, record


def _next(waiting: Sequence[Check], running: Collection[Check], room: int) -> Check | None:
    """The first that fits into memory beside those that run; alone, each one does."""
    left = room - sum(check.memory for check in running)
    return next((check for check in waiting if not running or check.memory <= left), None)


def _begin(pool: ProcessPoolExecutor, check: Check, run: Run) -> Future[dict[str, Any]]:
    try:
        return pool.submit(_alone, check, run)
    except BrokenProcessPool as error:
        broken: Future[dict[str, Any]] = Future()
        broken.set_exception(error)
        return broken


def _alone(check: Check, run: Run) -> dict[str, Any]:
    record = run(check, lambda what, done: None)
    jax.clear_caches()
    return record


def _ended(report: object) -> Outcome:
    raise RuntimeError(
        "a process that ran checks was ended from outside, as for want of memory, and with it all "
        "that were not finished: the same command goes on, with --jobs 1 one check at a time"
    )
