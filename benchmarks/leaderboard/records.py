"""A record of a trial: what it holds, under which key, and whether a file is one.

Nothing here imports JAX, as in ``store``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.reading import read_file

SCHEMA = 1

PAST_RULES = ("1.1",)
"""Earlier rules, whose trials can be merged: they stand below the rows of a board, unranked."""

Record = dict[str, Any]


class NotARecordError(ValueError):
    """A file that is no valid record, with the reason."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys: ``ntk_analysis.results.content_hash([value])``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def trial_key(config: Mapping[str, Any]) -> str:
    """The key of a trial: the hash of its whole configuration.

    Raises:
      ValueError: a number in it is not finite.
      TypeError: JSON cannot hold it.
    """
    return digest(dict(config))


def belongs(found: object, rules: str) -> bool:
    """Whether trials of some rules may lie in a folder: those of its own, or of past ones."""
    return found == rules or (rules == RULES and found in PAST_RULES)


def read_record(path: Path, rules: str) -> Record:
    """Reads and checks a record.

    Raises:
      NotARecordError: it is none; says why.
      FileNotFoundError: there is no such file.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotARecordError(f"cannot be read: {error.strerror}") from None
    record = parse_record(text, rules)
    key = record["key"]
    if path.name != f"{key}.json" or path.parent.name != key[:2]:
        raise NotARecordError(f"its name or key is not that of its config, {key[:12]}...")
    return record


def parse_record(text: bytes, rules: str) -> Record:
    """The record that a text is.

    Raises:
      NotARecordError: it is none; says why.
    """
    try:
        record = json.loads(text)
    except RecursionError:
        raise NotARecordError("not a record: its JSON is nested too deep") from None
    except ValueError:  # also of an encoding that is not UTF-8
        what = "empty" if not text.strip(b"\0 \n") else "not JSON: half-written or edited"
        raise NotARecordError(f"the file is {what}") from None
    if not isinstance(record, dict):
        raise NotARecordError("not a record: its JSON is no object")
    if record.get("schema") != SCHEMA:
        raise NotARecordError(f"of schema {record.get('schema')!r}, this program has {SCHEMA}")
    stated = record.pop("digest", None)
    try:
        found = digest(record)
    except ValueError:
        raise NotARecordError("it holds numbers that are not finite, which no record has") from None
    if stated != found:
        raise NotARecordError("edited by hand: its digest is not that of its content")
    parts = [record.get(part) for part in ("config", "facts", "outcome")]
    if not all(isinstance(part, dict) for part in parts) or "command" not in record:
        raise NotARecordError("incomplete: it lacks a config, facts, an outcome or a command")
    config = record["config"]
    key = trial_key(config)
    if record.get("key") != key:
        raise NotARecordError(f"its name or key is not that of its config, {key[:12]}...")
    if not belongs(config.get("rules"), rules):
        raise NotARecordError(f"of rules {config.get('rules')!r}, the folder has {rules!r}")
    record["digest"] = stated
    return record
