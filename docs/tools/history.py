"""asv's page of the results committed in ``results/asv``: the suites from commit to commit."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "asv"
log = logging.getLogger("mkdocs.natgrad")


@cache
def build(out: Path) -> tuple[Path, ...]:
    """Builds the page; its files, none where asv, its results or their commits are not at hand.

    Args:
      out: the folder of the page.
    """
    if not measured():
        return ()
    command = [sys.executable, "-m", "benchmarks.asv_site", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        log.info("no page of asv: %s", done.stderr)
        return ()
    return tuple(sorted(path for path in out.rglob("*") if path.is_file()))


def measured() -> dict[str, list[dict[str, object]]]:
    """The results of every machine, by its name."""
    found: dict[str, list[dict[str, object]]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        if path.name != "machine.json":
            found.setdefault(path.parent.name, []).append(json.loads(path.read_bytes()))
    return found


def told(built: bool) -> str:
    """What the page of the benchmarks says of it."""
    if not built:
        return "`make bench-site` builds asv's page of the results in `results/asv`."
    machines = (
        f"{len({r['commit_hash'] for r in results})} commits on `{name}`"
        for name, results in measured().items()
    )
    return (
        f"[Every figure of the suites](history/index.html), of {', '.join(machines)}. "
        "`make bench COMMITS=8` measures the last eight on your machine, and "
        "`make bench-site RESULTS=.asv/results` shows them."
    )
