"""A digest of the source that decides results, by which results of other code are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import natgrad_datasets

import natgrad_flax
import ntk_analysis

_AFTERWARDS = ("cli", "report", "reproduce")
"""Folders of ntk_analysis that only ask, draw or check; each check adds its own source."""


def source_digest(further: Iterable[Path] = ()) -> str:
    """SHA-256 of every module of the packages, wherever in them it stands.

    Args:
      further: files that count, too.
    """
    digest = hashlib.sha256()
    for package in (natgrad_flax, natgrad_datasets, ntk_analysis):
        folder = Path(package.__file__ or "").parent
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if package is not ntk_analysis or inside.parts[0] not in _AFTERWARDS:
                digest.update(inside.as_posix().encode() + b"\0" + path.read_bytes())
    for path in further:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
