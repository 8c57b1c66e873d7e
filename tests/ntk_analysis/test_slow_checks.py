"""Slow checks find a fault: in the outcome that is stored of them, or when they are run."""

from __future__ import annotations

import inspect
import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from planted_faults import FAULTS, SLOW_FAULTS
from replays import REPLAYS, numbers

from ntk_analysis.reproduce import find_checks, load_checks
from ntk_analysis.reproduce.runner import is_fresh

for paper in ("bernacchia", "karakida_osawa", "kerekes", "natgrad"):
    import_module(f"replays_{paper}")
CHECKS = {check.identifier: check for check in load_checks()}


@cache
def document() -> dict[str, Any]:
    """The newest stored records."""
    newest = max((Path(__file__).parents[2] / "results").glob("*.json"))
    return json.loads(newest.read_text(encoding="utf-8"))


def silent(what: str) -> None:
    pass


def test_every_check_has_a_planted_fault():
    fast = {name for name, check in CHECKS.items() if check.fast}
    assert set(FAULTS) == fast
    assert sorted([*FAULTS, *SLOW_FAULTS, *REPLAYS]) == sorted(CHECKS)


@pytest.mark.parametrize("identifier", REPLAYS)
def test_slow_check_judges_a_fault(identifier, monkeypatch):
    check, record = CHECKS[identifier], document()["checks"][identifier]
    module = inspect.getmodule(check.run)

    def outcome(wrong: bool):
        with monkeypatch.context() as places:
            for name, stand_in in REPLAYS[identifier].stand_ins(record, wrong).items():
                places.setattr(module, name, stand_in)
            return check.run(silent)

    right = outcome(wrong=False)
    assert [m for m in right.measurements if not m.passed] == []
    if is_fresh(record, check, document()["environment"]):
        stored = {row["what"]: row["measured"] for row in record["measurements"]}
        found = {m.what: float(m.measured) for m in right.measurements}
        assert set(found) <= set(stored)
        assert list(found.values()) == pytest.approx(
            list(numbers(stored[what] for what in found)), rel=1e-4, abs=1e-9
        )
    assert not outcome(wrong=True).passed


@pytest.mark.slow
@pytest.mark.parametrize("identifier", SLOW_FAULTS)
def test_slow_check_finds_its_fault(identifier, monkeypatch):
    (check,) = find_checks([identifier])
    SLOW_FAULTS[identifier].plant(monkeypatch)
    assert not check.run(silent).passed
