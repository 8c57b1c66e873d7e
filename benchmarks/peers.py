"""Our K-FAC step beside those of kfac-jax, curvlinops and nngeometry, where they are installed.

``benchmarks.peer_comparison`` has both sides. The tables of all quantities come from
``python -m benchmarks.peer_comparison``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, ClassVar

from benchmarks.common import Suite, by_profile, profile, unit
from benchmarks.peer_comparison.client import PeerError
from benchmarks.peer_comparison.environments import PEERS, find_peer, find_python, reason
from benchmarks.peer_comparison.examples import SLOW
from benchmarks.peer_comparison.measure import disagreement, examine

NETWORKS = by_profile(
    smoke=["MLP 784-256-10"],
    fast=["MLP 784-1024-1024-10"],
    regular=["MLP 784-1024-1024-10", "ConvNet", "ConvNet 16x16, N=32"],
    large=["MLP 784-1024-1024-10", "ConvNet", "ConvNet, average", "ConvNet 16x16, N=32"],
)
REPEATS = by_profile(smoke=1, fast=9, regular=15, large=30)


class PeerStep(Suite):
    """A Monte-Carlo K-FAC step, inverses renewed, beside a peer's on the same weights and batch.

    A rise of the ratio says that ours got slower, or the peer faster; it is to stay below 0.2. For
    given draws both take the same step, to 1e-4 in float32: another one is an error.
    """

    params: ClassVar = (list(PEERS), NETWORKS)
    param_names: ClassVar = ["peer", "network"]
    version = "1"

    def skipped(self, peer: str, network: str) -> str | None:
        if profile() == "fast":
            return "the fast profile stays within its ten minutes: those from regular on measure it"
        if not find_python(find_peer(peer)):
            return reason(find_peer(peer))
        return SLOW.get(peer, {}).get(network)

    def measure(self, peer: str, network: str) -> Mapping[str, float]:
        python = find_python(find_peer(peer))
        try:
            findings = examine(peer, python, [], [network], REPEATS)
        except PeerError as error:
            raise NotImplementedError(str(error)) from error
        apart = disagreement(findings.agreements)
        if apart:
            raise ArithmeticError(f"natgrad and {peer} differ in {apart}")
        (found,) = findings.paces
        return {
            "ratio": 1 / found.ratio,
            "ours": statistics.median(found.ours),
            "theirs": statistics.median(found.theirs),
            "difference": max(entry.difference for entry in findings.agreements),
        }

    @unit("steps of the peer")
    def track_ratio_to_peer(self, *case: Any) -> float:
        """Our median step over the peer's, alternating: up means that ours fell behind."""
        return self.figures["ratio"]

    @unit("seconds")
    def track_step(self, *case: Any) -> float:
        """Median seconds of our step: up means slower training on this machine."""
        return self.figures["ours"]

    @unit("seconds")
    def track_peer_step(self, *case: Any) -> float:
        """Median seconds of the peer's step: no code of ours."""
        return self.figures["theirs"]

    @unit("relative difference")
    def track_difference(self, *case: Any) -> float:
        """|theirs - ours| / |ours| of the step for given draws: up means that they drift apart."""
        return self.figures["difference"]
