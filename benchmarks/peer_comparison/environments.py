"""Which Python has a peer: another's environment, the one that `make peers` made, or this one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ntk_analysis.names import find

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
      name: of its distribution, and of the row.
      side: the module of its worker.
      environment: the folder of its environment in the checkout.
    """

    name: str
    side: str
    environment: str


PEERS = {
    "kfac-jax": Peer("kfac-jax", "benchmarks.peer_comparison.with_kfac_jax", ".venv-peers-jax"),
    "curvlinops": Peer(
        "curvlinops-for-pytorch", "benchmarks.peer_comparison.with_curvlinops", ".venv-peers-torch"
    ),
    "nngeometry": Peer(
        "nngeometry", "benchmarks.peer_comparison.with_nngeometry", ".venv-peers-torch"
    ),
}
"""By the name that a user gives."""


def find_peer(name: str) -> Peer:
    """A peer by name.

    Raises:
      ValueError: unknown; the nearest name is offered.
    """
    return PEERS[find("peer", name, PEERS)]


def find_python(peer: Peer, root: Path = ROOT) -> str:
    """The Python to run a peer with.

    Args:
      peer: the peer.
      root: where its environment lies.

    Returns:
      A path, or "" where the peer is not installed: see ``reason``.
    """
    own = root / peer.environment / "bin" / "python"
    if own.exists():
        return str(own)
    try:
        version(peer.name)
    except PackageNotFoundError:
        return ""
    return sys.executable


def reason(peer: Peer) -> str:
    """Why a peer without a Python is left out."""
    return (
        f"{peer.name} is not installed: `make peers` installs it in {peer.environment}, and "
        "python -m benchmarks.peer_comparison takes another environment with --python"
    )
