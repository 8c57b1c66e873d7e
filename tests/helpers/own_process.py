"""Scripts of tests that need a process of their own, and what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax


def found_by(script: Path, folder: Path, *arguments: str, folders: Iterable[Path]) -> Any:
    """What a script writes as JSON to the path that it gets as its last argument.

    Args:
      script: run on the CPU, with the compiled programs of this process.
      folder: for the JSON file.
      arguments: of the script, before that path.
      folders: where its modules come from, the first first.
    """
    path = os.pathsep.join(map(str, folders))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    if store := jax.config.jax_compilation_cache_dir:
        # most of its time is compilation
        environment["JAX_COMPILATION_CACHE_DIR"] = store
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    found = folder / "found.json"
    done = subprocess.run(
        [sys.executable, str(script), *arguments, str(found)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text(encoding="utf-8"))


def on_eight_devices(folder: Path, *sections: str) -> Any:
    """What these sections of ``device_checks.py`` found, with its file in a folder."""
    script = Path(__file__).with_name("device_checks.py")
    return found_by(script, folder, *sections, folders=(script.parents[2],))
