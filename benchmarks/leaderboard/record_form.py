"""What a record must hold to be scored: a foreign one may be whole and yet no trial of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from benchmarks.leaderboard.board import MEASURES
from benchmarks.leaderboard.refutations import ROLES
from benchmarks.leaderboard.rows import STATUSES

Record = Mapping[str, Any]
_ABSENT = object()
_Kind = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    # JSON's integers may be longer than any float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(entry, str) for entry in value.values())


def _are_evidence(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, Mapping) and not _unfit(entry, _EVIDENCE) for entry in value
    )


def _or_null(kind: _Kind) -> _Kind:
    return f"{kind[0]} or null", lambda value: value is None or kind[1](value)


def _if_there(kind: _Kind) -> _Kind:
    name, fits = _or_null(kind)
    return name, lambda value: value is _ABSENT or fits(value)


_TEXT: _Kind = ("a text", lambda value: isinstance(value, str))
_NUMBER: _Kind = ("a number", _is_number)
_AMOUNT: _Kind = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_LIST: _Kind = ("a list", lambda value: isinstance(value, list))
_STATUSES = (*STATUSES, "measured")
_STATUS: _Kind = (f"one of {', '.join(_STATUSES)}", lambda value: value in _STATUSES)

_CURVE = ("steps", "seconds", "train", "held_out")


def _named(part: str, kind: _Kind, *names: str) -> dict[str, _Kind]:
    return {f"{part}.{name}": kind for name in names}


_ALWAYS = {
    "date": _TEXT,
    "command": _TEXT,
    **_named(
        "config", _TEXT, "role", "workload", "workload_digest", "contestant", "code", "sources"
    ),
    **_named("config", _NUMBER, "workload_version", "seed"),
    **_named("config", _or_null(_NUMBER), "target", "learning_rate"),
    "config.environment": ("a dictionary of texts", _are_texts),
    **_named("config.environment", _TEXT, "device", "jax"),
    **_named("facts", _TEXT, "title", "family", "structure", "fisher", "damping", "rate_rule"),
    **_named("facts", _TEXT, "workload_title", "metric"),
    **_named("facts", _if_there(_TEXT), "question", "why_target", "expectation", "expected"),
    **_named("facts", _if_there(_TEXT), "ruleset"),
    **_named("facts", _if_there(_TEXT), "commit", "natgrad", "submitter"),
    "outcome.status": _STATUS,
    "outcome.reason": _TEXT,
    "outcome.rate_note": _if_there(_TEXT),
    **_named("outcome", _if_there(_NUMBER), "steps_to_target", "final", "best", "learning_rate"),
    **_named("outcome", _if_there(_AMOUNT), "compile_seconds", "preparation_seconds"),
    **_named("outcome", _if_there(_AMOUNT), "wall_seconds", "harness_seconds"),
    **_named("outcome", _if_there(_NUMBER), *MEASURES),
}
_REACHED = {
    **_named("outcome", _AMOUNT, "seconds_to_target", "steps_to_target"),
    **_named("outcome", _AMOUNT, "compile_seconds", "preparation_seconds"),
}

_EVIDENCE: dict[str, _Kind] = {
    **dict.fromkeys(("key", "command", "status"), _TEXT),
    **dict.fromkeys(("seed",), _NUMBER),
    **dict.fromkeys(("steps_to_target", "seconds_to_target"), _or_null(_NUMBER)),
    **{f"environment.{name}": _TEXT for name in ("device", "jax")},
}
_REFUTATION = {
    "date": _TEXT,
    **_named("config", _TEXT, "workload", "contestant", "sources", "refutes"),
    "config.reason": ("a reason", lambda value: isinstance(value, str) and bool(value.strip())),
    "config.evidence": ("a list of results of trials", _are_evidence),
    **_named("facts", _TEXT, "title", "commit", "submitter"),
}


def misfit(record: Record) -> str:
    """Why a record cannot be scored, or ""."""
    config = record.get("config")
    if isinstance(config, Mapping) and config.get("role") in ROLES:
        return _unfit(record, _REFUTATION)
    wanted, curve = dict(_ALWAYS), _at(record, "outcome.curve")
    if curve is _ABSENT:
        curve = None
    if _at(record, "outcome.status") == "reached":
        wanted |= _REACHED
    if curve:
        wanted |= _named("outcome.curve", _LIST, *_CURVE)
    return _unfit(record, wanted) or (_bend(curve) if curve else "")


def _unfit(record: Record, wanted: Mapping[str, _Kind]) -> str:
    """The first entry that is not what it should be, in words, or ""."""
    for place, (kind, fits) in wanted.items():
        if not fits(_at(record, place)):
            return f"its {place} is not {kind}"
    return ""


def _bend(curve: Mapping[str, list[Any]]) -> str:
    steps = curve["steps"]
    if len({len(curve[name]) for name in _CURVE}) > 1:
        return "the columns of its outcome.curve are of different lengths"
    if not all(_AMOUNT[1](step) for step in steps) or any(a >= b for a, b in pairwise(steps)):
        return "its outcome.curve.steps do not ascend from 0 or above"
    if not all(value is None or _is_number(value) for n in _CURVE[1:] for value in curve[n]):
        return "its outcome.curve holds what is no number"
    return ""


def _at(record: Record, place: str) -> Any:
    """An entry by its names, or _ABSENT."""
    value: Any = record
    for name in place.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value
