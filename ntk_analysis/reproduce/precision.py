"""Checks that need float64, whatever the precision of the process is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import jax

from ntk_analysis.reproduce.registry import Outcome, Report

Run = Callable[[Report], Outcome]


def in_float64(run: Run) -> Run:
    """A check whose arrays are float64."""

    @wraps(run)
    def wrapped(report: Report) -> Outcome:
        with jax.enable_x64(True):
            return run(report)

    return wrapped
