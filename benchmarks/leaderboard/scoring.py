"""Scores of contestants from the times of their trials: pure functions of numbers.

A contestant's time on a workload is the median over its seeds, a missed target being infinite. Its
performance profile rho(tau) is the share of workloads on which its time is at most tau times the
best contestant's (Dolan & More 2002), and its score the area under the profile up to ``R_MAX``
(AlgoPerf, Dahl et al. 2023). Clocks are whatever the times are in: seconds, or steps.

Two contestants tie where resampled seeds do not tell them apart. Seeds of a tuned contestant take
the learning rates of its independent studies in turn (``studies``), so that resampling them holds
the luck of tuning, too. Resampled seeds know nothing of
what slows a machine down for all seeds of a contestant at once, so that a ranking by seconds would
change from run to run; each resampled time is therefore multiplied by exp(noise * z), z normal, one
for all seeds of a contestant on a workload. Steps repeat exactly and take no noise.

What stays the same from run to run is the order of contestants that are in different groups: two
runs of the default board put no two of its 22 contestants in opposite orders
(benchmarks/README.md). The number of a rank can shift, as it counts everyone in the groups before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from natgrad_flax.arguments.scalars import check_integer, check_number

R_MAX = 4.0
"""Where the profile ends: AlgoPerf's choice."""
REPLICATES = 2000
LEVEL = 0.95
"""Of the interval of a score."""
TIE_LEVEL = 0.99
"""Of the interval that decides a tie: a ranking decides often, so it must seldom err."""
CLOCK_NOISE = 0.1
"""Standard deviation of the logarithm of a time from run to run on one machine.

Two runs of two workloads on an otherwise idle machine gave 0.06 over 21 medians, with two of them
at 0.14 and 0.21: the seeds of a contestant share one compilation.
"""

Array = NDArray[np.float64]


class Rank(NamedTuple):
    """A place in the ranking.

    Attributes:
      place: from 1; contestants that tie share the place of the first of them.
      tied: whether anyone else has this place.
    """

    place: int
    tied: bool

    def __str__(self) -> str:
        return f"{self.place}=" if self.tied else str(self.place)


def total_seconds(training: float | None, compilation: float, preparation: float) -> float:
    """Time to target: training until the target, compilation and preparation before it.

    Args:
      training: seconds of training until the target was reached; None where it was not.
      compilation: seconds.
      preparation: seconds, such as for the theory of the learning rate.

    Returns:
      Seconds; infinite where the target was missed.
    """
    return np.inf if training is None else training + compilation + preparation


def median(times: object, axis: int = -1) -> Array:
    """The median over seeds, where a missed target is infinite.

    Over an even number of seeds it is the mean of the two in the middle, so it is infinite unless
    more than half of the seeds reach the target. It is infinite without any seed.

    Args:
      times: none of them NaN.
      axis: of the seeds.

    Raises:
      ValueError: a time is NaN or negative.
    """
    ordered = np.moveaxis(np.asarray(times, np.float64), axis, -1)
    if not np.all(ordered >= 0):
        raise ValueError("a time must be 0 or more; a target that was missed is infinite, not NaN")
    count = ordered.shape[-1]
    if count == 0:
        return np.full(ordered.shape[:-1], np.inf)
    low, high = (count - 1) // 2, count // 2
    ordered = np.partition(ordered, (low, high), axis=-1)
    return np.asarray((ordered[..., low] + ordered[..., high]) / 2)


def ratios(times: object) -> Array:
    """Times as multiples of the best contestant's on the same workload.

    Args:
      times: (..., contestants, workloads).

    Returns:
      The same shape, at least 1; infinite where a contestant missed the target, so on a workload
      that nobody reaches for all of them.
    """
    own = np.asarray(times, np.float64)
    best = own.min(axis=-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = own / best
    return np.where(np.isinf(own), np.inf, np.where(own == best, 1.0, quotient))


def profile(ratio: object, tau: object) -> Array:
    """The performance profile rho(tau), the share of workloads with a ratio of at most tau.

    Workloads that nobody reaches count in the denominator, so they lower every profile alike.

    Args:
      ratio: (..., workloads), as ``ratios`` gives them.
      tau: (T,).

    Returns:
      (..., T).
    """
    return np.mean(np.asarray(ratio)[..., None, :] <= np.asarray(tau, np.float64)[:, None], axis=-1)


def score(ratio: object, r_max: float = R_MAX) -> Array:
    """The area under the profile from 1 to r_max, over r_max - 1.

    The profile is a step function that rises by 1/workloads at each ratio, so the area is exactly
    the mean over workloads of (r_max - ratio) / (r_max - 1), or 0 where the ratio is beyond r_max.

    Args:
      ratio: (..., workloads), as ``ratios`` gives them.
      r_max: more than 1.

    Returns:
      (...), from 0 to 1: 1 for who is the best on every workload.

    Raises:
      ValueError: r_max is not more than 1, or there is no workload.
    """
    check_number("r_max", r_max, positive=True)
    if r_max <= 1:
        raise ValueError(f"r_max must be more than 1, got {r_max}")
    own = np.asarray(ratio, np.float64)
    if own.shape[-1] == 0:
        raise ValueError("a score needs at least one workload")
    return np.mean(np.clip(r_max - own, 0.0, None) / (r_max - 1), axis=-1)


def bootstrap(
    times: Sequence[Sequence[Sequence[float]]],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    noise: float = 0.0,
    r_max: float = R_MAX,
) -> Array:
    """Scores of resampled seeds.

    On each workload all contestants get the same draw of seeds, as far as they have as many.

    Args:
      times: [contestant][workload][seed], infinite where missed; numbers of seeds may differ.
      replicates: how many resamples.
      seed: of the generator; the same seed gives the same scores.
      noise: standard deviation of the logarithm of the factor on each contestant's time.
      r_max: of the score.

    Returns:
      (replicates, contestants).

    Raises:
      ValueError: replicates is not positive, noise is negative, or a time is NaN.
    """
    check_integer("replicates", replicates, 1)
    check_number("noise", noise, positive=False)
    generator = np.random.default_rng(seed)
    workloads = len(times[0]) if times else 0
    medians = np.full((replicates, len(times), workloads), np.inf)
    for workload in range(workloads):
        samples = [np.asarray(contestant[workload], np.float64) for contestant in times]
        counts = np.array([len(sample) for sample in samples])
        draws = generator.random((replicates, counts.max(initial=0)))
        for count in np.unique(counts[counts > 0]):
            members = np.flatnonzero(counts == count)
            chosen = (draws[:, :count] * count).astype(int)
            pool = np.stack([samples[member] for member in members])
            medians[:, members, workload] = median(pool[:, chosen]).T
        if noise:
            factors = noise * generator.standard_normal((replicates, len(times)))
            medians[..., workload] *= np.exp(factors)
    return score(ratios(medians), r_max)


def interval(values: object, level: float = LEVEL) -> Array:
    """The central percentile interval of resampled values.

    Args:
      values: (replicates, ...).
      level: its share, between 0 and 1.

    Returns:
      (2, ...): lower and upper end.

    Raises:
      ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return np.quantile(np.asarray(values, np.float64), [(1 - level) / 2, (1 + level) / 2], axis=0)


def rank(scores: object, resampled: object, level: float = TIE_LEVEL) -> list[Rank]:
    """Places by score, with ties.

    From the best score down, a contestant ties with the first of its group, the leader, where the
    interval of the difference of their resampled scores contains 0; else it leads the next group.
    Against the leader and not the neighbour, or a long chain of small steps would be one tie.

    Args:
      scores: (contestants,).
      resampled: (replicates, contestants), as ``bootstrap`` gives them.
      level: of the interval.

    Returns:
      One rank for each contestant, in their order.

    Raises:
      ValueError: the shapes do not agree.
    """
    own, samples = np.asarray(scores, np.float64), np.asarray(resampled, np.float64)
    if samples.ndim != 2 or samples.shape[1:] != own.shape:
        raise ValueError(
            f"resampled must be (replicates, {len(own)}), one column a contestant, "
            f"got {samples.shape}"
        )
    groups: list[list[int]] = []
    for contestant in np.argsort(-own, kind="stable"):
        if groups:
            leader = groups[-1][0]
            low, high = interval(samples[:, leader] - samples[:, contestant], level)
            if own[contestant] == own[leader] or low <= 0 <= high:
                groups[-1].append(int(contestant))
                continue
        groups.append([int(contestant)])
    places: dict[int, Rank] = {}
    for group in groups:
        shared = Rank(len(places) + 1, len(group) > 1)
        places |= dict.fromkeys(group, shared)
    return [places[contestant] for contestant in range(len(own))]


def speed_up(times: object, baseline: object) -> tuple[float | None, int]:
    """How many times faster than a baseline, by the geometric mean over workloads.

    Args:
      times: (workloads,).
      baseline: (workloads,), the best time of the contestants to compare with.

    Returns:
      The mean of baseline / time over the workloads where both reach the target, None where there
      is none, and the number of those workloads.
    """
    own, other = np.asarray(times, np.float64), np.asarray(baseline, np.float64)
    both = np.isfinite(own) & np.isfinite(other) & (own > 0) & (other > 0)
    if not both.any():
        return None, 0
    return float(np.exp(np.mean(np.log(other[both] / own[both])))), int(both.sum())


def contradictions(first: Mapping[str, int], second: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs that two rankings order in opposite ways; two runs agree where there is none.

    A tie in either ranking contradicts nothing.

    Args:
      first: places by contestant.
      second: of another run; contestants of only one of them are left out.

    Returns:
      Pairs (a, b) with a before b in the first and behind it in the second.
    """
    names = [name for name in first if name in second]
    return [(a, b) for a in names for b in names if first[a] < first[b] and second[a] > second[b]]
