"""results.json: written whole or not at all, and read back to go on where a run ended.

Every record stands there with a digest of itself and of what decides it. A record is taken over
only with the digest that it was written with: what is damaged or was edited is worked out anew, and
the file that held it is kept under another name.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ntk_analysis.files import keep_copy, replace_file

FILE_NAME = "results.json"
DIGESTS = "digests"
"""The key of the digests of the records, by name."""
_NAMES_SHOWN = 3

Record = dict[str, Any]
Say = Callable[[str], object]
"""Called with a sentence that a user should read."""


class Form(NamedTuple):
    """Where a document has its records.

    Attributes:
      records: the key of the records, by name.
      context: the key of what decides them all.
      change: what is another one where the context is, for messages.
    """

    records: str
    context: str
    change: str


METHODS = Form("methods", "fingerprint", "settings")
CHECKS = Form("checks", "environment", "versions of the software")


@dataclass
class Results:
    """The results.json of a run: what earlier runs finished, and what this one adds.

    Open one with ``open_results``.

    Attributes:
      path: of the file.
      form: where its records are.
      records: by name; those of earlier runs that can be trusted.
      say: told in a sentence what became of other earlier results, once it has happened.
    """

    path: Path
    form: Form
    records: dict[str, Record]
    say: Say
    _replaced: str = ""

    def write(self, document: dict[str, Any]) -> None:
        """Writes a document with the records and their digests.

        Before the first time, a file of which not all can be taken over is kept under another name.

        Raises:
          OSError: the folder cannot be written to.
        """
        document[self.form.records] = self.records
        document[DIGESTS] = digests(document, self.form)
        if self._replaced:
            copy = keep_copy(self.path)
            self.say(f"{self._replaced}; the earlier file is kept as {copy.name}")
            self._replaced = ""
        write_json(self.path, document)


def open_results(
    path: Path, command: str, form: Form, context: object, say: Say, *, fresh: bool = False
) -> Results:
    """Reads what earlier runs of a command finished; nothing is written before ``Results.write``.

    Args:
      path: of results.json.
      command: whose results they must be.
      form: where the document has its records.
      context: what decides this run's records, as JSON has it; others are not taken over.
      say: see ``Results``.
      fresh: take over nothing.

    Raises:
      ValueError: the file is no JSON document, or holds results of another command.
    """
    document = read_document(path, command)
    if document is None:
        return Results(path, form, {}, say)
    if fresh:
        return Results(path, form, {}, say, "earlier results were replaced")
    if document.get(form.context) != context:
        replaced = f"the folder held results of other {form.change}, which were replaced"
        return Results(path, form, {}, say, replaced)
    records, unsound = sound_records(document, form)
    return Results(path, form, records, say, unsound and f"{path.name}: {unsound}")


def sound_records(document: Mapping[str, Any], form: Form) -> tuple[dict[str, Record], str]:
    """The records of a document that have the digest they were written with.

    Returns:
      The records by name, and a sentence on the others, "" where there are none.
    """
    records, stated = document.get(form.records), document.get(DIGESTS)
    if not isinstance(records, dict):
        return {}, f"{form.records} is no object: damaged or edited"
    if not isinstance(stated, dict):
        return {}, "its records have no digests: edited, or of an older version"
    try:
        # JSON knows no NaN, but Python reads it
        records, found = plain(records), digests(document, form)
    except RecursionError:
        return {}, "its records are nested too deep: damaged or edited"
    sound = {name: record for name, record in records.items() if stated.get(name) == found[name]}
    bad = [name for name in records if name not in sound]
    if not bad:
        return sound, ""
    names = ", ".join(bad[:_NAMES_SHOWN]) + ", ..." * (len(bad) > _NAMES_SHOWN)
    return sound, (
        f"{len(bad)} of {len(records)} records ({names}) do not have the digest they were written "
        "with, damaged or edited, and are left out"
    )


def digests(document: Mapping[str, Any], form: Form) -> dict[str, str]:
    """The digest of every record: of command, context, name and the record as JSON has it."""
    bound = [document["command"], document.get(form.context)]
    content = json.loads(json.dumps(plain([bound, document[form.records]])))
    return {name: content_hash([content[0], name, r]) for name, r in content[1].items()}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document whole or not at all, see ``replace_file``.

    Numbers that are not finite become null, which is what JSON has for them.

    Raises:
      OSError: the folder cannot be written to.
    """
    text = json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file.

    Raises:
      ValueError: it is no such file, cannot be read, or holds something else.
    """
    # a pipe would be waited for
    if not path.is_file():
        raise ValueError("not a file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"not readable: {error.strerror}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def read_document(path: Path, command: str) -> dict[str, Any] | None:
    """What an earlier run of a command wrote, or None.

    Args:
      path: of results.json.
      command: whose results they must be.

    Raises:
      ValueError: the file is not JSON, or results of another command.
    """
    if not path.exists() and not path.is_symlink():
        return None
    try:
        document = read_json(path)
        other = document["command"]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path} is there and holds no results of {command}; move it away or choose another "
            "--out"
        ) from None
    if other != command:
        raise ValueError(f"{path} holds results of {other}; choose another --out")
    return document


def content_hash(parts: Sequence[Any]) -> str:
    """SHA-256 of arrays and of what JSON can hold, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(repr((part.shape, part.dtype.str)).encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Versions and device, without names of the machine or its folders."""
    device = jax.devices()[0]
    return {
        "natgrad": version("natgrad"),
        "jax": version("jax"),
        "flax": version("flax"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
    }


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """A value as JSON has it: lists for tuples, None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
