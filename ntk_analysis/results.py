"""results.json: written whole or not at all, and read back to go on where a run ended."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE_NAME = "results.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document under a temporary name beside it, then renames.

    Numbers that are not finite become null, which is what JSON has for them.

    Raises:
      OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_finished(path: Path, command: str, fingerprint: str) -> dict[str, Any] | None:
    """The methods that an earlier run with the same settings finished.

    Args:
      path: of results.json.
      command: whose results they must be.
      fingerprint: of the settings.

    Returns:
      Records by identifier; None where there is a file, but of other settings.

    Raises:
      ValueError: the file is not JSON, or results of another command.
    """
    document = read_document(path, command)
    if document is None:
        return {}
    if document.get("fingerprint") != fingerprint:
        return None
    finished: dict[str, Any] = document.get("methods", {})
    return finished


def read_document(path: Path, command: str) -> dict[str, Any] | None:
    """What an earlier run of a command wrote, or None.

    Args:
      path: of results.json.
      command: whose results they must be.

    Raises:
      ValueError: the file is not JSON, or results of another command.
    """
    if not path.exists():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        other = document["command"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is there and holds no results of {command}; choose another --out"
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
