"""Both sides on the same examples: how far they are apart, and how long they take."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.peer_comparison import ours
from benchmarks.peer_comparison.client import PeerError, Worker
from benchmarks.peer_comparison.comparisons import COMPARISONS, STEP, TOLERANCE, Comparison
from benchmarks.peer_comparison.environments import find_peer
from benchmarks.peer_comparison.examples import LARGE, SMALL, Example
from benchmarks.peer_comparison.exchange import relative_difference

WARM_UP = 3
"""Steps of both sides before the first that counts: kfac-jax compiles in its second, too."""

LEAST, LONGEST = 3, 60.0
"""Timed steps of each side that are always taken, and seconds after which there are no more."""


@dataclass(frozen=True)
class Agreement:
    """How far one quantity is apart.

    Attributes:
      example: name of the network and loss.
      comparison: the quantity, and its convention.
      difference: |theirs - ours| / |ours|.
      tolerance: the most that it may be.
    """

    example: str
    comparison: Comparison
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two sides agree; NaN is no agreement."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Pace:
    """Steps of both sides, one of each in turn.

    Attributes:
      example: name of the network.
      ours: seconds of each of our steps.
      theirs: seconds of each of theirs.
      ours_busy: processor seconds of each of our steps, over all threads.
      theirs_busy: processor seconds of each of theirs.
    """

    example: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    ours_busy: tuple[float, ...]
    theirs_busy: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Their median step over our median step: how many times as fast ours is."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def busy_ratio(self) -> float:
        """The same of processor seconds, which other programs disturb less."""
        return statistics.median(self.theirs_busy) / statistics.median(self.ours_busy)


@dataclass(frozen=True)
class Findings:
    """What was found out about a peer.

    Attributes:
      versions: of its packages.
      agreements: one entry a quantity and example.
      paces: one entry a timed example.
    """

    versions: dict[str, str]
    agreements: list[Agreement]
    paces: list[Pace]


@functools.cache
def small_side(name: str) -> ours.Side:
    """Our side of a small example in float64, one for all peers."""
    with jax.enable_x64(True):
        return ours.Side(SMALL[name]())


def compare(
    worker: Worker, name: str, side: ours.Side, comparisons: Sequence[Comparison]
) -> list[Agreement]:
    """Gives an example to a peer, and says how far apart the quantities of both sides are.

    Args:
      worker: of the peer.
      name: of the example.
      side: our side of the example.
      comparisons: what is compared.

    Raises:
      PeerError: the peer failed.
    """
    worker.load(side.problem)
    dtype = side.problem.x.dtype
    found = []
    with jax.enable_x64(dtype == np.float64):
        for comparison in comparisons:
            wanted = side.quantity(comparison.quantity)
            difference = relative_difference(worker.quantity(comparison.quantity), wanted)
            found.append(Agreement(name, comparison, difference, TOLERANCE[str(dtype)]))
    return found


def pace(worker: Worker, name: str, example: Example, repeats: int) -> Pace:
    """Times steps of both sides, alternating, so that both see the same machine.

    Args:
      worker: of the peer, with this example loaded.
      name: of the example.
      example: the example.
      repeats: steps of each side that count, or fewer where they are slow: see LONGEST.

    Raises:
      PeerError: the peer failed.
    """
    training = ours.Training(example)
    for _ in range(WARM_UP):
        training.step()
        worker.step()
    rows: list[tuple[float, float, float, float]] = []
    started = time.perf_counter()
    while len(rows) < repeats:
        if len(rows) >= LEAST and time.perf_counter() - started > LONGEST:
            break
        wall, busy = time.perf_counter(), time.process_time()
        training.step()
        own = time.perf_counter() - wall, time.process_time() - busy
        rows.append((*own, *worker.step()))
    seconds, cpu, their_seconds, their_cpu = (tuple(column) for column in zip(*rows, strict=True))
    return Pace(name, seconds, their_seconds, cpu, their_cpu)


def examine(
    name: str, python: str, small: Sequence[str], large: Sequence[str], repeats: int
) -> Findings:
    """Compares a peer on small networks in float64, and compares and times it on large ones.

    Args:
      name: of the peer.
      python: that has it.
      small: names of networks whose matrices and steps are compared.
      large: names of networks whose K-FAC steps are timed, and compared for given draws.
      repeats: timed steps of each side.

    Raises:
      PeerError: the peer failed, or JAX runs on another device than the CPU, which peers run on.
    """
    peer = find_peer(name)
    if jax.default_backend() != "cpu":
        raise PeerError(f"peers run on the CPU: no times to set beside a {jax.default_backend()}")
    found = Findings({}, [], [])
    if small:
        with Worker(peer, python) as worker:
            for title in small:
                rows = COMPARISONS[name]
                found.agreements.extend(compare(worker, title, small_side(title), rows))
            found.versions.update(worker.versions)
    step = [row for row in COMPARISONS[name] if row.quantity == STEP]
    for title in large:
        # a process of its own: what was compiled and allocated before does not slow it down
        with Worker(peer, python) as worker:
            example = LARGE[title]()
            found.agreements.extend(compare(worker, title, ours.Side(example), step))
            found.paces.append(pace(worker, title, example, repeats))
            found.versions.update(worker.versions)
    return found


def disagreement(agreements: Sequence[Agreement]) -> str:
    """What does not agree, in words; "" where all does."""
    return ", ".join(
        f"{entry.comparison.quantity} of {entry.example} by {entry.difference:.2g} "
        f"(at most {entry.tolerance:g})"
        for entry in agreements
        if not entry.holds
    )
