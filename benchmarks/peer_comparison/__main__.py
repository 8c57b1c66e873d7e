"""The comparison from the command line: ``python -m benchmarks.peer_comparison --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import cores, processor
from benchmarks.peer_comparison.client import PeerError
from benchmarks.peer_comparison.environments import PEERS, find_peer, find_python, reason
from benchmarks.peer_comparison.examples import LARGE, SLOW, SMALL
from benchmarks.peer_comparison.measure import disagreement, examine
from benchmarks.peer_comparison.tables import agreement_record, markdown, pace_record
from ntk_analysis.names import find
from ntk_analysis.results import FILE_NAME, environment, now, write_json

REPEATS = 15
TIMED = ["MLP 784-1024-1024-10", "ConvNet", "ConvNet, average", "ConvNet 16x16, N=32"]


def run(
    names: Sequence[str], python: str | None, small: Sequence[str], large: Sequence[str] | None,
    repeats: int, out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Compares, and writes results.json and results.md anew after each network of each peer.

    Args:
      names: of peers; one that is not installed, or fails, is in it with the reason.
      python: to run them with, or None for the one that ``find_python`` finds.
      small: networks that are compared in float64.
      large: networks that are timed; None for TIMED, without those that are SLOW for a peer.
      repeats: timed steps of each side.
      out: the folder for them.

    Returns:
      The document of results.json.
    """
    document: dict[str, Any] = {
        "command": "peers",
        "date": now(),
        "environment": environment() | {"processor": processor(), "cores": str(cores())},
        "paces": [],
        "agreements": [],
        "skipped": [],
    }
    for name in names:
        peer = find_peer(name)
        chosen = python or find_python(peer)
        if not chosen:
            document["skipped"].append({"peer": name, "reason": reason(peer)})
            continue
        # what fails on one network does not take the others with it
        slow = SLOW.get(name, {}) if large is None else {}
        titles = [title for title in (TIMED if large is None else large) if title not in slow]
        document["skipped"] += [{"peer": name, "reason": f"{a}: {b}"} for a, b in slow.items()]
        parts: list[tuple[Sequence[str], Sequence[str]]] = [([], [title]) for title in titles]
        for one, other in [(small, []), *parts] if small else parts:
            what = ", ".join([*one, *other])
            try:
                found = examine(name, chosen, one, other, repeats)
            except PeerError as error:
                document["skipped"].append({"peer": name, "reason": f"{what}: {error}"})
                continue
            document["environment"] |= found.versions
            document["agreements"] += [agreement_record(name, entry) for entry in found.agreements]
            document["paces"] += [pace_record(name, entry) for entry in found.paces]
            verdict = disagreement(found.agreements) or "agrees"
            print(f"{name}, {what}: {verdict}", file=sys.stderr)
            _write(out, document)
    _write(out, document)
    return document


def _write(out: Path, document: dict[str, Any]) -> None:
    write_json(out / FILE_NAME, document)
    (out / "results.md").write_text(markdown(document) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints its tables.

    Returns:
      0, or 1 where something that was compared is apart.

    Raises:
      SystemExit: bad arguments, with code 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer_comparison", description=__doc__
    )
    parser.add_argument("--peer", nargs="+", default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--python", help="of an environment that has the peers")
    parser.add_argument(
        "--network", nargs="*",
        help=f"timed: {', '.join(LARGE)} [default: {', '.join(TIMED)}, but for slow ones]",
    )  # fmt: skip
    parser.add_argument(
        "--matrices", action=argparse.BooleanOptionalAction, default=True,
        help="compare all quantities of small networks",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed steps of each side")
    parser.add_argument("--out", type=Path, default=Path("natgrad-peers"), help="a folder")
    chosen = parser.parse_args(arguments)
    try:
        peers = [find("peer", name, PEERS) for name in chosen.peer]
        networks = chosen.network and [_network(name) for name in chosen.network]
    except ValueError as error:
        parser.error(str(error))
    if chosen.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {chosen.repeats}")
    if chosen.python and not Path(chosen.python).exists():
        parser.error(f"--python {chosen.python}: there is no such file")
    small = list(SMALL) if chosen.matrices else []
    document = run(peers, chosen.python, small, networks, chosen.repeats, chosen.out)
    print(markdown(document))
    return 0 if all(entry["agrees"] for entry in document["agreements"]) else 1


def _network(name: str) -> str:
    """A network as a user writes it, or with the nearest name refused."""
    lower = {title.lower(): title for title in LARGE}
    return lower[find("network", name, lower)]


if __name__ == "__main__":
    sys.exit(main())
