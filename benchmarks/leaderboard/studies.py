"""How tuned contestants find their learning rates: independent studies of a few trials each.

What tuning finds depends on what it happens to try, and on the seed that it tries it with. So it is
done ``STUDIES`` times over, and evaluation seeds take the findings of the studies in turn: the luck
of tuning is a part of how the times of seeds differ, and so of the intervals of scores.

Nothing here knows a workload or a contestant: those with one search space try the same rates.
"""

from __future__ import annotations

import math

import numpy as np

STUDIES = 3
"""How often a contestant is tuned on a workload; two studies share nothing."""

TRIALS = 5
"""Learning rates that a study tries, no more and no less."""

TUNING_SEED = 1000
"""Of the first study: its initial parameters and batches, which no evaluation uses."""

Space = tuple[float, float]
"""The smallest and the largest learning rate that tuning may try."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def study_of(seed: int) -> int:
    """The study whose learning rate an evaluation seed takes."""
    return seed % STUDIES


def tuning_seed(study: int) -> int:
    """The seed of all trials of a study."""
    return TUNING_SEED + study


def is_tuning(seed: int) -> bool:
    """Whether a seed is one of tuning, where validation samples judge."""
    return seed >= TUNING_SEED


def rates(space: Space, study: int) -> tuple[float, ...]:
    """The learning rates that a study tries, ascending: spread evenly over the logarithm.

    The additive sequence of the golden ratio, which keeps any number of points apart (the
    three-gap theorem, Sós 1958), from a start that the study draws.

    Args:
      space: in which they are.
      study: its number, from 0.

    Returns:
      TRIALS of them, of three digits.
    """
    low, high = space
    start = np.random.default_rng(tuning_seed(study)).random()
    places = (start + _GOLDEN * np.arange(TRIALS)) % 1.0
    tried = (float(f"{low * (high / low) ** place:.3g}") for place in places)
    # rounding is not to leave the space
    return tuple(sorted(min(max(rate, low), high) for rate in tried))
