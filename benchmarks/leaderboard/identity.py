"""What the result of a trial depends on besides its settings, as it enters the trial's key."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import benchmarks
import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.machine import cores, processor
from ntk_analysis.results import content_hash
from ntk_analysis.results import environment as versions
from ntk_analysis.sources import LIBRARY, import_digest, package

_HERE = Path(__file__).resolve().parent
_BENCHMARKS = (package(benchmarks),)


def identity() -> dict[str, Any]:
    """The harness and the environment of this process, without which a result means nothing."""
    return {"code": code_version(), "environment": environment()}


@cache
def code_version() -> str:
    """SHA-256 of the harness: what runs, times and judges a trial, the same for all contestants.

    Of the library it holds nothing: that is in the sources of those contestants that use it.
    """
    return import_digest(_HERE / "trial.py", _BENCHMARKS)


@cache
def environment() -> dict[str, str]:
    """Versions, device, processor and cores: what may change a result of the same sources."""
    found = {**versions(), "optax": version("optax"), "processor": processor(), "cores": cores()}
    # a release changes no result; what it changed of a contestant is in its sources
    return {name: str(value) for name, value in found.items() if name != "natgrad"}


@cache
def sources(contestant: Contestant) -> str:
    """SHA-256 of a contestant: its module, and what of this project or beside it this imports.

    Where theory gives the learning rate, with what computes it.
    """
    file = contestant.source.resolve()
    beside = tuple((path.stem, path) for path in sorted(file.parent.glob("*.py")) if path != file)
    packages = (*LIBRARY, *_BENCHMARKS, *(() if file.is_relative_to(_HERE) else beside))
    files = [file, *([_HERE / "rates.py"] if contestant.rate_rule == "theoretical" else [])]
    return content_hash([import_digest(path, packages) for path in files])


def packages(contestant: Contestant) -> dict[str, Any]:
    """Versions of what only this contestant needs, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in contestant.packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {"packages": found} if found else {}


@cache
def provenance() -> Mapping[str, str]:
    """The commit that a trial was run at, "-dirty" behind it where files differ, and the release.

    They are for the reader: the key of a trial goes by its sources. "" outside of a checkout.
    """
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    asked = ["git", "-C", str(_HERE), *describe]  # tags are no commits
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
        commit = told.stdout.strip() if told.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"commit": commit, "natgrad": ng.__version__}
