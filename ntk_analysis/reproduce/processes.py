"""Checks side by side, in processes that end with the one that asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import jax

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
      checks: what to run, begun in this order.
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
    with workers() as new_pool:
        pool = new_pool(jobs)
        waiting = {pool.submit(_alone, check, run): check for check in checks}
        for future in as_completed(waiting):
            check = waiting[future]
            try:
                record = future.result()
            except BrokenProcessPool:
                record = run(replace(check, run=_ended), report)
            yield check, record


def _alone(check: Check, run: Run) -> dict[str, Any]:
    record = run(check, lambda what, done: None)
    jax.clear_caches()
    return record


def _ended(report: object) -> Outcome:
    raise RuntimeError(
        "a process that ran checks was ended from outside, as for want of memory, and with it all "
        "that were not finished: the same command goes on, with --jobs 1 one check at a time"
    )
