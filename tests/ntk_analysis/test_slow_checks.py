"""Slow checks find a fault: in the outcome that is stored of them, or when they are run."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module

import pytest
from paper_records import CATALOGUE, committed
from planted_faults import FAULTS, SLOW_FAULTS
from replays import REPLAYS, numbers

from ntk_analysis.report.comparison import STALE
from ntk_analysis.reproduce.registry import MissingDataError

for paper in ("bernacchia", "karakida_osawa", "kerekes", "natgrad"):
    import_module(f"replays_{paper}")
CHECKS = {check.identifier: check for check in CATALOGUE}


@cache
def stored() -> dict[str, dict]:
    """The records of ``results/``, read once."""
    return committed()


def silent(what: str) -> None:
    pass


def test_every_check_has_a_planted_fault():
    fast = {name for name, check in CHECKS.items() if check.fast}
    assert set(FAULTS) == fast
    assert sorted([*FAULTS, *SLOW_FAULTS, *REPLAYS]) == sorted(CHECKS)


@pytest.mark.parametrize("identifier", REPLAYS)
def test_slow_check_judges_a_fault(identifier, monkeypatch):
    check, record = CHECKS[identifier], stored()[identifier]
    module = inspect.getmodule(check.run)

    def outcome(wrong: bool):
        with monkeypatch.context() as places:
            for name, stand_in in REPLAYS[identifier].stand_ins(record, wrong).items():
                places.setattr(module, name, stand_in)
            return check.run(silent)

    try:
        right = outcome(wrong=False)
    except KeyError as missing:
        if record["evidence"] != STALE:
            raise
        pytest.skip(f"{missing} was not measured when the record was made")
    assert [m for m in right.measurements if not m.passed] == []
    if record["evidence"] != STALE:
        rows = {row["what"]: row["measured"] for row in record["measurements"]}
        found = {m.what: float(m.measured) for m in right.measurements}
        assert set(found) <= set(rows)
        assert list(found.values()) == pytest.approx(
            list(numbers(rows[what] for what in found)), rel=1e-4, abs=1e-9
        )
    assert not outcome(wrong=True).passed, REPLAYS[identifier].what


@pytest.mark.slow
@pytest.mark.parametrize("identifier", SLOW_FAULTS)
def test_slow_check_finds_its_fault(identifier, monkeypatch):
    SLOW_FAULTS[identifier].plant(monkeypatch)
    try:
        outcome = CHECKS[identifier].run(silent)
    except MissingDataError as error:
        pytest.skip(str(error))
    assert not outcome.passed, SLOW_FAULTS[identifier].what
